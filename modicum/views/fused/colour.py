"""What a pixel is worth: the operations of batched/colour.py, image by image and in place.

`x` is float32 (B, C, P) in 0..1, `which` int64 (n,) says which images, the parameters are theirs, (n, ...). A loop over pixels is a
function of one image: numba does not vectorise it where the image is a part of an array of the same function, which costs a factor of five.
"""

import numpy as np

from modicum.compiled import Array, compiled, compiled_sum
from modicum.views.batched.colour import CONTRAST, FLAT, GREY, HUE, SATURATION

# A plain number would make float64 of a loop in float32.
ZERO, ONE, TWO, THREE, TINY = map(np.float32, (0, 1, 2, 3, 1e-20))
RED, GREEN, BLUE = map(np.float32, GREY)
FLAT_CHANNEL = np.float32(FLAT)


@compiled
def _clamp(value: np.float32) -> np.float32:
    value = value if value > ZERO else ZERO
    return value if value < ONE else ONE


@compiled_sum
def _mean_grey(image: Array) -> np.float32:
    total, pixels = ZERO, image.shape[1]
    for i in range(pixels):
        total += image[0, i] if len(image) == 1 else RED * image[0, i] + GREEN * image[1, i] + BLUE * image[2, i]
    return total / np.float32(pixels)


@compiled
def _blend(image: Array, kind: int, factor: np.float32) -> None:
    rest = ONE - factor
    if kind == SATURATION:
        for i in range(image.shape[1]):
            red, green, blue = image[0, i], image[1, i], image[2, i]
            towards = rest * (RED * red + GREEN * green + BLUE * blue)
            image[0, i] = _clamp(factor * red + towards)
            image[1, i] = _clamp(factor * green + towards)
            image[2, i] = _clamp(factor * blue + towards)
    else:
        towards = rest * _mean_grey(image) if kind == CONTRAST else ZERO
        for c in range(len(image)):
            for i in range(image.shape[1]):
                image[c, i] = _clamp(factor * image[c, i] + towards)


@compiled
def _worth(hue: np.float32, chroma: np.float32, floor: np.float32) -> np.float32:
    """Of a channel, `hue` sixths of the circle from its own."""
    distance = abs(abs(hue) - THREE)
    distance = distance if distance > ONE else ONE
    distance = distance if distance < TWO else TWO
    return distance * chroma + floor


@compiled
def _hue(image: Array, turn: np.float32) -> None:
    """As batched.colour.hue_, which says why."""
    to_red = np.float32(6) * turn
    to_green = to_red - np.float32(2 if turn >= 0 else -4)
    to_blue = to_red - np.float32(4 if turn >= 0 else -2)
    for i in range(image.shape[1]):
        red, green, blue = image[0, i], image[1, i], image[2, i]
        low = red if red < green else green
        low = low if low < blue else blue
        high = red if red > green else green
        high = high if high > blue else blue
        chroma = high - low
        distance = (green + blue - red - low) / (chroma if chroma > TINY else TINY) + ONE
        hue = distance if green >= blue else -distance
        floor = low - chroma
        image[0, i] = _worth(hue + to_red, chroma, floor)
        image[1, i] = _worth(hue + to_green, chroma, floor)
        image[2, i] = _worth(hue + to_blue, chroma, floor)


@compiled
def jitter(x: Array, which: Array, order: Array, factors: Array) -> None:
    """Every image does the operations of `order` (n, k), each by its own of `factors` (n, 4)."""
    for n, b in enumerate(which):
        for kind in order[n]:
            if kind == HUE:
                _hue(x[b], factors[n, kind])
            else:
                _blend(x[b], kind, factors[n, kind])


@compiled
def blend(x: Array, which: Array, kind: Array, factor: Array) -> None:
    for n, b in enumerate(which):
        _blend(x[b], kind[n], factor[n])


@compiled
def greyscale(x: Array, which: Array) -> None:
    for b in which:
        image = x[b]
        for i in range(image.shape[1]):
            image[0, i] = image[1, i] = image[2, i] = RED * image[0, i] + GREEN * image[1, i] + BLUE * image[2, i]


@compiled
def _solarize(image: Array, threshold: np.float32) -> None:
    for c in range(len(image)):
        for i in range(image.shape[1]):
            image[c, i] = ONE - image[c, i] if image[c, i] >= threshold else image[c, i]


@compiled
def solarize(x: Array, which: Array, threshold: Array) -> None:
    for n, b in enumerate(which):
        _solarize(x[b], threshold[n])


@compiled
def _posterize(image: Array, levels: np.float32) -> None:
    highest, step = levels - ONE, ONE / levels
    for c in range(len(image)):
        for i in range(image.shape[1]):
            level = np.floor(image[c, i] * levels)
            image[c, i] = (level if level < highest else highest) * step


@compiled
def posterize(x: Array, which: Array, levels: Array) -> None:
    for n, b in enumerate(which):
        _posterize(x[b], levels[n])


@compiled
def _autocontrast(image: Array) -> None:
    for c in range(len(image)):
        low = high = image[c, 0]
        for i in range(image.shape[1]):
            low = image[c, i] if image[c, i] < low else low
            high = image[c, i] if image[c, i] > high else high
        if high - low >= FLAT_CHANNEL:
            for i in range(image.shape[1]):
                image[c, i] = _clamp((image[c, i] - low) / (high - low))


@compiled
def autocontrast(x: Array, which: Array) -> None:
    for b in which:
        _autocontrast(x[b])


@compiled
def _equalize(image: Array) -> None:
    table = np.empty(256, np.float32)
    for c in range(len(image)):
        levels = (image[c] * np.float32(256 - 1e-3)).astype(np.int32)
        count = np.bincount(levels, minlength=256)
        step = (len(levels) - count[levels.max()]) // 255
        below = 0
        for level in range(256):
            value = min(255, (below + step // 2) // step) if step > 0 else level
            table[level] = np.float32(value) / np.float32(255)
            below += count[level]
        for i in range(len(levels)):
            image[c, i] = table[levels[i]]


@compiled
def equalize(x: Array, which: Array) -> None:
    for b in which:
        _equalize(x[b])


@compiled
def _normalise(image: Array, scale: Array, offset: Array) -> None:
    for c in range(len(image)):
        by, plus = scale[c], offset[c]
        for i in range(image.shape[1]):
            image[c, i] = image[c, i] * by + plus


@compiled
def normalise(x: Array, scale: Array, offset: Array) -> None:
    """All of `x`; scale and offset (C,)."""
    for b in range(len(x)):
        _normalise(x[b], scale, offset)
