"""Where a pixel comes from: crop-and-resize, shift, flip and blur as two batched matrix products, and affine maps.

A separable resampling of an image is `rows @ image @ columns.T`. Each image has its own pair of matrices, so one batched product does
different crops of every image at once, exactly as the antialiased resize of one image would (on two cores 32 px RGB takes 6
microseconds an image; the matrices are mostly zeros, which at 224 px costs more than it should on a CPU and nothing on a GPU).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resamples every channel of float `x` (B, C, S, S) by `rows` and `columns` (B, T, S) -> (B, C, T, T)."""
    batch, channels, side, _ = x.shape
    x = torch.bmm(x.reshape(batch, channels * side, side), columns.transpose(1, 2)).view(batch, channels, side, -1)
    return torch.matmul(rows[:, None], x)


def _places(count: int, mirrored: Tensor | None, device: torch.device) -> Tensor:
    """Output positions (1 or B, count), counted from the right where `mirrored` (B,) is true."""
    places = torch.arange(count, device=device)[None]
    return places if mirrored is None else places + mirrored[:, None] * (count - 1 - 2 * places)


def _reflect(index: Tensor, side: int) -> Tensor:
    """Positions up to one side outside, mirrored about the centre of the edge pixel: -1 -> 1, side -> side - 2."""
    return (side - 1) - ((side - 1) - index.abs()).abs()


def crop_matrices(first: Tensor, length: Tensor, side: int, size: int, mirrored: Tensor | None = None) -> Tensor:
    """Cuts `length` pixels from `first` on (int64 (B,)) out of `side` and resizes them to `size`: (B, size, side).

    Bilinear; where it shrinks, the triangle widens with it (antialiasing, as `resize(antialias=True)`).
    """
    scale = (length / size)[:, None]
    centre = (_places(size, mirrored, first.device) + 0.5) * scale  # within the crop, where float32 is most precise
    pixel = (torch.arange(side, device=first.device) - first[:, None]).float()
    if size >= side:  # no crop shrinks: where one of two taps would lie outside, the other has it all
        centre = centre.clamp_min_(0.5).minimum(length[:, None] - 0.5)
        return (1 - ((pixel + 0.5)[:, None] - centre[..., None]).abs_()).clamp_min_(0)
    support = scale.clamp_min(1.0)
    weight = (1 - (((pixel + 0.5) / support)[:, None] - (centre / support)[..., None]).abs_()).clamp_min_(0)
    weight.mul_(((pixel >= 0) & (pixel < length[:, None]))[:, None])
    return weight.div_(weight.sum(-1, keepdim=True))


def shift_matrices(offset: Tensor, side: int, mirrored: Tensor | None = None) -> Tensor:
    """Moves by `offset` pixels (int64 (B,), below `side`), filling by reflection: (B, side, side)."""
    source = _reflect(_places(side, mirrored, offset.device) + offset[:, None], side).float()
    return 1 - (torch.arange(side, device=offset.device) - source[..., None]).abs_().clamp_max_(1)


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
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
