"""The weights that a run of stage two can be judged by: the student's last, their average, their average with averaged norm statistics."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

KINDS = ("student", "ema", "eman")


class AveragedStatistics(nn.Module):
    """The moving average of a network's norm statistics, which an EMAN teacher has for its own (arXiv:2101.08482); part of the state."""

    values: Tensor  # (S,): all buffers of floating point, one after another

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_buffer("values", torch.cat([torch.zeros(0), *(buffer.flatten() for buffer in floating(network))]))

    @torch.no_grad()
    def update(self, network: nn.Module, weight: float) -> None:
        """Moves the average by `weight` towards the statistics of `network`."""
        self.values.lerp_(torch.cat([self.values[:0], *(buffer.flatten() for buffer in floating(network))]), weight)

    def write(self, network: nn.Module) -> None:
        """Gives `network` the averaged statistics."""
        buffers = list(floating(network))
        for buffer, values in zip(buffers, self.values.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def floating(network: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in network.buffers() if buffer.is_floating_point())


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one architecture hold the same weights and statistics."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
