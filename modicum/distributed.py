"""Ranks of one run under torchrun: identities on one process."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def start(device: torch.device) -> None:
    """Joins the ranks that torchrun started; nothing where it did not."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device if device.index is not None else int(os.environ["LOCAL_RANK"]))
        # Tensors on the CPU go by gloo in any case: what ranks agree on (`anywhere`) then needs no waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leaves the other ranks. A process that ends without this may abort, its connections' threads still running."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def announced_ranks() -> int:
    """The ranks that the launcher speaks of, before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(size: int) -> slice:
    """This rank's part of a global batch of `size` images, which the ranks divide."""
    mine, rest = divmod(size, world_size())
    assert not rest, f"{size} images cannot be dealt evenly to {world_size()} ranks"
    return slice(rank() * mine, (rank() + 1) * mine)


def drawn_for_all(size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """What `draw` gives this rank's `size` images, as a part of what it gives the images of all: their number moves nothing."""
    everyone = size * world_size()
    return draw(everyone)[share(everyone)]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank must ask at the same step."""
    if world_size() == 1:
        return flag
    told = torch.tensor(float(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


class Parallel(DistributedDataParallel):
    """Averages the gradients of all ranks. Before each step all take the norm statistics of rank 0, which are those that are saved.

    Torch would send every other buffer too, though queues, memories and what is kept an image are the same on all ranks by themselves:
    33 MB a step for the queue of MoCo v2.
    """

    def __init__(self, module: nn.Module) -> None:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer releases of torch have another word for it
            super().__init__(module, broadcast_buffers=False)
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]

    def forward(self, *inputs: Any) -> Any:
        if self.statistics:
            together = torch.cat([buffer.flatten() for buffer in self.statistics])
            dist.broadcast(together, 0)
            for buffer, values in zip(self.statistics, together.split([buffer.numel() for buffer in self.statistics]), strict=True):
                buffer.copy_(values)
        return super().forward(*inputs)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # what is given may be another tensor's gradient, too
        dist.all_reduce(gradient)  # every rank's loss depends on every rank's rows
        return gradient.chunk(world_size())[rank()]


def gather(tensor: Tensor) -> Tensor:
    """The rows (B, ...) of all ranks in rank order (world B, ...), with gradient to the rank they came from."""
    return _Gather.apply(tensor) if world_size() > 1 else tensor
