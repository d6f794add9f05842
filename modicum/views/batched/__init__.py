"""Views on any device: whole batches at a time, by torch. What an operation is, and which of torchvision's it equals, is said here.

A CPU has loops of its own for the same steps (modicum/views/fused), since it is memory that it waits for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modicum.hardware import send
from modicum.views.batched import colour, geometry, randaugment
from modicum.views.recipes import Recipe


def render(recipe: Recipe, images: Tensor, draws: dict[str, Tensor], scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """Writes views of uint8 `images` (B, C, S, S), times `scale` plus `offset` (both (C,)), to float32 `out` (B, C, T, T).

    All but images and out lie on the CPU. On a GPU, allowing TF32 for matrix products loosens crops, warps and colours to about 1e-3.
    """
    order = _order(recipe, draws)
    if order is not None:
        draws = {key: value[order] for key, value in draws.items()}
        images = images.index_select(0, send(order, images.device))
    x = _changed(recipe, images, draws, out.shape[3])
    device = x.device
    x = x.mul_(send(scale[:, None, None], device)).add_(send(offset[:, None, None], device))
    if "cutout" in draws:  # after normalisation, so that zero is the mean colour
        side = out.shape[3]
        pixel = (torch.arange(side, device=device) + 0.5) / side
        covered = ((pixel - send(draws["cutout"], device)[..., None]).abs_() < recipe.cutout / 2).float()
        x.mul_((1 - covered[:, 0, :, None] * covered[:, 1, None, :])[:, None])
    if order is None:
        out.copy_(x)
    else:
        out.index_copy_(0, send(order, device), x)


def _order(recipe: Recipe, draws: dict[str, Tensor]) -> Tensor | None:
    """Positions that bring together the images that turn their hue at the same moment, those without jitter last."""
    if "jitter" not in draws or not recipe.hue:
        return None
    last = draws["order"].shape[1]
    return colour.hue_place(draws["order"]).masked_fill_(~draws["jitter"], last).argsort(stable=True)


def _changed(recipe: Recipe, images: Tensor, draws: dict[str, Tensor], size: int) -> Tensor:
    """The views, float (B, C, size, size) in 0..1, of images in the order of `_order`."""
    device, side = images.device, images.shape[3]
    if "crop" in draws:
        x = _crop(images.float(), draws["crop"], draws.get("flip", torch.tensor(False)), size)
    elif "shift" in draws:
        x = geometry.shift(images, send(draws["shift"], device), round(recipe.shift * side)).float().mul_(1 / 255)
    else:
        x = images.float().div_(255)
    if "flip" in draws and "crop" not in draws:  # a crop has flipped already
        _where(draws["flip"], x, lambda part: part.flip(3))
    if "gray" in draws and recipe.gray_first:
        _where(draws["gray"], x, _greyscale)
    if "jitter" in draws:
        x = _jitter(x, draws, by_place=bool(recipe.hue))
    if "gray" in draws and not recipe.gray_first:
        _where(draws["gray"], x, _greyscale)
    if "operation" in draws:
        for operation, amount in zip(draws["operation"].unbind(1), draws["amount"].unbind(1), strict=True):
            x = randaugment.apply(x, operation, amount)
    if "blur" in draws:
        kernels = geometry.blur_matrices(send(draws["sigma"][draws["blur"]], device), recipe.blur_taps(size), size)
        _where(draws["blur"], x, lambda part: geometry.separable(part, kernels, kernels))
    if "solarize" in draws:
        _where(draws["solarize"], x, lambda part: colour.solarize(part, 0.5))
    return x


def _crop(x: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Bytes as floats (B, C, S, S) -> (B, C, size, size) in 0..1."""
    side, device = x.shape[3], x.device
    mirrored = torch.stack((torch.zeros_like(flip), flip), -1)  # rows, columns
    first, length = boxes.view(-1, 2, 2).unbind(1)
    pixel, place = geometry.crop_places(first, length, side, size, mirrored)
    if size < side:  # a crop may be larger than its view
        matrices = geometry.triangle(send(pixel, device), send(place, device), shrinks=True)
        return geometry.separable(x.div_(255), *matrices.unbind(1))
    rows = (send(taps, device) for taps in geometry.row_taps(pixel[:, 0], place[:, 0]))
    columns = geometry.triangle(send(pixel[:, 1], device), send(place[:, 1], device), shrinks=False)
    return geometry.mix_columns(geometry.mix_rows(x, *rows), columns.div_(255))


def _jitter(x: Tensor, draws: dict[str, Tensor], by_place: bool) -> Tensor:
    """Consumes `x`. The images with jitter come first where `_order` has sorted them; else they are picked."""
    jitter, device = draws["jitter"], x.device
    order, factors = draws["order"][jitter], draws["factors"][jitter]
    if not len(order):
        return x
    plan = {key: send(value, device) for key, value in colour.jitter_plan(order, factors, x.shape[1]).items()}
    if not by_place:
        return _where(jitter, x, lambda part: colour.color_jitter(part.flatten(2), plan, []))
    ends = torch.bincount(colour.hue_place(order), minlength=order.shape[1]).cumsum(0).tolist()
    count = len(order)
    jittered = colour.color_jitter(x.flatten(2)[:count], plan, ends).unflatten(2, x.shape[2:])
    return jittered if count == len(x) else torch.cat((jittered, x[count:]))


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
