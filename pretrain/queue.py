"""The queue of past keys that serve as negatives (He 2019, arXiv:1911.05722)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.randomness import generator


class Queue(nn.Module):
    """A ring of `size` unit vectors (size, D), random at first. It wraps at any batch size and is part of the state."""

    keys: Tensor
    pointer: Tensor
    enqueued: Tensor  # int32 (size,): the step that each key came from; -1: a random one
    steps: Tensor  # int32: steps so far

    def __init__(self, size: int, dimensions: int, seed: int) -> None:
        super().__init__()
        random = torch.randn(size, dimensions, generator=generator(seed, "queue"))
        self.register_buffer("keys", F.normalize(random, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # a tensor: moved without asking the device
        self.register_buffer("enqueued", torch.full((size,), -1, dtype=torch.int32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest rows by `keys` (B, D). To be called after the logits, or each positive would be a negative too."""
        size = len(self.keys)
        keys = keys[-size:].to(self.keys.dtype)
        where = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, where, keys)
        self.enqueued.index_copy_(0, where, self.steps.expand(len(keys)))
        self.pointer.add_(len(keys)).remainder_(size)
        self.steps.add_(1)

    def ages(self) -> Tensor:
        """int32 (size,): steps since each key was made, as the next step meets them: from 1 on. Random ones count from the first step."""
        return self.steps - self.enqueued


def queue_ages(method: nn.Module) -> dict[str, float]:
    """Mean and maximum of the ages of the keys in the queues of `method`, in steps; empty where it has none. Asks the device."""
    ages = [module.ages() for module in method.modules() if isinstance(module, Queue)]
    return {"queue_age": float(torch.cat(ages).float().mean()), "queue_age_max": float(torch.cat(ages).max())} if ages else {}
