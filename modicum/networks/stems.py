"""Stems for images of 8 to 64 px: the first layers of a network changed so that they keep the resolution.

A changed stem is written down as data, so that a program that has never heard of Modicum can repeat it (checkpoint.py).
"""

from typing import Any

from torch import nn

from modicum.errors import InputError

SMALL_IMAGE = 64  # px; `stem: auto` is small up to here
# Module path -> arguments of nn.Conv2d, or None for nn.Identity.
Stem = dict[str, dict[str, Any] | None]
# The first convolution and, where there is one, the pooling behind it, of the families of timm's convolutional networks.
FIRST_LAYERS = [
    ("conv1", "maxpool"),
    ("conv1.0", "maxpool"),
    ("conv_stem", None),
    ("features.conv0", "features.pool0"),
    ("stem.conv", "stem.pool"),
    ("stem.0", None),
]


def small_stem(network: nn.Module, name: str) -> Stem | None:
    """What to change in `network` for small images: a 3x3 convolution of stride 1, no pooling. None where no stem is recognised.

    As in the CIFAR variants of residual networks (He 2015, arXiv:1512.03385, section 4.2).
    """
    modules = dict(network.named_modules())
    for convolution, pooling in FIRST_LAYERS:
        first = modules.get(convolution)
        if isinstance(first, nn.Conv2d):
            stem: Stem = {
                convolution: {
                    "in_channels": first.in_channels,
                    "out_channels": first.out_channels,
                    "kernel_size": 3,
                    "padding": 1,
                    "bias": first.bias is not None,
                }
            }
            if pooling in modules:
                stem[str(pooling)] = None
            return stem
    return None


def require_small_stem(network: nn.Module, name: str) -> Stem:
    stem = small_stem(network, name)
    if stem is None:
        raise InputError(f"backbone.stem = small is not known for {name}; use backbone.stem=standard, or a residual network.")
    return stem


def apply_stem(network: nn.Module, stem: Stem) -> None:
    for path, arguments in stem.items():
        parent, _, name = path.rpartition(".")
        layer = nn.Identity() if arguments is None else nn.Conv2d(**arguments)
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        setattr(network.get_submodule(parent), name, layer)
