"""Where a pixel comes from: crop-and-resize, shift, flip and blur, row by row and column by column, and affine maps.

A separable resampling of an image is `rows @ image @ columns.T`. Each image has its own pair of matrices, so one batched product does
different crops of every image at once, exactly as the antialiased resize of one image would. Where nothing shrinks, a row of the
result is a mixture of two rows of the image: gathering those beats a product with mostly zeros.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resamples every channel of float `x` (B, C, S, S) by `rows` and `columns` (B, T, S) -> (B, C, T, T)."""
    return torch.matmul(rows[:, None], mix_columns(x, columns))


def mix_columns(x: Tensor, columns: Tensor) -> Tensor:
    """(B, C, T, S) times `columns` (B, U, S) -> (B, C, T, U)."""
    batch, channels, height, side = x.shape
    return torch.bmm(x.reshape(batch, channels * height, side), columns.transpose(1, 2)).view(batch, channels, height, -1)


def mix_rows(x: Tensor, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """Rows `low` and `high` (int64 (B, T)) of `x` (B, C, S, S), mixed with `share` (B, T) of the latter: (B, C, T, S)."""
    batch, channels, side, _ = x.shape
    first = torch.arange(0, batch * channels * side, side, device=x.device).view(batch, channels, 1)
    flat = x.view(-1, side)
    above = flat.index_select(0, (first + low[:, None]).flatten()).view(batch, channels, -1, side)
    below = flat.index_select(0, (first + high[:, None]).flatten()).view_as(above)
    return above.add_(below.sub_(above).mul_(share[:, None, :, None]))


def row_taps(pixel: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `mix_rows` needs for the rows of `triangle(pixel, place)`, where nothing shrinks."""
    source = place - pixel[..., :1]
    low = source.floor()
    return low.long(), source.ceil().long(), source - low


def triangle(pixel: Tensor, place: Tensor, shrinks: bool) -> Tensor:
    """Matrices (B, ..., T, S) that weigh source `pixel` (B, ..., S) for output `place` (B, ..., T) by 1 - distance.

    Where it shrinks, the weights of a place need not add up to one, and are divided by their sum.
    """
    weight = (pixel[..., None, :] - place[..., None]).abs_().neg_().add_(1).clamp_min_(0)
    return weight.div_(weight.sum(-1, keepdim=True)) if shrinks else weight


def _counted(count: int, mirrored: Tensor) -> Tensor:
    """Output positions (..., count), counted from the right where `mirrored` (...) is true."""
    places = torch.arange(count, device=mirrored.device).float()
    return places + mirrored[..., None].float() * (count - 1 - 2 * places)


def _reflect(index: Tensor, side: int) -> Tensor:
    """Positions up to one side outside, mirrored about the centre of the edge pixel: -1 -> 1, side -> side - 2."""
    return (side - 1) - ((side - 1) - index.abs()).abs()


def crop_places(first: Tensor, length: Tensor, side: int, size: int, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts `length` pixels from `first` on (any shape) of `side` and resizes them to `size`: pixel and place of `triangle`.

    Bilinear; where it shrinks, the unit is the width of the triangle (antialiasing, as `resize(antialias=True)`).
    """
    length, first = length[..., None].float(), first[..., None].float()
    scale = length / size
    place = (_counted(size, mirrored) + 0.5) * scale  # within the crop, where float32 is most precise
    pixel = torch.arange(side, device=first.device) - first
    if size >= side:  # no crop shrinks: where one of the two taps would lie outside, the other has it all
        return pixel + 0.5, place.clamp_min_(0.5).minimum(length - 0.5)
    support = scale.clamp_min(1.0)
    far = (pixel < 0) | (pixel >= length)
    return ((pixel + 0.5) / support).masked_fill_(far, -9.0), place / support


def shift(x: Tensor, offset: Tensor, furthest: int) -> Tensor:
    """What lies `offset` (int64 (B, 2), down and right, `furthest` at most) from each pixel of `x` (B, C, S, S), filled by reflection.

    A row of the result is a piece of a row that was lengthened at both ends, and is copied as one run of memory.
    """
    batch, channels, side, _ = x.shape
    wide = torch.cat((x[..., 1 : furthest + 1].flip(3), x, x[..., side - furthest - 1 : -1].flip(3)), 3)
    length = wide.shape[3]
    rows = _reflect(torch.arange(side, device=x.device) + offset[:, :1], side)
    first = torch.arange(0, batch * channels * side * length, side * length, device=x.device).view(batch, channels, 1)
    start = first + (rows * length + furthest + offset[:, 1:])[:, None]
    pieces = wide.flatten().as_strided((wide.numel() - side + 1, side), (1, 1))  # all that begin somewhere
    return pieces.index_select(0, start.flatten()).view(x.shape)


def blur_matrices(sigma: Tensor, taps: int, side: int) -> Tensor:
    """Gaussian of `sigma` pixels (float (B,)) cut to an odd number of `taps`, reflected at the edges: (B, side, side)."""
    tap = torch.arange(taps, device=sigma.device) - taps // 2
    weight = (-0.5 * (tap / sigma[:, None]) ** 2).softmax(-1)
    source = _reflect(torch.arange(side, device=sigma.device)[:, None] + tap, side)
    spread = (source[..., None] == torch.arange(side, device=sigma.device)).float()  # (side, taps, side), the same for every image
    return torch.einsum("bt,itj->bij", weight, spread)


def affine(x: Tensor, matrix: Tensor) -> Tensor:
    """Moves the pixels of `x` (B, C, S, S); `matrix` (B, 2, 3) maps output to input positions, centre 0, edges at -1 and 1.

    Bilinear; what comes from outside is black.
    """
    batch, _, side, _ = x.shape
    centre = (torch.arange(side, device=x.device) + 0.5) * (2 / side) - 1
    across = centre[:, None] * matrix[:, None, :, 0] + matrix[:, None, :, 2]  # (B, S, 2): what the column adds to a position
    down = matrix[:, :, 1].repeat(1, side)  # what a row adds, for both coordinates of all its pixels
    position = torch.stack((centre, torch.ones_like(centre)), 1) @ torch.stack((down, across.flatten(1)), 1)
    grid = position.view(batch, side, side, 2)  # ten times as fast as `affine_grid`
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
