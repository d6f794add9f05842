"""Distribution alignment: guesses are scaled so that, on average, classes occur as they should (arXiv:1911.09785, section 3.1)."""

import torch
from torch import Tensor, nn

from modicum import distributed

MOMENTUM = 0.95  # of the running mean of guesses; the paper averages its last 128 batches


class RunningMean(nn.Module):
    """The exponential mean of rows (N, ...) of all ranks. It is part of the state."""

    mean: Tensor

    def __init__(self, start: Tensor, momentum: float) -> None:
        super().__init__()
        self.register_buffer("mean", start)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Takes the rows in and returns the mean as it stands then."""
        return self.mean.lerp_(distributed.gather(rows).mean(dim=0), 1 - self.momentum)


class DistributionAlignment(RunningMean):
    """Scales probabilities (N, C) by prior / running mean of past ones, and normalises."""

    def __init__(self, num_classes: int, momentum: float = MOMENTUM) -> None:
        super().__init__(torch.full((num_classes,), 1 / num_classes), momentum)

    @torch.no_grad()
    def forward(self, probabilities: Tensor, prior: Tensor | float = 1.0) -> Tensor:
        """`prior` (C,) is how often each class should occur; a number means equally often."""
        aligned = probabilities * (prior / super().forward(probabilities).clamp_min(1e-6))
        return aligned / aligned.sum(dim=1, keepdim=True)
