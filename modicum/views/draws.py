"""The random numbers behind a batch of views: small CPU tensors whose leading dimension is the batch, so that a rank slices them."""

import math
from itertools import permutations

import torch
from torch import Tensor

from modicum.views.randaugment import OPERATIONS, draw_amounts
from modicum.views.recipes import Recipe

ATTEMPTS = 10  # as RandomResizedCrop


def _even(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator).mul_(high - low).add_(low)


def _happens(generator: torch.Generator, probability: float, batch: int) -> Tensor:
    return torch.rand(batch, generator=generator) < probability


def draw_crops(scale: tuple[float, float], ratio: tuple[float, float], side: int, generator: torch.Generator, batch: int) -> Tensor:
    """int64 (batch, 4): top, left, height, width in pixels, of area `scale` x side^2, width / height log-uniform in `ratio`.

    The first of ten draws that fits the image; if none does, the largest centred crop with the ratio nearest to the square.
    """
    area = _even(generator, *scale, batch, ATTEMPTS) * side**2
    shape = _even(generator, math.log(ratio[0]), math.log(ratio[1]), batch, ATTEMPTS).exp_()
    width, height = (area * shape).sqrt_().round_(), (area / shape).sqrt_().round_()
    fits = (width <= side) & (height <= side)
    first = fits.byte().argmax(1, keepdim=True)
    nearest = min(max(1.0, ratio[0]), ratio[1])
    found = fits.any(1)
    width = torch.where(found, width.gather(1, first)[:, 0], round(side * min(1.0, nearest))).long().clamp_min_(1)
    height = torch.where(found, height.gather(1, first)[:, 0], round(side / max(1.0, nearest))).long().clamp_min_(1)
    place = torch.rand(batch, 2, generator=generator)
    place = torch.where(found[:, None], place, torch.full_like(place, 0.5))
    free = side - torch.stack((height, width), 1)
    corner = torch.minimum((place * (free + 1)).long(), free)
    return torch.cat((corner, torch.stack((height, width), 1)), 1)


def draw(recipe: Recipe, side: int, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
    """What `batch` views of images of `side` pixels need; only what the recipe switches on. All from `generator`, on the CPU.

    crop int64 (B, 4) top, left, height, width; shift int64 (B, 2) down, right; flip, jitter, gray, blur, solarize bool (B,);
    order int64 (B, n) of the colour operations that are on, factors float32 (B, 4) of brightness, contrast, saturation, hue;
    operation int64 and amount float32 (B, n); sigma float32 (B,) pixels; cutout float32 (B, 2) centre in sides.
    """
    draws: dict[str, Tensor] = {}
    if recipe.crop_scale is not None:
        draws["crop"] = draw_crops(recipe.crop_scale, recipe.crop_ratio, side, generator, batch)
    if furthest := round(recipe.shift * side):
        draws["shift"] = torch.randint(-furthest, furthest + 1, (batch, 2), generator=generator)
    if recipe.flip_probability:
        draws["flip"] = _happens(generator, recipe.flip_probability, batch)
    if recipe.jitters:
        draws["jitter"] = _happens(generator, recipe.jitter_probability, batch)
        strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        orders = torch.tensor(list(permutations(kind for kind, strength in enumerate(strengths) if strength)))
        draws["order"] = orders[torch.randint(len(orders), (batch,), generator=generator)]
        blends = [_even(generator, max(0, 1 - x), 1 + x, batch) for x in strengths[:3]]
        draws["factors"] = torch.stack((*blends, _even(generator, -recipe.hue, recipe.hue, batch)), 1)
    if recipe.gray_probability:
        draws["gray"] = _happens(generator, recipe.gray_probability, batch)
    if recipe.num_operations:
        known = torch.tensor([OPERATIONS.index(name) for name in recipe.operations])
        operation = known[torch.randint(len(known), (batch, recipe.num_operations), generator=generator)]
        limits = {
            "rotate": recipe.rotate,
            "shear_x": recipe.shear,
            "shear_y": recipe.shear,
            "translate_x": recipe.translate,
            "translate_y": recipe.translate,
            "zoom": recipe.zoom,
        }
        draws |= {"operation": operation, "amount": draw_amounts(operation, limits, recipe.enhance, generator)}
    if recipe.blur_probability:
        draws["blur"] = _happens(generator, recipe.blur_probability, batch)
        draws["sigma"] = _even(generator, *recipe.blur_sigma, batch)
    if recipe.solarize_probability:
        draws["solarize"] = _happens(generator, recipe.solarize_probability, batch)
    if recipe.cutout:
        draws["cutout"] = torch.rand(batch, 2, generator=generator)
    return draws
