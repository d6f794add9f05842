"""Linear probe: multinomial logistic regression by full-batch L-BFGS, with the regularisation chosen without test labels.

The objective is scikit-learn's, C * sum of cross-entropies + |W|^2 / 2 with a free intercept, so that C means the same. (For two
classes scikit-learn writes one weight vector where this has two; its C is then half of this one.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from modicum.data.stratify import stratified_folds
from modicum.randomness import seed_of
from modicum.settings import LinearSettings

FEW = 20  # labels a class under which nothing is held out: the choice is made by k-fold
ROUGH, FINE = 1e-4, 1e-6  # largest gradient entry left: to rank strengths, and in the probe that is judged
SMALL = 2**22  # numbers up to which the problem is solved in float64: cheap there, and it ends closer to the optimum


@dataclass(frozen=True)
class Probe:
    weight: torch.Tensor  # (D, C)
    bias: torch.Tensor  # (C,)
    strength: float  # the C that was chosen
    chosen: str  # how, for people

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits (N, C) of standardised features (N, D)."""
        return (torch.from_numpy(features).to(self.weight) @ self.weight + self.bias).cpu().numpy()


def standardise(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N, D) float32, each column with mean 0 and deviation 1 over the images in `rows`; a constant column becomes 0.

    `rows` are all training images, labelled or not: a handful of labelled ones would tell too little of the deviations.
    """
    train = features[rows]
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    constant = deviation < 1e-6 * np.maximum(np.abs(mean), 1e-6)
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
    return (features - mean.astype(np.float32)) * scale.astype(np.float32)


def solve(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    strengths: list[float],
    used: torch.Tensor,
    max_iterations: int,
    tolerance: float,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights (D, P, C) and biases (P, C) for each C of `strengths`, ascending, each started from the one before.

    `features` (N, D), `labels` int64 (N,), `used` bool (P, N): P problems on the same images, problem p on those in `used[p]`, solved as
    one (their sum is separable), which costs hardly more than a single one while N is small.
    """
    rotation = None
    if features.shape[0] < features.shape[1]:  # the solution lies in the span of the images: turn it into N dimensions, exactly
        rotation, triangle = torch.linalg.qr(features.T)
        features = triangle.T
    problems = len(used)
    share = (used / used.sum(dim=1, keepdim=True)).to(features.dtype)  # every image's part in its problem's mean
    weight = features.new_zeros(features.shape[1], problems, num_classes, requires_grad=True)
    bias = features.new_zeros(problems, num_classes, requires_grad=True)
    targets = labels[:, None].expand(-1, problems).reshape(-1)
    tolerance = max(tolerance, 1e-6 if features.dtype == torch.float64 else 1e-5)  # what the number format can reach
    for strength in strengths:
        decay = (0.5 / (strength * used.sum(dim=1))).to(features.dtype)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=tolerance / 1000,
            line_search_fn="strong_wolfe",
        )

        def objective(optimizer: torch.optim.LBFGS = optimizer, decay: torch.Tensor = decay) -> torch.Tensor:
            optimizer.zero_grad()
            logits = (features @ weight.flatten(1)).unflatten(1, (problems, num_classes)) + bias
            losses = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none").unflatten(0, (-1, problems))
            total = (losses * share.T).sum() + (weight.square().sum(dim=(0, 2)) * decay).sum()
            total.backward()
            return total

        optimizer.step(objective)
        found = weight.detach().clone()
        yield found if rotation is None else (rotation @ found.flatten(1)).unflatten(1, found.shape[1:]), bias.detach().clone()


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    settings: LinearSettings,
    seed: int,
    validation: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Probe:
    """The probe on standardised `features` float32 (N, D) with `labels` int64 (N,), refitted on all of them with the chosen C.

    C is chosen by the accuracy on `validation` (bool (N,)) if any is given; else, under 20 labels a class, by stratified k-fold
    with k = 5 or the smallest class's count; else on a seeded tenth. Of equal ones the strongest regularisation (the smallest C).
    """
    strengths = sorted(set(settings.strengths))
    double = features.size <= SMALL and torch.device(device).type != "mps"  # mps has no float64
    inputs = torch.from_numpy(features).to(device, torch.float64 if double else torch.float32)
    targets = torch.from_numpy(labels).to(device)
    held, chosen = _held_out(labels, seed, validation)
    if held is None:
        strength = strengths[(len(strengths) - 1) // 2]
    else:
        strength = _best(inputs, targets, num_classes, strengths, torch.from_numpy(held).to(device), settings.max_iterations)
    everything = torch.ones(1, len(labels), dtype=torch.bool, device=device)
    [(weight, bias)] = solve(inputs, targets, num_classes, [strength], everything, settings.max_iterations, FINE)
    return Probe(weight[:, 0].float(), bias[0].float(), strength, chosen)


def _held_out(labels: np.ndarray, seed: int, validation: np.ndarray | None) -> tuple[np.ndarray | None, str]:
    """The images held out in each problem, bool (P, N), or None if the labels are too few for it, and the words for it."""
    if validation is not None and validation.any() and not validation.all():
        return validation[None], "on the validation split"
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    seed = seed_of(seed, "evaluate", "folds")
    if len(labels) >= FEW * len(counts):
        return (stratified_folds(labels, 10, seed) == 0)[None], "on a tenth of the labels"
    if counts.max() < 2:
        return None, "the middle one: one label a class leaves nothing to choose by"
    folds = min(5, int(counts[counts > 1].min()))
    return stratified_folds(labels, folds, seed) == np.arange(folds)[:, None], f"by {folds}-fold over the labels"


def _best(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, strengths: list[float], held: torch.Tensor, max_iterations: int
) -> float:
    if len(held) == 1:  # leave the held-out images out of the arithmetic too
        train, others = features[~held[0]], features[held[0]]
        used = torch.ones(1, len(train), dtype=torch.bool, device=held.device)
        fits, truth, counted = solve(train, labels[~held[0]], num_classes, strengths, used, max_iterations, ROUGH), labels[held[0]], None
    else:
        others, truth, counted = features, labels, held
        fits = solve(features, labels, num_classes, strengths, ~held, max_iterations, ROUGH)
    correct = []
    for weight, bias in fits:
        right = (torch.einsum("nd,dpc->pnc", others, weight) + bias[:, None]).argmax(dim=2) == truth
        correct.append(int((right if counted is None else right & counted).sum()))
    return strengths[int(np.argmax(correct))]  # the first of equals is the strongest regularisation


def cross_validated(
    features: np.ndarray, labels: np.ndarray, num_classes: int, settings: LinearSettings, seed: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, int]:
    """Scores (N, C) of every labelled image by a probe that was fitted and whose C was chosen without it, and the number of folds.

    The figure for data without test images. NaN rows for classes with a single label: they can only teach. Raises nothing; no fold
    (0) if no class has two labels.
    """
    counts = np.bincount(labels)
    repeated = counts[counts > 1]
    if not len(repeated):
        return np.full((len(labels), num_classes), np.nan), 0
    count = min(5, int(repeated.min()))
    folds = stratified_folds(labels, count, seed_of(seed, "evaluate", "cross-validation"))
    result = np.full((len(labels), num_classes), np.nan)
    for fold in range(count):
        inside = folds != fold
        probe = fit_probe(features[inside], labels[inside], num_classes, settings, seed, device=device)
        result[~inside] = probe.scores(features[~inside])
    return result, count
