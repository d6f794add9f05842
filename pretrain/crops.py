"""Many views of an image, of several sizes."""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor


def by_size(network: Callable[[Tensor], Tensor], views: list[Tensor]) -> list[Tensor]:
    """`network` of each of the views (N, C, S, S), in one pass for neighbours of the same size."""
    outputs: list[Tensor] = []
    for _, same in groupby(views, key=lambda view: view.shape[-1]):
        together = list(same)
        outputs += network(torch.cat(together)).chunk(len(together))
    return outputs
