"""All randomness of a run: generators seeded by what they are for, so that nothing random has to be saved or restored."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*keys: int | str) -> int:
    """One 63-bit seed from any tuple of names and numbers; equal tuples give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A fresh CPU generator for `keys`, for example `generator(seed, "pretrain", step, "view", 1)`."""
    return torch.Generator().manual_seed(seed_of(*keys))


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Within, torch's global CPU generator, which initialises layers, is seeded by `keys`; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(*keys))
        yield
