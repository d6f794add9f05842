"""Figures from predictions: accuracies, their bootstrap intervals, who is taken for whom."""

import numpy as np

COVERAGE = 0.95


def top_correct(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Whether the true class is among the `count` best, bool (N,), for `scores` (N, C), -inf meaning "never named".

    Of equal scores the lower class id ranks first, as in argmax, so that `count` 1 agrees with the predictions.
    """
    true = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    ahead = (scores > true) | ((scores == true) & earlier)
    return (ahead.sum(axis=1) < count) & np.isfinite(true[:, 0])


def interval(correct: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `correct`, bool (N,), over the images.

    Drawing N of N images with replacement and counting the right ones is a binomial draw, so no resample is ever written
    out. If every image is right, every resample is, and the interval is [1, 1]: it cannot show what N images do not.
    """
    count = len(correct)
    means = np.random.default_rng(seed).binomial(count, correct.mean(), size=resamples) / count
    return _percentiles(means)


def difference_interval(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of mean(first) - mean(second), bool (N,) each, of the same images: resampled in pairs.

    Pairing removes what both have in common, the difficulty of the images drawn. An image adds -1, 0 or 1, so a resample is
    one multinomial draw.
    """
    count = len(first)
    wins, losses = np.mean(first & ~second), np.mean(~first & second)
    drawn = np.random.default_rng(seed).multinomial(count, [wins, losses, max(0.0, 1 - wins - losses)], size=resamples)
    return _percentiles((drawn[:, 0] - drawn[:, 1]) / count)


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (C, C): row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracies(confusion: np.ndarray) -> list[float | None]:
    """Share of each true class that is predicted rightly; None for a class without a test image."""
    counts = confusion.sum(axis=1)
    return [float(right / count) if count else None for right, count in zip(confusion.diagonal(), counts, strict=True)]


def most_confused(confusion: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the pairs that are mixed up most often, worst first."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:limit]
    pairs = [(*divmod(int(position), len(errors)), int(errors.flat[position])) for position in order]
    return [pair for pair in pairs if pair[2] > 0]
