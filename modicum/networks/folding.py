"""Constant norm folded into what it follows: in evaluation mode batch norm is one factor and one summand a channel.

(w * x) normalised is (w s) * x + (beta - mean s) with s = gamma / sqrt(variance + eps): one pass less over every activation.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Pair = tuple[str, str]  # names of a convolution or linear layer, and of the batch norm that reads it


class Folded:
    """What `network`, always in evaluation mode, says of images, from a copy without the batch norms that could be folded.

    Not a module: the copy is in no state and no optimizer, and follows the network's weights and statistics by itself.
    """

    def __init__(self, network: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        """Some `images` (B, C, S, S) show which norm reads which layer; `dtype` is what the folded weights are kept in."""
        self.network, self.dtype = network, dtype
        self.watched = [*network.parameters(), *network.buffers()]
        self.pairs = foldable(network, images)
        self.copy = without_norms(network, self.pairs)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        fold(self.network, self.pairs, self.copy, self.dtype)
        self.version = self._version()

    def _version(self) -> int:
        return sum(tensor._version for tensor in self.watched)  # torch counts what happens to a tensor in place

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.version != self._version():
            self._refresh()
        return self.copy(images)


@torch.no_grad()
def foldable(network: nn.Module, images: Tensor) -> list[Pair]:
    """The pairs of `network`, or none where a layer is read by something else too, or changes its weights as it is called.

    That shows in what the network then says of two of the images (B, C, S, S): in float64 on the CPU, where no rounding decides, so that
    a run that goes on from its state finds what it found at first. On GPUs even fp32 convolutions round their inputs to ten bits.
    A network that cannot compute in float64 is left as it is.
    """
    exact, some = copy.deepcopy(network).cpu().double(), images[:2].cpu().double()
    with torch.autocast("cpu", enabled=False):
        try:
            expected = exact(some)
        except RuntimeError:
            return []
        found = pairs(exact, some)
        folded = without_norms(exact, found)
        fold(exact, found, folded, torch.float64)
        off = torch.linalg.vector_norm(folded(some) - expected)
    return found if off <= 1e-6 * torch.linalg.vector_norm(expected) else []


def without_norms(network: nn.Module, of: list[Pair]) -> nn.Module:
    """A copy of `network` that shares all weights, without the norms in `of`."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    made = copy.deepcopy(network, shared)
    for _, norm in of:
        parent, _, name = norm.rpartition(".")
        behind = nn.Sequential(*made.get_submodule(norm).children())  # some of timm's norms hold their activation
        setattr(made.get_submodule(parent), name, behind)
    return made


def fold(network: nn.Module, of: list[Pair], into: nn.Module, dtype: torch.dtype) -> None:
    """Gives the layers of `into` that stand before the norms in `of` their weights in `network`, with the norms', as `dtype`."""
    for layer_name, norm_name in of:
        layer: Any = network.get_submodule(layer_name)
        norm: Any = network.get_submodule(norm_name)
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        bias = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        folded: Any = into.get_submodule(layer_name)
        folded.weight, folded.bias = (nn.Parameter(value.to(dtype), requires_grad=False) for value in (weight, bias))


def pairs(network: nn.Module, images: Tensor) -> list[Pair]:
    """The batch norms of `network` that read just what a convolution or a linear layer gave."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that nothing else gets its id
    found: list[Pair] = []

    def written(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({id(output): (name, output)})

    def read(name: str) -> Callable[..., None]:
        return lambda module, inputs: found.extend((outputs[key][0], name) for key in [id(inputs[0])] if key in outputs)

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            hooks.append(module.register_forward_hook(written(name)))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(read(name)))
    network(images)
    for hook in hooks:
        hook.remove()
    return found
