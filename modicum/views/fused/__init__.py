"""Views on a CPU: the steps of modicum/views/batched, image by image in compiled loops.

A few images at a time go through all steps while they lie in the cache, and threads share a batch so. Every image is computed by itself:
neither its neighbours nor the number of threads change a bit of it.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from modicum.compiled import Array
from modicum.views.fused import colour, geometry, randaugment
from modicum.views.randaugment import warp_matrices
from modicum.views.recipes import Recipe

CACHED_VALUES = 200_000  # floats worked on at once by a thread: 65 RGB images of 32 px
SHARED_VALUES = 500_000  # floats from which on other threads are asked: torch's own keep the cores for some milliseconds after their work


def render(recipe: Recipe, images: Tensor, draws: dict[str, Tensor], scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """Writes views of uint8 `images` (B, C, S, S), times `scale` plus `offset` (both (C,)), to float32 `out` (B, C, T, T)."""
    if not len(images):
        return
    if "operation" in draws:
        operation, amount = draws["operation"], draws["amount"]
        draws = draws | {"warp": warp_matrices(operation.flatten(), amount.flatten()).view(*operation.shape, 2, 3)}
    given = {name: np.ascontiguousarray(value.numpy()) for name, value in draws.items()}
    pixels, views = np.ascontiguousarray(images.numpy()), out.numpy()
    normal = scale.numpy(), offset.numpy()
    threads = torch.get_num_threads() if out.numel() >= SHARED_VALUES else 1
    together = max(1, min(CACHED_VALUES // pixels[0].size, -(-len(pixels) // threads)))

    def part(start: int) -> None:
        some = slice(start, start + together)
        _change(recipe, pixels[some], {name: values[some] for name, values in given.items()}, views[some])
        colour.normalise(views[some].reshape(*views[some].shape[:2], -1), *normal)
        if "cutout" in given:  # after normalisation, so that zero is the mean colour
            geometry.cutout(views[some], given["cutout"][some], recipe.cutout / 2)

    starts = range(0, len(pixels), together)
    for _ in map(part, starts) if threads == 1 else _workers(threads).map(part, starts):
        pass


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "views")


def _change(recipe: Recipe, images: Array, draws: dict[str, Array], out: Array) -> None:
    """Views of `images` (b, C, S, S) in 0..1, into `out` (b, C, T, T)."""
    side, size, flat = images.shape[3], out.shape[3], out.reshape(*out.shape[:2], -1)
    mirrored = draws.get("flip", np.zeros(len(images), bool))
    if "crop" in draws:
        geometry.crop(images, draws["crop"], mirrored, out)
    else:
        still = np.zeros((len(images), 2), np.int64)
        geometry.shift(images, draws.get("shift", still), round(recipe.shift * side), mirrored, out)
    if "gray" in draws and recipe.gray_first:
        colour.greyscale(flat, np.flatnonzero(draws["gray"]))
    if "jitter" in draws:
        which = np.flatnonzero(draws["jitter"])
        colour.jitter(flat, which, draws["order"][which], draws["factors"][which])
    if "gray" in draws and not recipe.gray_first:
        colour.greyscale(flat, np.flatnonzero(draws["gray"]))
    if "operation" in draws:
        for k in range(draws["operation"].shape[1]):
            randaugment.apply(out, draws["operation"][:, k], draws["amount"][:, k], draws["warp"][:, k])
    if "blur" in draws:
        which = np.flatnonzero(draws["blur"])
        geometry.blur(out, which, draws["sigma"][which], recipe.blur_taps(size))
    if "solarize" in draws:
        which = np.flatnonzero(draws["solarize"])
        colour.solarize(flat, which, np.full(len(which), 0.5, np.float32))
