"""Where a pixel comes from: the operations of batched/geometry.py, image by image, into `out` or in place.

`images` are uint8 (B, C, S, S), `out` and `x` float32 (B, C, T, T) in 0..1; `which` int64 (n,) says which images of `x`, the parameters
are theirs, (n, ...).
"""

import math

import numpy as np

from modicum.compiled import Array, compiled

# A plain number would make float64 of a loop in float32; a signed place is counted from the end where negative, which numba looks up.
ZERO, HALF, ONE, TO_ONE = map(np.float32, (0, 0.5, 1, 1 / 255))
HERE, NEXT, PAIR, THREE, FOUR = map(np.uint64, range(5))


@compiled
def _taps(length: int, size: int, mirrored: bool, start: Array, weight: Array) -> np.uint64:
    """Which of `length` pixels make each of `size` places, written to uint64 `start` (size,), and by which `weight` (K, size), 1 in sum.

    Triangles as wide as a pixel, or as a place where it shrinks (antialiasing, as `resize(antialias=True)`). Returns how many pixels a
    place may need, an even number: 2 unless it shrinks.
    """
    scale = length / size
    support = max(scale, 1.0)
    needed = 2 * math.ceil(support)
    for i in range(size):
        place = ((size - 1 - i if mirrored else i) + 0.5) * scale
        lowest = max(0, math.floor(place - 0.5 - support) + 1)
        total = 0.0
        for k in range(needed):
            share = max(0.0, 1 - abs(lowest + k + 0.5 - place) / support) if lowest + k < length else 0.0
            weight[k, i] = share
            total += share
        for k in range(needed):
            weight[k, i] /= total
        start[i] = lowest
    return np.uint64(needed)


@compiled
def _crop(image: Array, box: Array, mirrored: bool, out: Array, start: Array, weight: Array, line: Array, wide: Array) -> None:
    """Two pixels make a place, or where it shrinks four, in one loop: over a dozen places another costs more than what it adds."""
    top, left, height, width = box
    size = out.shape[2]
    down = _taps(height, size, False, start[0], weight[0])
    across = _taps(width, size, mirrored, start[1], weight[1])
    for c in range(len(image)):
        for row in range(height):
            pixels = image[c, top + row, left:]
            for i in range(width):
                line[i] = pixels[i]
            if across == PAIR:
                for i in range(size):
                    at = start[1, i]
                    wide[row, i] = weight[1, 0, i] * line[at] + weight[1, 1, i] * line[at + NEXT]
            else:
                for i in range(size):
                    at = start[1, i]
                    first = weight[1, 0, i] * line[at] + weight[1, 1, i] * line[at + NEXT]
                    wide[row, i] = first + weight[1, 2, i] * line[at + PAIR] + weight[1, 3, i] * line[at + THREE]
            for k in range(FOUR, across, PAIR):
                for i in range(size):
                    at = start[1, i] + k
                    wide[row, i] += weight[1, k, i] * line[at] + weight[1, k + NEXT, i] * line[at + NEXT]
        for row in range(size):
            at = start[0, row]
            one, other = weight[0, 0, row] * TO_ONE, weight[0, 1, row] * TO_ONE
            if down == PAIR:
                for i in range(size):
                    out[c, row, i] = one * wide[at, i] + other * wide[at + NEXT, i]
            else:
                third, fourth = weight[0, 2, row] * TO_ONE, weight[0, 3, row] * TO_ONE
                for i in range(size):
                    first = one * wide[at, i] + other * wide[at + NEXT, i]
                    out[c, row, i] = first + third * wide[at + PAIR, i] + fourth * wide[at + THREE, i]
            for k in range(FOUR, down, PAIR):
                _add(out[c, row], wide[at + k], weight[0, k, row] * TO_ONE, wide[at + k + NEXT], weight[0, k + NEXT, row] * TO_ONE)


@compiled
def crop(images: Array, boxes: Array, mirrored: Array, out: Array) -> None:
    """Cuts boxes (B, 4) out, resizes them and mirrors those that are `mirrored` (B,): columns first, then rows."""
    side, size = images.shape[3], out.shape[3]
    taps = 2 * math.ceil(max(1.0, side / size))
    start, weight = np.empty((2, size), np.uint64), np.empty((2, taps, size), np.float32)
    line, wide = np.zeros(side + taps, np.float32), np.zeros((side + taps, size), np.float32)
    for b in range(len(images)):
        _crop(images[b], boxes[b], mirrored[b], out[b], start, weight, line, wide)


@compiled
def _add(target: Array, one: Array, by: np.float32, other: Array, and_by: np.float32) -> None:
    for i in range(len(target)):
        target[i] += by * one[i] + and_by * other[i]


@compiled
def _reflect(index: int, side: int) -> int:
    """Positions up to one side outside, mirrored about the centre of the edge pixel: -1 -> 1, side -> side - 2."""
    return (side - 1) - abs((side - 1) - abs(index))


@compiled
def shift(images: Array, offsets: Array, furthest: int, mirrored: Array, out: Array) -> None:
    """What lies `offsets` (B, 2), down and right, `furthest` at most, from each pixel, filled by reflection; then mirrors it or not."""
    channels, side = images.shape[1], images.shape[3]
    last = np.uint64(side - 1)
    line = np.empty(side + 2 * furthest, np.float32)
    middle, after = line[furthest:], line[furthest + side :]
    for b in range(len(images)):
        down, right = offsets[b]
        piece = line[furthest + right :]
        for c in range(channels):
            for row in range(side):
                pixels, target = images[b, c, _reflect(row + down, side)], out[b, c, row]
                for i in range(side):
                    middle[i] = np.float32(pixels[i]) * TO_ONE
                for i in range(furthest):
                    line[furthest - 1 - i] = middle[i + 1]
                    after[i] = middle[side - 2 - i]
                if mirrored[b]:
                    for i in range(HERE, np.uint64(side)):
                        target[i] = piece[last - i]
                else:
                    for i in range(side):
                        target[i] = piece[i]


@compiled
def _between(value: np.float32, highest: np.float32) -> np.float32:
    value = value if value > ZERO else ZERO
    return value if value < highest else highest


@compiled
def warp(x: Array, which: Array, matrices: Array) -> None:
    """Output-to-input maps (n, 2, 3), bilinear, black from outside. Beyond a black frame all is as black as on its outermost pixels."""
    channels, side = x.shape[1], x.shape[3]
    framed, farthest = np.zeros((channels, side + 3, side + 3), np.float32), np.float32(side + 1)
    for n, b in enumerate(which):
        framed[:, 1 : side + 1, 1 : side + 1] = x[b]
        to_right, to_bottom = matrices[n, 0], matrices[n, 1]
        for row in range(side):
            down = (row + 0.5) * (2 / side) - 1
            left = np.float32((to_right[0] * (1 / side - 1) + to_right[1] * down + to_right[2] + 1) * (side / 2) + 0.5)
            top = np.float32((to_bottom[0] * (1 / side - 1) + to_bottom[1] * down + to_bottom[2] + 1) * (side / 2) + 0.5)
            for column in range(side):
                from_left = _between(left + to_right[0] * np.float32(column), farthest)
                from_top = _between(top + to_bottom[0] * np.float32(column), farthest)
                i, k = np.uint32(from_left), np.uint32(from_top)
                share, lower = from_left - np.float32(i), from_top - np.float32(k)
                after, below = i + np.uint32(1), k + np.uint32(1)
                for c in range(channels):
                    one = framed[c, k, i] + share * (framed[c, k, after] - framed[c, k, i])
                    other = framed[c, below, i] + share * (framed[c, below, after] - framed[c, below, i])
                    x[b, c, row, column] = one + lower * (other - one)


@compiled
def blur(x: Array, which: Array, sigma: Array, taps: int) -> None:
    """Gaussian of `sigma` pixels (n,) cut to an odd number of `taps`, reflected at the edges."""
    channels, side, reach = x.shape[1], x.shape[3], taps // 2
    across, line = np.empty((side, side), np.float32), np.empty(side + 2 * reach, np.float32)
    for n, b in enumerate(which):
        weight = np.exp(-HALF * (np.arange(-reach, reach + 1).astype(np.float32) / sigma[n]) ** 2)
        weight /= weight.sum()
        for c in range(channels):
            for row in range(side):
                for i in range(side + 2 * reach):
                    line[i] = x[b, c, row, _reflect(i - reach, side)]
                across[row] = weight[reach] * line[reach : reach + side]
                for k in range(reach):
                    _add(across[row], line[k:], weight[k], line[taps - 1 - k :], weight[k])
            for row in range(side):
                x[b, c, row] = weight[reach] * across[row]
                for k in range(1, reach + 1):
                    above, below = across[_reflect(row - k, side)], across[_reflect(row + k, side)]
                    _add(x[b, c, row], above, weight[reach - k], below, weight[reach - k])


@compiled
def sharpness(x: Array, which: Array, factor: Array) -> None:
    """Blends with the 3 x 3 smoothing by `factor` (n,): 0 smooth, 1 as it is. The outermost pixels stay."""
    channels, side = x.shape[1], x.shape[3]
    before = np.empty((side, side), np.float32)
    for n, b in enumerate(which):
        centre, around = factor[n] + (ONE - factor[n]) * np.float32(4 / 13), (ONE - factor[n]) * np.float32(1 / 13)
        for c in range(channels):
            before[:] = x[b, c]
            for row in range(side):
                for i in range(side):
                    value = before[row, i]
                    if 0 < row < side - 1 and 0 < i < side - 1:
                        value = centre * value
                        for k in range(row - 1, row + 2):
                            value += around * (before[k, i - 1] + before[k, i] + before[k, i + 1])
                    x[b, c, row, i] = _between(value, ONE)


@compiled
def cutout(x: Array, centre: Array, half: float) -> None:
    """Sets to 0 what is less than `half` a square's side, in sides of the image, from `centre` (B, 2), of all of `x`."""
    side = x.shape[3]
    for b in range(len(x)):
        for row in range(side):
            if abs((row + 0.5) / side - centre[b, 0]) < half:
                for i in range(side):
                    if abs((i + 0.5) / side - centre[b, 1]) < half:
                        x[b, :, row, i] = ZERO
