"""What a source yields: uint8 images, integer labels and a stable id per image."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from modicum.data.image_files import ImageFiles, Pixels

UNKNOWN = -1


@dataclass(frozen=True)
class Images:
    """A whole data set, in memory, mapped or read anew from files: training images first or not, the manifest says which is which.

    `manifest` has one row an image, in the order of `pixels`: `id` (stable text, unique), `path` (relative to the root with
    `/`, or a made-up one such as `train/00012` for built-in sets), `label` (int64, 0..C-1, or -1 for unknown) and `split`
    (`train` or `test`).
    """

    name: str
    pixels: Pixels  # uint8 (N, C, S, S)
    manifest: pd.DataFrame
    class_names: tuple[str, ...]
    mirror: bool  # whether a mirrored image is still an image of its class

    def __post_init__(self) -> None:
        assert isinstance(self.pixels, ImageFiles) or self.pixels.dtype == torch.uint8
        assert len(self.pixels.shape) == 4
        assert len(self.pixels) == len(self.manifest)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), -1 where unknown."""
        return self.manifest["label"].to_numpy()

    def rows(self, split: str) -> np.ndarray:
        """int64 row numbers of `train` or `test` images, in order."""
        return np.flatnonzero(self.manifest["split"].to_numpy() == split)

    @cached_property
    def fingerprint(self) -> str:
        """Tells these pixels from others."""
        if isinstance(self.pixels, ImageFiles):
            return self.pixels.fingerprint
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for part in self.pixels.split(4096):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(self, rows: np.ndarray, size: int) -> Iterator[torch.Tensor]:
        """uint8 (B, C, S, S), B <= `size`: the pixels of `rows` in their order. Files of more than one batch are decoded ahead."""
        parts = torch.from_numpy(rows).split(size)
        if isinstance(self.pixels, ImageFiles) and len(parts) > 1:
            return self.pixels.ahead(parts, size)
        return (self.pixels[part] for part in parts)
