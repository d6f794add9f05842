"""Policies by name: settings -> a pipeline that turns a batch of uint8 images into augmented, normalised float images.

Claim: exact to torchvision's functionals with a draw for each image, at more than 40,000 MoCo v2 views a second on one thread
(32 px RGB, without blur). Proof: tests/test_views.py and benchmarks/views.py, which states the figures.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.config import validate
from modicum.errors import InputError
from modicum.hardware import send
from modicum.views import colour, geometry, randaugment
from modicum.views.draws import draw
from modicum.views.recipes import Recipe, recipe_of

# Floats worked on at once on a CPU: 130 RGB images of 32 px. Fewer cost calls (a microsecond each), more fall out of the cache.
CACHED_VALUES = 400_000


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

    @property
    def _shrinks(self) -> bool:
        """Whether a crop may be larger than its view."""
        return self.size < self.image_size

    def draw(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """The random numbers of `batch` views: CPU tensors, leading dimension `batch`. A rank slices every one, and its images alike."""
        return draw(self.recipe, self.image_size, generator, batch)

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """uint8 `images` (B, C, S, S) on any device, draws of the same B -> normalised float32 (B, C, size, size) there.

        Always float32, also under autocast. On a GPU, allowing TF32 for matrix products loosens crops, warps and colours to about 1e-3.
        """
        batch, device = len(images), images.device
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (self.channels, self.image_size, self.image_size)
        assert all(len(value) == batch for value in draws.values())
        order = self._order(draws)
        if order is not None:
            draws = {key: value[order] for key, value in draws.items()}
            order = send(order, device)
        plan = {key: send(value, device) for key, value in self._plan(draws).items()}
        out = torch.empty((batch, self.channels, self.size, self.size), device=device)
        together = max(1, CACHED_VALUES // (self.channels * self.image_size**2)) if device.type == "cpu" else max(1, batch)
        full = contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
        with full:
            for start in range(0, batch, together):
                part = slice(start, start + together)
                some = images[part] if order is None else images.index_select(0, order[part])
                self._views(some, {key: v[part] for key, v in draws.items()}, {key: v[part] for key, v in plan.items()}, out[part])
        if order is not None:
            back = torch.empty_like(order).scatter_(0, order, torch.arange(batch, device=device))
            out = out.index_select(0, back)
        return out

    def _order(self, draws: dict[str, Tensor]) -> Tensor | None:
        """Positions that bring together the images that turn their hue at the same moment, those without jitter last."""
        if "jitter" not in draws or not self.recipe.hue:
            return None
        last = draws["order"].shape[1]
        return colour.hue_place(draws["order"]).masked_fill_(~draws["jitter"], last).argsort(stable=True)

    def _plan(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the device needs of the draws, computed for the whole batch: a small operation costs as much for 1 image as for 500."""
        plan: dict[str, Tensor] = {}
        if "crop" in draws:
            flip = draws.get("flip", torch.tensor(False))
            mirrored = torch.stack((torch.zeros_like(flip), flip), -1)  # rows, columns
            first, length = draws["crop"].view(-1, 2, 2).unbind(1)
            pixel, place = geometry.crop_places(first, length, self.image_size, self.size, mirrored)
            if self._shrinks:
                plan |= {"pixel": pixel, "place": place}
            else:
                plan |= dict(zip(("low", "high", "share"), geometry.row_taps(pixel[:, 0], place[:, 0]), strict=True))
                plan |= {"pixel": pixel[:, 1], "place": place[:, 1]}
        if "shift" in draws:
            plan["shift"] = draws["shift"]
        if "jitter" in draws:
            plan |= colour.jitter_plan(draws["order"], draws["factors"], self.channels)
        return plan

    def _views(self, images: Tensor, draws: dict[str, Tensor], plan: dict[str, Tensor], out: Tensor) -> None:
        """A part of the batch that fits the cache, in the order of `_order`, into `out` (b, C, size, size)."""
        recipe, device = self.recipe, images.device
        if "crop" in draws:
            x = images.float()
            matrices = geometry.triangle(plan["pixel"], plan["place"], self._shrinks)
            if self._shrinks:
                x = geometry.separable(x.div_(255), *matrices.unbind(1))
            else:
                x = geometry.mix_rows(x, plan["low"], plan["high"], plan["share"])
                x = geometry.mix_columns(x, matrices.div_(255))
        elif "shift" in draws:
            x = geometry.shift(images, plan["shift"], round(recipe.shift * self.image_size)).float().mul_(1 / 255)
        else:
            x = images.float().div_(255)
        if "flip" in draws and "crop" not in draws:  # a crop has flipped already
            _where(draws["flip"], x, lambda part: part.flip(3))
        if "gray" in draws and recipe.gray_first:
            _where(draws["gray"], x, _greyscale)
        if "jitter" in draws:
            x = self._jitter(x, draws, plan)
        if "gray" in draws and not recipe.gray_first:
            _where(draws["gray"], x, _greyscale)
        if "operation" in draws:
            for operation, amount in zip(draws["operation"].unbind(1), draws["amount"].unbind(1), strict=True):
                x = randaugment.apply(x, operation, amount)
        if "blur" in draws:
            sigma = send(draws["sigma"][draws["blur"]], device)
            taps = max(3, round(self.size / 10) // 2 * 2 + 1)
            kernels = geometry.blur_matrices(sigma, taps, self.size)
            _where(draws["blur"], x, lambda part: geometry.separable(part, kernels, kernels))
        if "solarize" in draws:
            _where(draws["solarize"], x, lambda part: colour.solarize(part, 0.5))
        scale = torch.tensor(self.std).reciprocal()[:, None, None]
        torch.sub(x.mul_(send(scale, device)), send(torch.tensor(self.mean)[:, None, None] * scale, device), out=out)
        if "cutout" in draws:  # after normalisation, so that zero is the mean colour
            pixel = (torch.arange(self.size, device=device) + 0.5) / self.size
            covered = ((pixel - send(draws["cutout"], device)[..., None]).abs_() < recipe.cutout / 2).float()
            out.mul_((1 - covered[:, 0, :, None] * covered[:, 1, None, :])[:, None])

    def _jitter(self, x: Tensor, draws: dict[str, Tensor], plan: dict[str, Tensor]) -> Tensor:
        """Consumes `x`. The images with jitter come first where `_order` has sorted them; else they are picked."""
        jitter = draws["jitter"]
        keys = ("mix", "towards_mean", "hue")
        if not self.recipe.hue:
            index = send(jitter.nonzero()[:, 0], x.device)
            picked = {key: plan[key].index_select(0, index) for key in keys}
            return _where(jitter, x, lambda part: colour.color_jitter(part.flatten(2), picked, []))
        if count := int(jitter.sum()):  # read from a CPU tensor
            order = draws["order"][:count]
            ends = torch.bincount(colour.hue_place(order), minlength=order.shape[1]).cumsum(0).tolist()
            jittered = colour.color_jitter(x.flatten(2)[:count], {key: plan[key][:count] for key in keys}, ends).unflatten(2, x.shape[2:])
            return jittered if count == len(x) else torch.cat((jittered, x[count:]))
        return x


def _greyscale(x: Tensor) -> Tensor:
    return colour.greyscale(x.flatten(2))


def _where(chosen: Tensor, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Replaces the `chosen` images (bool (B,), on the CPU) of `x` by their `function`, in place."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        place = send(index, x.device)
        part = x.index_select(0, place)
        x.index_copy_(0, place, function(part).view_as(part))
    return x


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
    if recipe.size and recipe.size > image_size:
        raise InputError(f"{source}: size = {recipe.size} is larger than the images of {image_size} px; choose {image_size} or less.")
    if recipe.crop_scale is not None and recipe.shift:
        raise InputError(f"{source}: a view is cropped or shifted, not both: set crop_scale: null or shift: 0.")
    return Policy(name, recipe, image_size, channels, tuple(mean), tuple(std))
