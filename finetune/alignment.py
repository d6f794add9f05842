"""Distribution alignment: guesses are scaled so that, on average, classes occur as they should (arXiv:1911.09785, section 3.1)."""

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # of the running mean of guesses; the paper averages its last 128 batches


class DistributionAlignment(nn.Module):
    """Scales probabilities (N, C) by prior / running mean of past ones, and normalises. The running mean is part of the state."""

    mean: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def forward(self, probabilities: Tensor, prior: Tensor | float = 1.0) -> Tensor:
        """`prior` (C,) is how often each class should occur; a number means equally often."""
        self.mean.lerp_(probabilities.mean(dim=0), 1 - MOMENTUM)
        aligned = probabilities * (prior / self.mean.clamp_min(1e-6))
        return aligned / aligned.sum(dim=1, keepdim=True)
