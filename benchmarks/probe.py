"""The linear probe, from features to a validated accuracy, beside the usual ways. `python -m benchmarks probe`

Claim: 60,000 features of 512 dimensions, 10 classes, six strengths of regularisation from which a tenth of the labels chooses: at least 20
times as fast as scikit-learn's LogisticRegression swept over the same strengths with the same choice, at equal or better accuracy on
10,000 other rows (within a tenth of a per cent of it: they decide no finer).

scikit-learn takes minutes and is run once; where its sweep passes a minute and a half, the strengths left are taken to need what the
largest strength measured did, which is too little, since they need more the larger they are: the ratio is too small rather than too
large. Its last fit, on all labels, is measured. Its limit of iterations is ours. The other peer is 100 epochs of SGD on the cached
features at one learning rate, without a choice.

On the pixels of Fashion-MNIST, which a linear probe finds hard, nothing is taken for granted: scikit-learn fits once, with the strength
that ours chose, and that alone is set against our whole sweep.
"""

import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.features import CLASSES, clustered
from benchmarks.pairs import Row, Seconds, compared, device_clock, take_turns
from modicum.data.sources import load_images
from modicum.errors import InputError
from modicum.evaluate.linear import fit_probe
from modicum.evaluate.raw_pixels import raw_pixels
from modicum.hardware import choose_hardware
from modicum.record import warn
from modicum.settings import DataSettings, Experiment, LinearSettings
from modicum.whitening import standardise

PATIENCE = 90.0  # seconds of scikit-learn's sweep that are measured
SGD, SKLEARN, ONCE = "SGD, 100 epochs", "scikit-learn, same strengths", "scikit-learn, our strength alone"
BAR, EQUAL = 20.0, 0.999


def run(quick: bool) -> Iterator[Row]:
    count, others, dimensions = (600, 200, 32) if quick else (60_000, 10_000, 512)
    features, labels = clustered(count + others, dimensions)
    yield from _beside_sweep_and_sgd(standardise(features, np.arange(count)), labels, count, 1 if quick else 3)
    try:
        images = load_images(DataSettings(name="fashion_mnist"))
    except InputError as reason:
        warn(f"The probe of pixels is left out: {reason}")
        return
    count, others = (600, 200) if quick else (len(images.labels) - 10_000, 10_000)
    pixels, _ = raw_pixels(images.pixels[torch.arange(count + others)])
    yield from _beside_one_fit(standardise(pixels, np.arange(count)), images.labels[: count + others], count, 1 if quick else 2)


def _beside_sweep_and_sgd(features: np.ndarray, labels: np.ndarray, count: int, rounds: int) -> Iterator[Row]:
    train, test, truth, answers = features[:count], features[count:], labels[:count], labels[count:]
    device, settings = choose_hardware(Experiment()).device, LinearSettings()
    accuracy: dict[str, float] = {}

    def ours() -> None:
        probe = fit_probe(train, truth, CLASSES, settings, seed=0, device=device)
        accuracy["ours"] = float((probe.scores(test).argmax(axis=1) == answers).mean())

    def by_sgd() -> None:
        layer = sgd(torch.from_numpy(train).to(device), torch.from_numpy(truth).to(device))
        with torch.no_grad():
            accuracy[SGD] = float((layer(torch.from_numpy(test).to(device)).argmax(dim=1).cpu().numpy() == answers).mean())

    seconds: Seconds = take_turns({"ours": ours, SGD: by_sgd}, rounds, device_clock(device), warm_up=False, once=[SGD])
    swept, measured, accuracy[SKLEARN] = sklearn_sweep(train, truth, test, answers, settings)
    of = len(settings.strengths)
    name = SKLEARN if measured == of else f"{SKLEARN} ({measured} of {of} measured)"
    seconds[name], accuracy[name] = [swept], accuracy.pop(SKLEARN)
    yield from _rows(f"{count:,} x {features.shape[1]}", seconds, accuracy, name)


def _beside_one_fit(features: np.ndarray, labels: np.ndarray, count: int, rounds: int) -> Iterator[Row]:
    train, test, truth, answers = features[:count], features[count:], labels[:count], labels[count:]
    device, settings = choose_hardware(Experiment()).device, LinearSettings()
    accuracy: dict[str, float] = {}
    strength = 0.0

    def ours() -> None:
        nonlocal strength
        probe = fit_probe(train, truth, CLASSES, settings, seed=0, device=device)
        strength, accuracy["ours"] = probe.strength, float((probe.scores(test).argmax(axis=1) == answers).mean())

    def by_sklearn() -> None:
        accuracy[ONCE] = float((_fit(train, truth, strength, settings).predict(test) == answers).mean())

    seconds = take_turns({"ours": ours, ONCE: by_sklearn}, rounds, device_clock(device), warm_up=False, once=[ONCE])
    yield from _rows(f"Fashion-MNIST pixels, {count:,} x {features.shape[1]}", seconds, accuracy)


def _rows(setting: str, seconds: Seconds, accuracy: dict[str, float], judged: str | None = None) -> Iterator[Row]:
    """Of seconds and of accuracies; `judged` is the candidate that has bars."""
    yield from compared("probe", setting, seconds, bars={judged: BAR} if judged else {})
    for candidate, share in accuracy.items():
        ratio = None if candidate == "ours" else accuracy["ours"] / share
        yield Row("probe", f"{setting}, accuracy", candidate, 100 * share, 100 * share, "%", ratio, EQUAL if candidate == judged else None)


def sklearn_sweep(
    train: np.ndarray, truth: np.ndarray, test: np.ndarray, answers: np.ndarray, settings: LinearSettings
) -> tuple[float, int, float]:
    """Seconds of the sweep and of the fit that follows, how many strengths were measured, and the accuracy of the best of those."""
    held = np.random.default_rng(0).permutation(len(truth)) < len(truth) // 10
    fits: list[tuple[float, LogisticRegression]] = []
    spent: list[float] = []
    for strength in sorted(settings.strengths):
        began = time.perf_counter()
        fitted = _fit(train[~held], truth[~held], strength, settings)
        fits.append((float((fitted.predict(train[held]) == truth[held]).mean()), fitted))
        spent.append(time.perf_counter() - began)
        if sum(spent) > PATIENCE:
            break
    measured = len(spent)
    spent += spent[-1:] * (len(settings.strengths) - measured)
    _, best = max(fits, key=lambda fit: fit[0])  # the first of equals is the strongest regularisation
    began = time.perf_counter()
    accuracy = float((_fit(train, truth, best.C, settings).predict(test) == answers).mean())
    spent.append(time.perf_counter() - began)
    return sum(spent), measured, accuracy


def _fit(features: np.ndarray, labels: np.ndarray, strength: float, settings: LinearSettings) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit of iterations is ours, too
        return LogisticRegression(C=strength, max_iter=settings.max_iterations).fit(features, labels)


def sgd(features: torch.Tensor, labels: torch.Tensor, epochs: int = 100, batch: int = 256) -> nn.Linear:
    layer = nn.Linear(features.shape[1], CLASSES).to(features.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(features), device=features.device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[part]), labels[part]).backward()
            optimizer.step()
        schedule.step()
    return layer
