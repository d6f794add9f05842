"""Batch norm over the images of all ranks: what one process would compute, in value, gradient and running statistics."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modicum import distributed


class SyncBatchNorm(_BatchNorm):
    """Stands in for `norm`, with its parameters, buffers and their names, so that a state of the one fits the other.

    On GPUs it is torch's `nn.SyncBatchNorm`, which refuses tensors on a CPU; elsewhere the ranks gather mean and variance of their
    equal parts of the batch, with gradient. On one process, and in evaluation mode, it is `norm` itself to the last bit.
    """

    running_mean: Tensor  # timm's networks track statistics, by a constant momentum
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    process_group = None  # all ranks; this and the two below are what torch's forward asks of its layer
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(self, norm: _BatchNorm) -> None:
        self.__dict__ = dict(norm.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            y = super().forward(x)
        elif x.is_cuda:
            y = nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type]
        else:
            y = self._over_ranks(x.float()).to(x.dtype)
        for layer in self.children():  # dropout and activation, which some of timm's norms hold
            y = layer(y)
        return y

    def _over_ranks(self, x: Tensor) -> Tensor:
        over = [dimension for dimension in range(x.ndim) if dimension != 1]
        moments = distributed.gather(torch.stack(torch.var_mean(x, over, correction=0))[None])  # (ranks, 2, C)
        variances, means = moments.unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if self.track_running_stats:
            count = len(moments) * x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                self.num_batches_tracked.add_(1)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        y = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


def synchronise(module: nn.Module) -> None:
    """Puts a `SyncBatchNorm` in the place of every batch norm below `module`; parameters stay the same objects."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SyncBatchNorm(child))
