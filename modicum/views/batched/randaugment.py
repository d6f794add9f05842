"""RandAugment on a batch: the images that drew operations of one kind do them together."""

from collections.abc import Callable

import torch
from torch import Tensor

from modicum.hardware import send
from modicum.views.batched import colour
from modicum.views.batched.geometry import affine
from modicum.views.randaugment import BLENDS, OPERATIONS, WARPS, warp_matrices


def _column(amount: Tensor, x: Tensor) -> Tensor:
    return send(amount[:, None, None], x.device)


def _blend(x: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    kind = operation - OPERATIONS.index(BLENDS[0])
    matrix, towards_mean = colour.blend_maps(kind, amount, x.shape[1])
    return colour.blend(x.flatten(2), send(matrix, x.device), send(towards_mean, x.device))


# Each takes images (B, C, S, S) and, on the CPU, their operations and amounts (B,); operations of one line share a kernel.
_KERNELS: tuple[tuple[tuple[str, ...], Callable[[Tensor, Tensor, Tensor], Tensor]], ...] = (
    (WARPS, lambda x, operation, amount: affine(x, send(warp_matrices(operation, amount), x.device))),
    (BLENDS, _blend),
    (("sharpness",), lambda x, operation, amount: colour.sharpness(x, _column(amount, x)[..., None])),
    (("solarize",), lambda x, operation, amount: colour.solarize(x.flatten(2), _column(amount, x))),
    (("posterize",), lambda x, operation, amount: colour.posterize(x.flatten(2), _column(amount, x))),
    (("autocontrast",), lambda x, operation, amount: colour.autocontrast(x.flatten(2))),
    (("equalize",), lambda x, operation, amount: colour.equalize(x.flatten(2))),
)


def apply(x: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """Image i of float `x` (B, C, S, S) in 0..1 does `operation[i]` by `amount[i]` (both (B,), on the CPU), in place."""
    for names, kernel in _KERNELS:
        wanted = torch.tensor([OPERATIONS.index(name) for name in names])
        index = torch.isin(operation, wanted).nonzero()[:, 0]
        if len(index):
            place = send(index, x.device)
            part = x.index_select(0, place)
            x.index_copy_(0, place, kernel(part, operation[index], amount[index]).view_as(part))
    return x
