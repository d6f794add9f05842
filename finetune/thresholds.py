"""From which confidence on a guess counts, or how much: pure functions of what a method has kept count of."""

import math
from typing import Literal

import torch
from torch import Tensor

Annealing = Literal["none", "linear", "log", "exp"]


def flexible(learnt: Tensor, unused: Tensor, threshold: float) -> Tensor:
    """A threshold for each class (C,): lower for those of which few images are `learnt` (C,), all low while most are `unused` ().

    FlexMatch (arXiv:2110.08263), equations 6, 10 and 11 with the convex mapping x / (2 - x).
    """
    share = learnt / torch.maximum(learnt.max(), unused)
    return threshold * share / (2 - share)


def self_adaptive(confidence: Tensor, classes: Tensor) -> Tensor:
    """A threshold for each class (C,): mean `confidence` () times its mean probability in `classes` (C,) over the largest.

    FreeMatch (arXiv:2205.07246), equation 8.
    """
    return confidence * classes / classes.max()


def truncated_gaussian(confidence: Tensor, mean: Tensor, variance: Tensor, sigmas: float) -> Tensor:
    """Weights (N,): 1 from the mean confidence on, below it a Gaussian that `sigmas` of its deviations make one of the spread's.

    SoftMatch (arXiv:2301.10921), equation 6; its code has 2 sigmas.
    """
    below = (confidence - mean).clamp_max(0)
    return torch.exp(-(below**2) * sigmas**2 / (2 * variance.clamp_min(1e-12)))


def shrunk_classes(probabilities: Tensor, threshold: float) -> Tensor:
    """Of probabilities (N, C) the classes kept, 0 or 1 (N, C): the first, and the least likely ones beside which it reaches `threshold`.

    ShrinkMatch (arXiv:2308.06777): classes next to the first are taken out, likeliest first, until what is left leaves no doubt.
    Where nothing is left beside the first, no choice of classes would do.
    """
    ranked, order = probabilities.sort(dim=1, descending=True, stable=True)  # of equal ones the first, as argmax has it
    rest = ranked.flip(1).cumsum(dim=1).flip(1)  # of a class and all less likely ones
    kept = ranked[:, :1] / (ranked[:, :1] + rest) >= threshold
    kept[:, 0] = True
    return torch.zeros_like(probabilities).scatter_(1, order, kept.to(probabilities.dtype))


def signal_annealing(progress: float, num_classes: int, schedule: Annealing) -> float:
    """Probability of the right class above which a label no longer trains: from 1/C to 1 (UDA, arXiv:1904.12848, section 3.2)."""
    released = {
        "none": 1.0,
        "linear": progress,
        "log": 1 - math.exp(-5 * progress),
        "exp": math.exp(5 * (progress - 1)),
    }[schedule]
    return released * (1 - 1 / num_classes) + 1 / num_classes
