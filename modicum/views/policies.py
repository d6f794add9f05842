"""Policies by name: settings -> a pipeline that turns a batch of uint8 images into augmented, normalised float images.

Claim: exact to torchvision's functionals with a draw for each image, at more than 100,000 MoCo v2 views a second on one thread of a CPU
(32 px RGB, without blur). Proof: tests/test_views.py, tests/test_fused_views.py and benchmarks/views.py, whose figures are in
benchmarks/README.md.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.config import validate
from modicum.errors import InputError
from modicum.views import batched, fused
from modicum.views.draws import draw
from modicum.views.recipes import Recipe, recipe_of


@dataclass(frozen=True)
class Policy:
    """One kind of view. Without state: the same images and draws give the same views, each depending on its own image and draw only."""

    name: str
    recipe: Recipe
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> int:
        """Side of the views in pixels."""
        return self.recipe.size or self.image_size

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The random numbers of `batch` views: CPU tensors, leading dimension `batch`. A rank slices every one, and its images alike."""
        return draw(self.recipe, self.image_size, generator, batch)

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """uint8 `images` (B, C, S, S) on any device, draws of the same B -> normalised float32 (B, C, size, size) there.

        Always float32, also under autocast.
        """
        batch, device = len(images), images.device
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (self.channels, self.image_size, self.image_size)
        assert all(len(value) == batch for value in draws.values())
        out = torch.empty((batch, self.channels, self.size, self.size), device=device)
        scale = torch.tensor(self.std).reciprocal()
        offset = -torch.tensor(self.mean) * scale
        if device.type == "cpu":
            fused.render(self.recipe, images, draws, scale, offset, out)
        else:
            with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
                batched.render(self.recipe, images, draws, scale, offset, out)
        return out


# Settings that do nothing unless another one is on.
_NEEDS = {
    **dict.fromkeys(("size", "crop_ratio"), "crop_scale"),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), "jitter_probability"),
    **dict.fromkeys(("operations", "enhance", "rotate", "shear", "translate", "zoom"), "num_operations"),
    "gray_first": "gray_probability",
    "blur_sigma": "blur_probability",
}


def build_policy(
    spec: dict[str, Any], *, image_size: int, channels: int, mirror: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> Policy:
    """The policy `spec["name"]`, its defaults adapted to the data (`recipes.recipe_of`), edited by the other keys of `spec`.

    mean and std are of pixels in 0..1, one number a channel. Raises InputError for unknown names and keys, impossible values, edits
    that the data rule out (colour on one channel, flips where `mirror` is false) and edits that would do nothing.
    """
    assert len(mean) == len(std) == channels
    edits = dict(spec)
    name = edits.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"A view policy needs a name, for example {{name: weak}}; {spec} has none.")
    source = f"view policy {name}"
    recipe = validate(Recipe, recipe_of(name, image_size, channels, mirror) | edits, source=source)
    for key in edits:
        if not getattr(recipe, key):
            continue
        if channels == 1 and (key in ("saturation", "hue", "gray_probability") or (key == "operations" and "color" in recipe.operations)):
            raise InputError(f"{source}: {key} = {edits[key]!r} needs colour, but the images have one channel.")
        if key == "flip_probability" and not mirror:
            raise InputError(f"{source}: {key} = {edits[key]!r} mirrors images, but data.mirror is false.")
        if key in _NEEDS and not getattr(recipe, _NEEDS[key]):
            raise InputError(f"{source}: {key} does nothing while {_NEEDS[key]} is not set.")
    if recipe.jitter_probability and not recipe.jitters:
        raise InputError(f"{source}: jitter_probability does nothing while brightness, contrast, saturation and hue are 0.")
    if recipe.size and recipe.crop_scale is None:
        raise InputError(f"{source}: size = {recipe.size} is the side of a crop, and crop_scale is none: set size: null too.")
    if recipe.size and recipe.size > image_size:
        raise InputError(f"{source}: size = {recipe.size} is larger than the images of {image_size} px; choose {image_size} or less.")
    if recipe.crop_scale is not None and recipe.shift:
        raise InputError(f"{source}: a view is cropped or shifted, not both: set crop_scale: null or shift: 0.")
    return Policy(name, recipe, image_size, channels, tuple(mean), tuple(std))
