"""Which images a step sees: an endless, seeded order that needs no state."""

from functools import lru_cache

import torch
from torch import Tensor

from modicum.randomness import generator


# A step asks for the permutation that the step before it asked for; a few are kept because a run has a few streams.
@lru_cache(maxsize=8)
def _permutation(size: int, keys: tuple[int | str, ...], number: int) -> Tensor:
    return torch.randperm(size, generator=generator(*keys, number))


def positions(size: int, start: int, count: int, *keys: int | str) -> Tensor:
    """Entries `start` to `start + count` of the endless concatenation of permutations of range(size): int64 (count,).

    Permutation n is seeded by `(*keys, n)`, so that a resumed run needs to know only its step. `size` >= 1; `count` may be
    larger than `size`: then images repeat, each equally often but for one.
    """
    assert size >= 1
    assert start >= 0
    assert count >= 0
    pieces = [torch.empty(0, dtype=torch.int64)]
    while count > 0:
        number, offset = divmod(start, size)
        piece = _permutation(size, keys, number)[offset : offset + count]
        pieces.append(piece)
        start += len(piece)
        count -= len(piece)
    return torch.cat(pieces)
