"""The direction in which an image changes its prediction most, by power iteration (Miyato 2018, arXiv:1704.03976, section 3.3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from modicum.finetune.losses import consistency
from modicum.hardware import in_full_precision


@in_full_precision
def adversarial_direction(images: Tensor, start: Tensor, network: Callable[[Tensor], Tensor], xi: float, iterations: int) -> Tensor:
    """Unit directions (B, C, S, S) for `images` (B, C, S, S), from random ones: d <- grad of KL(p(x) || p(x + xi d)), normalised.

    The parameters get no gradient from it. All of it is in float32, since bf16 rounds a small step, spread over an image, away.
    """
    with torch.no_grad():
        targets = network(images).float().softmax(dim=1)
    direction = unit(start)
    for _ in range(iterations):
        trial = (xi * direction).requires_grad_()
        (gradient,) = torch.autograd.grad(consistency(network(images + trial).float(), targets, "kl"), trial)
        direction = unit(gradient)
    return direction


def unit(values: Tensor) -> Tensor:
    """Each of (B, ...) scaled to length 1."""
    flat = values.flatten(1)
    largest = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)  # gradients of 1e-20 have squares that vanish
    return torch.nn.functional.normalize(flat / largest, dim=1).view_as(values)
