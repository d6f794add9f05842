"""The queue of past keys that serve as negatives (He 2019, arXiv:1911.05722)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.randomness import generator


class Queue(nn.Module):
    """A ring of `size` unit vectors (size, D), random at first. It wraps at any batch size and is part of the state."""

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dimensions: int, seed: int) -> None:
        super().__init__()
        random = torch.randn(size, dimensions, generator=generator(seed, "queue"))
        self.register_buffer("keys", F.normalize(random, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # a tensor: moved without asking the device

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest rows by `keys` (B, D). To be called after the logits, or each positive would be a negative too."""
        size = len(self.keys)
        keys = keys[-size:].to(self.keys.dtype)
        where = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, where, keys)
        self.pointer.add_(len(keys)).remainder_(size)
