"""Mixup: images and targets of pairs, blended by shares drawn on the CPU, where Beta has a seed (arXiv:1710.09412)."""

import numpy as np
import torch
from torch import Tensor

from modicum.randomness import seed_of


class Mixing:
    """Partners and shares for `size` images, seeded by `keys`: x -> share x + (1 - share) x of the partner."""

    def __init__(self, size: int, alpha: float, device: torch.device, *keys: int | str, keep: bool = False) -> None:
        """`alpha` of Beta(alpha, alpha); with `keep` the image itself has the larger share (MixMatch, arXiv:1905.02249, equation 9)."""
        draws = np.random.default_rng(seed_of(*keys, "mixup"))
        shares = draws.beta(alpha, alpha, size)
        self.shares = torch.tensor(np.maximum(shares, 1 - shares) if keep else shares, dtype=torch.float32).to(device)
        self.partners = torch.tensor(draws.permutation(size)).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """`values` (size, ...), images or targets alike."""
        shares = self.shares.view(-1, *[1] * (values.ndim - 1)).to(values.dtype)
        return values[self.partners].lerp(values, shares)
