"""Losses of stage two: pure functions of logits or probabilities (N, C)."""

import math

import torch.nn.functional as F
from torch import Tensor


def pseudo_label(logits: Tensor, guesses: Tensor, used: Tensor) -> Tensor:
    """Cross-entropy of logits (N, C) to guessed classes (N,), averaged over all N with those not `used` (N,) as zeros.

    FixMatch (arXiv:2001.07685), equation 4.
    """
    return (F.cross_entropy(logits, guesses, reduction="none") * used).mean()


def consistency(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Distance of predictions, given as logits (N, C), to target probabilities (N, C).

    `mse`: mean over images and classes of the squared difference of probabilities; it saturates where the two disagree most.
    `kl`: mean over images of KL(target || prediction) with the target held fixed; it does not.
    """
    if kind == "mse":
        return F.mse_loss(logits.softmax(dim=1), targets)
    return F.kl_div(logits.log_softmax(dim=1), targets.detach(), reduction="batchmean")


def ramp_up(progress: float, length: float) -> float:
    """exp(-5 (1 - r)^2) with r = progress / length up to 1 (Laine 2017, arXiv:1610.02242, section 3)."""
    r = min(1.0, progress / length) if length else 1.0
    return math.exp(-5 * (1 - r) ** 2)


def linear_ramp(progress: float, start: float, end: float) -> float:
    """0 up to `start`, then in a straight line to 1 at `end` (Lee 2013, equation 16)."""
    return 1.0 if progress >= end else max(0.0, (progress - start) / (end - start))
