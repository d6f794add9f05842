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


def balanced_positions(classes: list[Tensor], start: int, count: int, *keys: int | str) -> Tensor:
    """Entries `start` to `start + count` of an endless order in which every class comes equally often but for one: int64 (count,).

    `classes` are the entries of each; within a class each comes equally often but for one. An order of the classes is drawn for
    each of their rounds, so that the round, known from the place, tells which entry of a class's own order comes.
    """
    chosen = positions(len(classes), start, count, *keys)
    rounds = (start + torch.arange(count)) // len(classes)
    found = torch.empty(count, dtype=torch.int64)
    for number in chosen.unique().tolist():
        places = chosen == number  # one a round, so that their rounds follow one another
        first = int(rounds[places][0])
        found[places] = classes[number][positions(len(classes[number]), first, int(places.sum()), *keys, "class", number)]
    return found
