"""RandAugment on a batch: the images that drew operations of one kind do them together, as in batched/randaugment.py."""

from collections.abc import Callable

import numpy as np

from modicum.compiled import Array
from modicum.views.fused import colour, geometry
from modicum.views.randaugment import BLENDS, OPERATIONS, WARPS

FIRST_BLEND = OPERATIONS.index(BLENDS[0])


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


# Each takes images (B, C, S, S), which of them (n,), and their operations, amounts (n,) and, for warps, matrices (n, 2, 3).
_KERNELS: tuple[tuple[tuple[str, ...], Callable[[Array, Array, Array, Array, Array], None]], ...] = (
    (WARPS, lambda x, which, operation, amount, matrix: geometry.warp(x, which, matrix)),
    (BLENDS, lambda x, which, operation, amount, matrix: colour.blend(_flat(x), which, operation - FIRST_BLEND, amount)),
    (("sharpness",), lambda x, which, operation, amount, matrix: geometry.sharpness(x, which, amount)),
    (("solarize",), lambda x, which, operation, amount, matrix: colour.solarize(_flat(x), which, amount)),
    (("posterize",), lambda x, which, operation, amount, matrix: colour.posterize(_flat(x), which, amount)),
    (("autocontrast",), lambda x, which, operation, amount, matrix: colour.autocontrast(_flat(x), which)),
    (("equalize",), lambda x, which, operation, amount, matrix: colour.equalize(_flat(x), which)),
)
_KIND = np.array([next((k for k, (names, _) in enumerate(_KERNELS) if name in names), -1) for name in OPERATIONS])


def apply(x: Array, operation: Array, amount: Array, matrix: Array) -> None:
    """Image i of float32 `x` (B, C, S, S) in 0..1 does `operation[i]` by `amount[i]` (both (B,)), in place; `matrix[i]` is of warps."""
    kind = _KIND[operation]
    for k, (_, kernel) in enumerate(_KERNELS):
        which = np.flatnonzero(kind == k)
        if len(which):
            kernel(x, which, operation[which], amount[which], matrix[which])
