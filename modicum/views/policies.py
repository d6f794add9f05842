"""Policies by name: settings -> a pipeline that turns a batch of uint8 images into augmented, normalised float images.

Claim: exact to torchvision's functionals with a draw for each image, at more than 40,000 MoCo v2 views a second on one thread
(32 px RGB, without blur). Proof: tests/test_views.py and benchmarks/views.py, which states the figures.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.config import validate
from modicum.errors import InputError
from modicum.views import colour, geometry, randaugment
from modicum.views.draws import draw
from modicum.views.recipes import Recipe, recipe_of

# Floats worked on at once on a CPU: 162 RGB images of 32 px. Fewer cost calls (a microsecond each), more fall out of the cache.
CACHED_VALUES = 500_000


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
        """uint8 `images` (B, C, S, S) on any device, draws of the same B -> normalised float32 (B, C, size, size) there, channels last.

        Always float32, also under autocast. On a GPU, allowing TF32 for matrix products loosens crops and colours to about 1e-3.
        """
        batch, device = len(images), images.device
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (self.channels, self.image_size, self.image_size)
        assert all(len(value) == batch for value in draws.values())
        full = contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
        out = torch.empty((batch, self.size, self.size, self.channels), device=device)
        order = self._order(draws)
        together = max(1, CACHED_VALUES // (self.channels * self.image_size**2)) if device.type == "cpu" else max(1, batch)
        with full:
            for start in range(0, batch, together):
                part = slice(start, start + together)
                if order is None:
                    views = self._views(images[part], {key: value[part] for key, value in draws.items()})
                else:
                    some = order[part]
                    views = self._views(images.index_select(0, some.to(device)), {key: value[some] for key, value in draws.items()})
                torch.stack(views.unbind(1), -1, out=out[part])
        if order is not None:
            out = out.flatten(1).index_select(0, order.argsort().to(device)).view_as(out)
        return out.permute(0, 3, 1, 2)

    def _order(self, draws: dict[str, Tensor]) -> Tensor | None:
        """Positions that bring together the images that turn their hue at the same moment, those without jitter last."""
        if "jitter" not in draws or not self.recipe.hue:
            return None
        last = draws["order"].shape[1]
        return colour.hue_place(draws["order"]).masked_fill_(~draws["jitter"], last).argsort(stable=True)

    def _views(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """A part of the batch that fits the cache, in the order of `_order`: (b, C, size, size), normalised."""
        recipe, device = self.recipe, images.device
        x = self._resample(images, draws)
        if "gray" in draws and recipe.gray_first:
            _where(draws["gray"], x, _greyscale)
        if "jitter" in draws:
            self._jitter(x, draws)
        if "gray" in draws and not recipe.gray_first:
            _where(draws["gray"], x, _greyscale)
        if "operation" in draws:
            for operation, amount in zip(draws["operation"].unbind(1), draws["amount"].unbind(1), strict=True):
                x = randaugment.apply(x, operation, amount)
        if "blur" in draws:
            sigma = draws["sigma"][draws["blur"]].to(device)
            taps = max(3, round(self.size / 10) // 2 * 2 + 1)
            kernels = geometry.blur_matrices(sigma, taps, self.size)
            _where(draws["blur"], x, lambda part: geometry.separable(part, kernels, kernels))
        if "solarize" in draws:
            _where(draws["solarize"], x, lambda part: colour.solarize(part, 0.5))
        scale = torch.tensor(self.std).reciprocal()[:, None, None]
        x.mul_(scale.to(device)).sub_((torch.tensor(self.mean)[:, None, None] * scale).to(device))
        if "cutout" in draws:  # after normalisation, so that zero is the mean colour
            pixel = (torch.arange(self.size, device=device) + 0.5) / self.size
            covered = (pixel - draws["cutout"].to(device)[..., None]).abs_() < recipe.cutout / 2
            x.masked_fill_((covered[:, 0, :, None] & covered[:, 1, None, :])[:, None], 0)
        return x

    def _resample(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """uint8 (b, C, S, S) -> float (b, C, size, size) in 0..1: crop or shift, and flip, in one pair of products."""
        device, side = images.device, self.image_size
        x = images.float()
        flip = draws["flip"] if "flip" in draws else torch.zeros(len(x), dtype=torch.bool)
        mirrored = torch.cat((torch.zeros_like(flip), flip)).to(device)
        if "crop" in draws:
            first, length = draws["crop"].view(-1, 2, 2).permute(1, 2, 0).flatten(1).to(device)  # rows of all images, then columns
            matrices = geometry.crop_matrices(first, length, side, self.size, mirrored)
        elif "shift" in draws:
            matrices = geometry.shift_matrices(draws["shift"].t().flatten().to(device), side, mirrored)
        else:
            return _where(flip, x.div_(255), lambda part: part.flip(3))
        rows, columns = matrices.view(2, len(x), self.size, side)
        return geometry.separable(x, rows, columns.div_(255))

    def _jitter(self, x: Tensor, draws: dict[str, Tensor]) -> None:
        """In place. The images with jitter come first where `_order` has sorted them; else they are picked."""
        jitter, order, factors = draws["jitter"], draws["order"], draws["factors"]
        if not self.recipe.hue:
            _where(jitter, x, lambda part: colour.color_jitter(part.flatten(2), order[jitter], factors[jitter]))
        elif count := int(jitter.sum()):  # read from a CPU tensor
            flat = x.flatten(2)[:count]
            flat.copy_(colour.color_jitter(flat, order[:count], factors[:count]))


def _greyscale(x: Tensor) -> Tensor:
    return colour.greyscale(x.flatten(2))


def _where(chosen: Tensor, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Replaces the `chosen` images (bool (B,), on the CPU) of `x` by their `function`, in place."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        place = index.to(x.device)
        part = x.index_select(0, place)
        x.index_copy_(0, place, function(part).view_as(part))
    return x


@functools.cache
def _keep_freed_memory() -> None:
    """On Linux: glibc hands freed blocks of megabytes back to the system, and paging them in again costs half as much as making the views.

    Once it has seen a block of nearly 32 MB freed (whose pages are never touched), it keeps what is smaller. Process-wide, harmless.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


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
    _keep_freed_memory()
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
    if recipe.crop_scale is not None and recipe.shift:
        raise InputError(f"{source}: a view is cropped or shifted, not both: set crop_scale: null or shift: 0.")
    return Policy(name, recipe, image_size, channels, tuple(mean), tuple(std))
