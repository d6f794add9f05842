"""Batch norms over another batch than the process's own: that of all ranks, or one part of it after another."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modicum import distributed


class _StandIn(_BatchNorm):
    """In the place of `norm`, with its parameters, buffers and their names, so that a state of the one fits the other."""

    running_mean: Tensor  # timm's networks track statistics, by a constant momentum
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # two dimensions or more

    def __init__(self, norm: _BatchNorm) -> None:
        self.__dict__ = dict(norm.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalised(x) if self.training else _BatchNorm.forward(self, x)
        for layer in self.children():  # dropout and activation, which some of timm's norms hold
            y = layer(y)
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GroupedBatchNorm(_StandIn):
    """Takes a batch in training as `groups` equal parts, one after another, each with statistics of its own: what as many calls would do.

    The network around it sees the batch at once. In compiled code so does the norm, by reductions that the compiler joins with its
    neighbours; elsewhere they would be a dozen passes over memory.
    """

    groups = 1

    def _normalised(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return _BatchNorm.forward(self, x)
        if torch.compiler.is_compiling():
            return self._at_once(x)
        return torch.cat([_BatchNorm.forward(self, part) for part in x.chunk(self.groups)])

    def _at_once(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(0, (self.groups, -1))  # (groups, B / groups, C, ...)
        variance, mean = torch.var_mean(parts, [1, *range(3, parts.ndim)], correction=0, keepdim=True)
        if self.track_running_stats:
            count = x.numel() / x.shape[1] / self.groups
            with torch.no_grad():
                kept = (1 - self.momentum) ** torch.arange(self.groups - 1, -1, -1, device=x.device)[:, None]
                for running, found in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                    running.mul_((1 - self.momentum) ** self.groups).add_((self.momentum * kept * found.flatten(1)).sum(0))
                self.num_batches_tracked.add_(self.groups)
        shape = [1, 1, -1, *[1] * (x.ndim - 2)]
        y = (parts - mean) * (variance + self.eps).rsqrt()
        y = y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y
        return y.flatten(0, 1).to(x.dtype)


class SyncBatchNorm(_StandIn):
    """Over the images of all ranks: what one process would compute, in value, gradient and running statistics.

    On GPUs it is torch's `nn.SyncBatchNorm`, which refuses tensors on a CPU; elsewhere the ranks gather mean and variance of their
    equal parts of the batch, with gradient. On one process, and in evaluation mode, it is `norm` itself to the last bit.
    """

    process_group = None  # all ranks; this and the line below are what torch's forward asks of its layer
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def _normalised(self, x: Tensor) -> Tensor:
        if distributed.world_size() == 1:
            return _BatchNorm.forward(self, x)
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type]
        return self._over_ranks(x.float()).to(x.dtype)

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


def replace_norms(module: nn.Module, kind: type[SyncBatchNorm] | type[GroupedBatchNorm]) -> None:
    """Puts one of `kind` in the place of every batch norm below `module`; parameters stay the same objects."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, kind(child))
