"""The images of the training cases: Fashion-MNIST as 32 px RGB, in memory, for us and for the peers."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.pairs import Skipped
from modicum.data.images import Images
from modicum.data.sources import load_images
from modicum.errors import InputError
from modicum.hardware import usable_cores
from modicum.settings import DataSettings

DATA: dict[str, Any] = {"name": "fashion_mnist", "image_size": 32, "channels": 3}
WORKERS = min(8, usable_cores())  # of a peer's DataLoader


@lru_cache(maxsize=1)
def fashion_images() -> Images:
    try:
        return load_images(DataSettings(**DATA))
    except InputError as reason:
        raise Skipped(str(reason)) from None


class Pictures(Dataset[tuple[Any, int]]):
    """Images as torchvision's data sets give them: a PIL image through the transform, and its label."""

    def __init__(self, images: Images, rows: np.ndarray, transform: Callable[[Image.Image], Any]) -> None:
        self.pixels = images.pixels[rows].permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels[rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[number])), int(self.labels[number])


def batches(pictures: Pictures, batch_size: int) -> Iterator[list[Any]]:
    """Endless batches by a DataLoader with workers. They prepare the next ones while a step computes, as they do in a training run."""
    loader = DataLoader(pictures, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=WORKERS)
    while True:
        yield from loader
