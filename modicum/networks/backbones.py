"""Any of timm's architectures by name, and four small residual networks made for the examples on a CPU."""

import difflib
import inspect
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import Format
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
    # The others' stem is 64 channels wide, wider than their first layers, and takes nearly half of a step of resnet10_tiny.
    "resnet10d_tiny": (
        "resnet18",
        {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 256], "stem_type": "deep", "stem_width": 8, "avg_down": True},
    ),
    # Bottlenecks: 512 features for what resnet10d_tiny's 256 cost, and two fifths of its weights.
    "resnet14d_tiny": (
        "resnet50",
        {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 128], "stem_type": "deep", "stem_width": 8, "avg_down": True},
    ),
}
# What timm's networks raise, by turns, over images that are too small for them.
TOO_SMALL = (ArithmeticError, AssertionError, RuntimeError)


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network again: a timm name, its arguments and what was changed in the stem."""

    name: str
    channels: int
    image_size: int
    arguments: dict[str, Any] = field(default_factory=dict)
    stem: Stem = field(default_factory=dict)
    projector: int = 0  # width of the projector's first layer, where it stays behind the features; 0: it does not

    @property
    def fixed_size(self) -> bool:
        """Whether the network is built for images of this size alone."""
        return "img_size" in self.arguments

    def build(self, num_classes: int = 0) -> Any:
        """timm's network: an nn.Module with attributes of timm's own, which nn.Module does not declare."""
        # Named here, so that the arguments in a foreign config.json cannot fetch weights, or read them from elsewhere.
        random: dict[str, Any] = {"pretrained": False, "checkpoint_path": None}
        network = timm.create_model(self.name, in_chans=self.channels, num_classes=num_classes, **random, **self.arguments)
        take_all_sizes(network)
        apply_stem(network, self.stem)
        if self.projector:
            parent, _, name = classifier_path(network).rpartition(".")
            layers = kept_layer(num_features(network), self.projector)
            if num_classes:
                layers.append(nn.Linear(self.projector, num_classes))
            setattr(network.get_submodule(parent), name, layers)
        return network


class Backbone(nn.Module):
    """Normalised images (B, C, S, S) -> features (B, num_features)."""

    frozen = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.network = architecture.build()
        self.num_features: int = architecture.projector or num_features(self.network)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def drop_paths(self, rate: float) -> bool:
        """Leaves residual blocks out at random in training, the last at `rate`, earlier ones less (arXiv:1603.09382).

        False for a network that cannot. The architecture stays as it is, since weights and features in evaluation do.
        """
        if "drop_path_rate" not in inspect.signature(type(self.network)).parameters:
            return False
        network = replace(self.architecture, arguments={**self.architecture.arguments, "drop_path_rate": rate}).build()
        network.load_state_dict(self.network.state_dict())
        for mine, theirs in zip(network.parameters(), self.network.parameters(), strict=True):
            mine.requires_grad = theirs.requires_grad
        self.network = network
        return True

    def freeze(self) -> None:
        """From now on it has no gradient, and whatever is trained around it, its norms use and keep their running statistics."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode and not self.frozen)
        return self


def num_features(network: Any) -> int:
    """What timm's network gives to its classifier."""
    return getattr(network, "head_hidden_size", network.num_features)


def take_all_sizes(network: nn.Module) -> None:
    """Lets a vision transformer take smaller views than its images: it interpolates its position embedding to their patches."""
    if isinstance(network, VisionTransformer):
        network.dynamic_img_size = True  # type: ignore[misc]  # final for TorchScript alone
        network.patch_embed.strict_img_size = False
        network.patch_embed.flatten = False
        network.patch_embed.output_fmt = Format.NHWC


def classifier_path(network: Any) -> str:
    """Where timm's network keeps its classifier, for example `fc`. Raises ValueError where it has not one, as if made for distillation."""
    classifier = getattr(network, "get_classifier", lambda: None)()
    path = next((name for name, module in network.named_modules() if module is classifier), None)
    if path is None:
        raise ValueError(f"it has {'two classifiers' if isinstance(classifier, tuple) else 'no classifier'}")
    return path


def kept_layer(num_inputs: int, width: int) -> nn.Sequential:
    """The first layer of a projector (`heads.mlp`) that fine-tuning keeps (Chen 2020, arXiv:2006.10029, section 2)."""
    return nn.Sequential(nn.Linear(num_inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))


def create_backbone(settings: BackboneSettings, channels: int, image_size: int, seed: int) -> Backbone:
    """A backbone with random weights drawn from `seed` alone. Raises InputError for an unknown architecture or stem."""
    architecture = choose_architecture(settings, channels, image_size)
    with seeded(seed, "backbone"):
        return Backbone(architecture)


def keep_projector(backbone: Backbone, layer: nn.Sequential) -> Backbone:
    """The backbone with the first layer of a projector, linear, norm and ReLU, behind its features."""
    kept = Backbone(replace(backbone.architecture, projector=len(layer.state_dict()["0.weight"])))
    kept.network.load_state_dict(backbone.network.state_dict() | layer.state_dict(prefix=f"{classifier_path(kept.network)}."))
    return kept


@cache
def choose_architecture(settings: BackboneSettings, channels: int, image_size: int) -> Architecture:
    name, arguments = OURS.get(settings.name, (settings.name, {}))
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OURS, *timm.list_models()], n=3)
        advice = f": did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them."
        raise InputError(f"Unknown architecture backbone.name = {settings.name!r}{advice}")
    small = settings.stem == "small" or (settings.stem == "auto" and image_size <= SMALL_IMAGE)
    with torch.device("meta"):
        if takes_image_size(name):
            patches = {"img_size": image_size, "patch_size": max(2, image_size // 8)}
            fits = small and _builds(name, patches)
            if settings.stem == "small" and not fits:
                raise InputError(f"backbone.stem = small is not known for {name}; use backbone.stem=standard, or a vision transformer.")
            arguments = patches if fits else {"img_size": image_size}
        try:
            network = timm.create_model(name, in_chans=channels, num_classes=2, **arguments)
            classifier_path(network)
        except TOO_SMALL:
            raise _makes_no_features(settings.name, image_size) from None
        except ValueError as error:
            raise InputError(f"backbone.name = {settings.name!r} is not possible: {error}. Choose another one.") from None
    stem: Stem = {}
    if small and "img_size" not in arguments:
        stem = require_small_stem(network, settings.name) if settings.stem == "small" else small_stem(network, settings.name) or {}
    architecture = Architecture(name, channels, image_size, arguments, stem)
    if not takes(architecture, image_size):
        raise _makes_no_features(settings.name, image_size)
    return architecture


def _makes_no_features(name: str, image_size: int) -> InputError:
    return InputError(
        f"backbone.name = {name!r} makes no features of images of {image_size} px: choose a larger data.image_size, or one that its "
        "patches divide, or another backbone."
    )


def _builds(name: str, arguments: dict[str, Any]) -> bool:
    """Whether timm builds this network with these arguments; nothing but trying tells which of its families take smaller patches."""
    try:
        timm.create_model(name, num_classes=0, **arguments)
    except (TypeError, AssertionError, ZeroDivisionError):
        return False
    return True


def takes(architecture: Architecture, size: int) -> bool:
    """Whether the network makes features of images of this side: a deep one leaves nothing of small images. Tried without numbers."""
    with torch.device("meta"), torch.no_grad():
        network = architecture.build().eval()
        try:
            features = network(torch.empty(2, architecture.channels, size, size))
        except TOO_SMALL:
            return False
    return features.shape == (2, num_features(network))


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
