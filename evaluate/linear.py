"""Linear probe: multinomial logistic regression, with the regularisation chosen without test labels.

The objective is scikit-learn's, C * sum of cross-entropies + |W|^2 / 2 with a free intercept, so that C means the same. (For two
classes scikit-learn writes one weight vector where this has two; its C is then half of this one.)
"""

from dataclasses import dataclass

import numpy as np
import torch

from modicum.data.stratify import stratified_folds
from modicum.hardware import has_fast_bf16
from modicum.randomness import seed_of
from modicum.settings import LinearSettings
from modicum.softmax_regression import FINE, ROUGH, SoftmaxRegression, worthwhile_precision

FEW = 20  # labels a class under which nothing is held out: the choice is made by k-fold


@dataclass(frozen=True)
class Probe:
    weight: torch.Tensor  # (D, C)
    bias: torch.Tensor  # (C,)
    strength: float  # the C that was chosen
    chosen: str  # how, for people

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits (N, C) of standardised features (N, D)."""
        return (torch.from_numpy(features).to(self.weight) @ self.weight + self.bias).cpu().numpy()


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
    device = torch.device(device)
    inputs = torch.from_numpy(features).to(device)
    inputs = inputs.to(worthwhile_precision(inputs))
    regression = SoftmaxRegression(inputs, torch.tensor(labels, device=device), num_classes)
    held, chosen = _held_out(labels, seed, validation)
    if held is None:
        strength, start = strengths[(len(strengths) - 1) // 2], None
    else:
        precision = torch.bfloat16 if inputs.dtype == torch.float32 and has_fast_bf16(device) else None
        apart = torch.from_numpy(held).to(device)
        strength, start = _best(regression, strengths, apart, ROUGH[inputs.dtype], settings.max_iterations, precision)
    everything = torch.ones(1, len(labels), dtype=torch.bool, device=device)
    [solution] = regression.solve(torch.tensor([strength]).to(inputs), everything, FINE[inputs.dtype], settings.max_iterations, start)
    weight, bias = regression.linear_map(solution)
    return Probe(weight.float(), bias.float(), strength, chosen)


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
    regression: SoftmaxRegression,
    strengths: list[float],
    held: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    precision: torch.dtype | None,
) -> tuple[float, torch.Tensor]:
    """The C whose problems, one a row of `held`, name most of the images held out rightly, and their mean solution (1, C, R + 1)."""
    folds = len(held)
    each = torch.tensor(strengths).repeat_interleave(folds).to(regression.features)
    solutions = regression.solve(each, ~held.repeat(len(strengths), 1), tolerance, max_iterations, precision=precision)
    solutions = solutions.unflatten(0, (-1, folds))
    correct = [
        sum(int((regression.scores(one, out).argmax(dim=1) == regression.labels[out]).sum()) for one, out in zip(own, held, strict=True))
        for own in solutions
    ]
    best = int(np.argmax(correct))  # the first of equals is the strongest regularisation
    return strengths[best], solutions[best].mean(dim=0, keepdim=True)


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
