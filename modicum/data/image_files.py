"""Images for which the disk has no room decoded: read anew batch by batch, by worker processes that run ahead of the training."""

import itertools
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modicum.data.decode import UNREADABLE, decode, reason
from modicum.errors import InputError
from modicum.hardware import usable_cores

PIECE = 16  # images decoded by one worker at a time: 2.4 MB at 224 px, so that all work on the first batch and little memory is shared
GRACE = 60  # seconds that a worker outlives a signal to all processes, in which the training ends its step and saves


class ImageFiles:
    """Stands where a tensor uint8 (N, C, S, S) of all pixels would; an index gives the very pixels that the tensor would.

    What is read in an order known beforehand comes from `ahead`; what an index asks for is decoded at once, by threads.
    """

    def __init__(self, root: Path, paths: Sequence[str], image_size: int, channels: int, fingerprint: str) -> None:
        """`fingerprint` tells these pixels from others."""
        self.root, self.paths = root, paths
        self.shape = torch.Size((len(paths), channels, image_size, image_size))
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: int | np.integer[Any] | np.ndarray | Tensor) -> Tensor:
        """uint8 (C, S, S) for one row number, (n, C, S, S) for int64 (n,) of them. Raises InputError naming a file that cannot be read."""
        numbers = torch.as_tensor(rows)
        with ThreadPoolExecutor(usable_cores()) as pool:
            pixels = self._stacked(pool.map(self._decode, numbers.view(-1).tolist()), numbers.numel())
        return pixels if numbers.ndim else pixels[0]

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time."""
        return self.ahead(torch.arange(len(self)).split(size), size)

    def ahead(self, batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
        """uint8 (B, C, S, S) for each of `batches` of row numbers int64 (B,), B <= `size`; about one batch is decoded in advance.

        Raises InputError naming a file that cannot be read. The order and the pixels do not depend on the workers.
        """
        wanted, begun = itertools.tee(batches)
        workers = min(usable_cores(), math.ceil(size / PIECE))
        loader = DataLoader(
            _Pieces(self),
            batch_size=None,
            sampler=(piece for rows in begun for piece in rows.split(PIECE)),
            num_workers=workers,
            prefetch_factor=math.ceil(size / (PIECE * workers)) + 1,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # its own: one draw from torch's global generator would move the run's dropout
        )
        pieces = iter(loader)
        try:
            for rows in wanted:
                parts = [next(pieces) for _ in rows.split(PIECE)]
                for part in parts:
                    if isinstance(part, InputError):
                        raise part
                yield torch.cat(parts)
        finally:
            del pieces  # which ends the workers now: an error's traceback would keep them

    def decoded(self, rows: Tensor) -> Tensor:
        """As an index gives them, decoded one by one."""
        return self._stacked(map(self._decode, rows.tolist()), len(rows))

    def _stacked(self, images: Iterable[np.ndarray], count: int) -> Tensor:
        pixels = np.empty((count, *self.shape[1:]), dtype=np.uint8)
        for place, image in zip(pixels, images, strict=True):
            place[:] = image
        return torch.from_numpy(pixels)

    def _decode(self, row: int) -> np.ndarray:
        try:
            return decode(self.root / self.paths[row], self.shape[-1], self.shape[1])
        except UNREADABLE as error:
            raise InputError(f"{self.root / self.paths[row]} can no longer be read: {reason(error)}.") from None


class _Pieces(Dataset[Tensor | InputError]):
    """What a worker does. An error is handed over as a value: raised there it would arrive wrapped in a traceback."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, rows: Tensor) -> Tensor | InputError:
        try:
            return self.files.decoded(rows)
        except InputError as error:
            return error


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and a preemption reach workers too, but the step at hand still needs their images; afterwards they are told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


Pixels = Tensor | ImageFiles  # uint8 (N, C, S, S)
