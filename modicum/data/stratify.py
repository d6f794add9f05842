"""Shares of a whole by class, exact to the image."""

import numpy as np

from modicum.errors import InputError
from modicum.randomness import seed_of


def apportion(total: int, counts: np.ndarray, minimum: np.ndarray, maximum: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """`total` shared in proportion to `counts`, int64 (C,), each within its bounds, by largest remainder; ties go by chance.

    The bounds must admit `total`: sum of minimum <= total <= sum of maximum.
    """
    assert minimum.sum() <= total <= maximum.sum()
    quotas = total * counts / counts.sum()
    shares = np.clip(np.floor(quotas).astype(np.int64), minimum, maximum)
    tie = draws.permutation(len(counts))
    while shares.sum() != total:
        missing = total - shares.sum()
        step = 1 if missing > 0 else -1
        free = np.flatnonzero(shares < maximum if step > 0 else shares > minimum)
        order = free[np.lexsort((tie[free], step * (shares - quotas)[free]))]
        shares[order[: abs(missing)]] += step
    return shares


def draw_by_class(labels: np.ndarray, shares: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Sorted int64 positions among `labels`: `shares[c]` random ones of each class c."""
    chosen = [draws.permutation(np.flatnonzero(labels == number))[:share] for number, share in enumerate(shares)]
    assert [len(part) for part in chosen] == list(shares)
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def hold_out(labels: np.ndarray, fraction: float, setting: str, *keys: int | str) -> np.ndarray:
    """Sorted int64 positions of a stratified `fraction`, rounded up, of the labelled images (label >= 0), seeded by `keys`.

    Every class keeps at least one image. Raises InputError, naming `setting`, where no class can spare any.
    """
    counts = np.bincount(labels[labels >= 0])
    spare = np.maximum(counts - 1, 0)
    # Rounded before rounding up, or 0.07 of 100 would be 8.
    total = min(int(np.ceil(round(fraction * counts.sum(), 6))), int(spare.sum()))
    if total == 0:
        raise InputError(f"{setting}={fraction} holds out no image: no class has two labelled ones.")
    draws = np.random.default_rng(seed_of(*keys))
    return draw_by_class(labels, apportion(total, counts, np.zeros_like(counts), spare, draws), draws)


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold 0..folds-1 for each label, every class spread evenly, at random; -1 (never held out) for a class with one label."""
    random = np.random.default_rng(seed)
    result = np.full(len(labels), -1)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            result[rows] = np.arange(len(rows)) % folds
    return result
