"""Any of timm's architectures by name, and two small residual networks made for the examples on a CPU."""

import difflib
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.networks.stems import SMALL_IMAGE, Stem, apply_stem, require_small_stem, small_stem
from modicum.randomness import seeded
from modicum.settings import BackboneSettings

# Ours are timm's own networks with other arguments, so that timm alone can load them again.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet10_small": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}),
    "resnet10_tiny": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}),
}


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network again: a timm name, its arguments and what was changed in the stem."""

    name: str
    channels: int
    image_size: int
    arguments: dict[str, Any] = field(default_factory=dict)
    stem: Stem = field(default_factory=dict)

    @property
    def fixed_size(self) -> bool:
        """Whether the network is built for images of this size alone."""
        return "img_size" in self.arguments

    def build(self, num_classes: int = 0) -> Any:
        """timm's network: an nn.Module with attributes of timm's own, which nn.Module does not declare."""
        network = timm.create_model(self.name, in_chans=self.channels, num_classes=num_classes, **self.arguments)
        apply_stem(network, self.stem)
        return network


class Backbone(nn.Module):
    """Normalised images (B, C, S, S) -> features (B, num_features)."""

    frozen = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.network = architecture.build()
        self.num_features: int = getattr(self.network, "head_hidden_size", self.network.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def freeze(self) -> None:
        """From now on it has no gradient, and whatever is trained around it, its norms use and keep their running statistics."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode and not self.frozen)
        return self


def create_backbone(settings: BackboneSettings, channels: int, image_size: int, seed: int) -> Backbone:
    """A backbone with random weights drawn from `seed` alone. Raises InputError for an unknown architecture or stem."""
    architecture = choose_architecture(settings, channels, image_size)
    with seeded(seed, "backbone"):
        return Backbone(architecture)


def choose_architecture(settings: BackboneSettings, channels: int, image_size: int) -> Architecture:
    name, arguments = OURS.get(settings.name, (settings.name, {}))
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OURS, *timm.list_models()], n=3)
        advice = f": did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them."
        raise InputError(f"Unknown architecture backbone.name = {settings.name!r}{advice}")
    small = settings.stem == "small" or (settings.stem == "auto" and image_size <= SMALL_IMAGE)
    with torch.device("meta"):
        if takes_image_size(name):
            patch = {"patch_size": max(2, image_size // 8)} if small else {}
            arguments = {**arguments, "img_size": image_size, **patch}
        network = timm.create_model(name, in_chans=channels, num_classes=0, **arguments)
    stem: Stem = {}
    if small and "img_size" not in arguments:
        stem = require_small_stem(network, settings.name) if settings.stem == "small" else small_stem(network, settings.name) or {}
    return Architecture(name, channels, image_size, arguments, stem)


def view_step(architecture: Architecture) -> int | None:
    """What the side of any view must be a multiple of: a vision transformer's patch. None where only the image's own size will do."""
    if not architecture.fixed_size:
        return 1
    with torch.device("meta"):
        network = architecture.build()
    return network.patch_embed.patch_size[0] if isinstance(network, VisionTransformer) else None


def names_layers(architecture: Architecture) -> bool:
    """Whether timm knows the order of the network's layers, for learning rates that differ from one to the next."""
    with torch.device("meta"):
        return hasattr(architecture.build(), "group_matcher")


def takes_image_size(name: str) -> bool:
    """Whether timm builds this network for one fixed image size (vision transformers)."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return known is not None and known.fixed_input_size
