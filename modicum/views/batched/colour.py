"""What a pixel is worth: colour operations on float images in 0..1, laid out (B, C, P) with P = height x width.

Every image has its own parameters. Brightness, contrast and saturation are one affine map of the channels followed by a clamp, so a
whole batch in which each image does another of the three is one batched 3 x 3 product. Each operation equals torchvision's of
the same name on float images (tests/test_views.py).
"""

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision rounds it
FLAT = 1 / 512  # half a level of a byte: a channel that varies by less is constant, but for roundings of the operations before
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def greyscale(x: Tensor) -> Tensor:
    """(B, 3, P) -> (B, 3, P), all channels equal."""
    red, green, blue = x.unbind(1)
    luma = red.mul(GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
    return luma[:, None].expand_as(x)


def blend_maps(kind: Tensor, factor: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """What `blend` needs for kinds and factors of any shape (...): how channels mix (..., C, C), the share of the mean (..., C)."""
    luma = torch.tensor(GREY if channels == 3 else (1.0,))
    rest = 1 - factor
    matrix = factor[..., None, None] * torch.eye(channels) + (rest * (kind == SATURATION))[..., None, None] * luma
    return matrix, (rest * (kind == CONTRAST))[..., None] * luma


def blend(x: Tensor, matrix: Tensor, towards_mean: Tensor) -> Tensor:
    """clamp(f x + (1 - f) m), where m is black (brightness), the image's mean grey (contrast) or the pixel's grey (saturation).

    `matrix` (B, C, C) and `towards_mean` (B, C) come from `blend_maps`.
    """
    offset = (towards_mean * x.mean(2)).sum(1)[:, None, None]
    return torch.baddbmm(offset, matrix, x).clamp_(0, 1)


def hue_offsets(turn: Tensor) -> Tensor:
    """What `hue_` adds to the hue of a colour to see how far it is from red, green and blue after `turn` (B,): (B, 3).

    Green lies at 2 or -4 sixths of the circle, blue at 4 or -2: that one which keeps the distance below 7, where one fold suffices.
    """
    centre = torch.where(turn[:, None] < 0, torch.tensor((0.0, -4.0, -2.0)), torch.tensor((0.0, 2.0, 4.0)))
    return 6 * turn[:, None] - centre


def hue_(x: Tensor, offset: Tensor) -> None:
    """Turns the hue of `x` (B, 3, P) in place by -0.5..0.5 of the circle, exact in HSV; offset (B, 3) from `hue_offsets`.

    Without the six-fold case distinction, because comparisons cost ten times an addition. With the smallest channel moved to 0 and the
    largest to 1, a colour lies 1 + g + b - r sixths of the circle away from red, on the side of green or of blue;
    and a channel is worth clamp(2 - d, 0, 1) at distance d from its own hue. Distances on the circle are 3 - ||h - centre| - 3|.
    """
    red, green, blue = x.unbind(1)
    low = torch.minimum(red, green)
    chroma = torch.maximum(red, green)
    torch.minimum(low, blue, out=low)
    torch.maximum(chroma, blue, out=chroma).sub_(low)
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-20)).add_(1)
    hue = torch.copysign(distance, green - blue)  # -3..3
    torch.add(hue[:, None], offset[..., None], out=x).abs_().sub_(3).abs_().clamp_(1, 2)
    x.mul_(chroma[:, None]).add_(low.sub_(chroma)[:, None])


def jitter_plan(order: Tensor, factors: Tensor, channels: int) -> dict[str, Tensor]:
    """What `color_jitter` needs, on the CPU, leading dimension B.

    order (B, n): brightness, contrast, saturation and hue, or the same some of them for all, permuted; factors (B, 4).
    """
    kinds = order[order != HUE].view(len(order), -1)
    mix, towards_mean = blend_maps(kinds, factors.gather(1, kinds), channels)
    return {"mix": mix, "towards_mean": towards_mean, "hue": hue_offsets(factors[:, HUE])}


def color_jitter(x: Tensor, plan: dict[str, Tensor], hue_ends: list[int]) -> Tensor:
    """Every image does its own sequence of operations, as torchvision's ColorJitter of one image; `plan` on the device of `x`.

    The images must be sorted by `hue_place`, so that those that turn their hue at the same moment lie together and no pixel is moved for
    it: after p blends those up to `hue_ends[p]` have done so (empty: no hue).
    """
    start = 0
    for place in range(plan["mix"].shape[1] + 1):
        if hue_ends and hue_ends[place] > start:
            hue_(x[start : hue_ends[place]], plan["hue"][start : hue_ends[place]])
            start = hue_ends[place]
        if place < plan["mix"].shape[1]:
            x = blend(x, plan["mix"][:, place], plan["towards_mean"][:, place])
    return x


def hue_place(order: Tensor) -> Tensor:
    """How many operations come before the hue (B,); 0 where there is none."""
    return ((order == HUE) * torch.arange(order.shape[1])).sum(1)


def solarize(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Inverts what is at or above `threshold` (number or (B, 1, 1))."""
    return torch.where(x >= threshold, 1 - x, x)


def posterize(x: Tensor, levels: Tensor) -> Tensor:
    """Keeps 2, 4, ... 256 `levels` (B, 1, 1) of brightness."""
    return (x * levels).floor_().minimum(levels - 1).div_(levels)


def autocontrast(x: Tensor) -> Tensor:
    """Stretches each channel to 0..1; a constant channel stays."""
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    flat = high - low < FLAT
    low, width = low.masked_fill(flat, 0), (high - low).masked_fill(flat, 1)
    return (x - low).div_(width).clamp_(0, 1)


def equalize(x: Tensor) -> Tensor:
    """Flattens each channel's histogram of 256 levels, as PIL does; images under 256 pixels have too few to count and stay."""
    level = (x * (256 - 1e-3)).long()
    count = torch.zeros((*x.shape[:2], 256), device=x.device).scatter_add_(2, level, torch.ones_like(x))
    below = count.cumsum(2) - count
    brightest = level.amax(2, keepdim=True)
    step = ((x.shape[2] - count.gather(2, brightest)) / 255).floor_()
    table = ((below + (step / 2).floor_()) / step.clamp_min(1)).floor_().clamp_(0, 255)
    return torch.where(step > 0, table.gather(2, level), level.to(x.dtype)).div_(255)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """(B, C, S, S) blended with its 3 x 3 smoothing by `factor` (B, 1, 1, 1): 0 smooth, 1 as it is. The outermost pixels stay."""
    above_and_below = (x[..., :-2, :] + x[..., 1:-1, :]).add_(x[..., 2:, :])
    square = (above_and_below[..., :-2] + above_and_below[..., 1:-1]).add_(above_and_below[..., 2:])
    x = x.clone()
    inner = x[..., 1:-1, 1:-1]  # the smoothing weighs the centre 5, the eight around it 1, of 13
    inner.mul_(factor + (1 - factor) * (4 / 13)).add_(square.mul_((1 - factor) / 13))
    return x.clamp_(0, 1)
