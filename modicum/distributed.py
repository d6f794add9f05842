"""Ranks of one run under torchrun: identities on one process."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> None:
    """Joins the ranks that torchrun started; nothing where it did not."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(size: int) -> slice:
    """This rank's part of a global batch of `size` images."""
    mine = size // world_size()
    return slice(rank() * mine, (rank() + 1) * mine)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every rank's loss depends on every rank's rows
        return gradient.chunk(world_size())[rank()]


def gather(tensor: Tensor) -> Tensor:
    """The rows (B, ...) of all ranks in rank order (world B, ...), with gradient to the rank they came from."""
    return _Gather.apply(tensor) if world_size() > 1 else tensor
