"""Images as they stand in the report: small PNGs inside the page, each with what is to be said about it."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from modicum.data.images import UNKNOWN, Images

LARGEST = 56  # pixels a side: a gallery of ninety stays well below two megabytes


@dataclass(frozen=True)
class Picture:
    source: str  # data URI
    name: str  # class, or what stands for it
    note: str = ""
    right: bool | None = None  # None: nothing to compare with
    path: str = ""


@dataclass
class Pictures:
    """The galleries of a report."""

    neighbours: list[tuple[Picture, list[Picture]]] = field(default_factory=list)
    mistakes: list[Picture] = field(default_factory=list)

    def add_neighbours(self, images: Images, query: int, neighbours: Iterable[int], similarities: Sequence[float] | np.ndarray) -> None:
        """Row numbers of a query and of its neighbours, nearest first; a neighbour of another class is marked."""
        truth = int(images.labels[query])
        shown = []
        for row, similarity in zip(neighbours, similarities, strict=True):
            label = int(images.labels[row])
            right = None if UNKNOWN in (truth, label) else label == truth
            shown.append(picture(images, int(row), f"{similarity:.2f}", right))
        self.neighbours.append((picture(images, query), shown))

    def add_mistakes(self, images: Images, wrong: Iterable[tuple[int, int, float]]) -> None:
        """(row, predicted class, confidence) each."""
        for row, predicted, confidence in wrong:
            true = images.class_names[int(images.labels[row])]
            taken = f"{true} taken for {images.class_names[predicted]}"
            self.mistakes.append(Picture(thumbnail(images.pixels[row]), taken, f"{100 * confidence:.0f} % sure", False, _path(images, row)))


def picture(images: Images, row: int, note: str = "", right: bool | None = None) -> Picture:
    label = int(images.labels[row])
    return Picture(
        thumbnail(images.pixels[row]), "no label" if label == UNKNOWN else images.class_names[label], note, right, _path(images, row)
    )


def _path(images: Images, row: int) -> str:
    return str(images.manifest["path"].iloc[row])


def thumbnail(pixels: torch.Tensor) -> str:
    """uint8 (1 or 3, S, S) -> PNG data URI; small images as they are (the browser enlarges them without blur)."""
    array = pixels.numpy()
    image = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    if image.width > LARGEST:
        image = image.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
