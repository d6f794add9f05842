"""`modicum predict`: a class and a confidence for every image of a folder."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from modicum.checkpoint import load_classifier
from modicum.data.decode import UNREADABLE, decode, reason
from modicum.data.listing import refuse, walk
from modicum.errors import InputError
from modicum.features import prepare
from modicum.files import write_table
from modicum.hardware import Hardware
from modicum.record import progress

BATCH = 256


@torch.inference_mode()
def predict(classifier_folder: Path, images_dir: Path, out: Path, hardware: Hardware, *, force: bool = False) -> pd.DataFrame:
    """Writes and returns path (relative to `images_dir`), class, confidence (0..1), one row an image below `images_dir`, by path.

    Raises InputError if `out` exists (without `force`), if there is no image, or if some cannot be read: it names them all, and
    writes nothing.
    """
    if out.exists() and not force:
        raise InputError(f"{out} is there already; give another --out, or --force to overwrite it.")
    out = out.resolve()  # a link stays one, and leads to the new table
    if out.exists() and not out.is_file():
        raise InputError(f"--out {out} is no file that could be overwritten; give another.")
    if not out.parent.is_dir():
        raise InputError(f"The folder of --out {out} does not exist; create it first.")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"The folder of --out {out} cannot be written to; give another --out.")
    if not images_dir.is_dir():
        raise InputError(f"{images_dir} is no folder of images.")
    classifier, preprocessing, class_names = load_classifier(classifier_folder)
    classifier = classifier.to(hardware.device).to(memory_format=torch.channels_last).eval()
    paths = [file.path for file in walk(images_dir).files]
    unreadable: list[str] = []
    best, confidence = [], []
    with progress("predict", len(paths)) as advance:
        for count, pixels in _decoded(images_dir, paths, preprocessing.image_size, preprocessing.channels, unreadable):
            if not unreadable:  # from the first bad file on, the rest is only checked
                with hardware.autocast():
                    logits = classifier(prepare(pixels, preprocessing, hardware.device))
                top = logits.float().softmax(dim=1).max(dim=1)
                best.append(top.indices.cpu().numpy())
                confidence.append(top.values.cpu().numpy())
            advance(count)
    if unreadable:
        refuse(f"{len(unreadable):,} of {len(paths):,} images below {images_dir} cannot be read; repair or remove them", sorted(unreadable))
    classes = np.asarray(class_names, dtype=object)[np.concatenate(best)]
    table = pd.DataFrame({"path": paths, "class": classes, "confidence": np.concatenate(confidence).astype(float).round(6)})
    write_table(out, table)
    return table


def _decoded(root: Path, paths: list[str], image_size: int, channels: int, unreadable: list[str]) -> Iterator[tuple[int, torch.Tensor]]:
    """Files tried and images uint8 (B, channels, image_size, image_size), a batch at a time; threads help: Pillow lets go of the lock."""

    def read(path: str) -> np.ndarray | None:
        try:
            return decode(root / path, image_size, channels)
        except UNREADABLE as error:
            unreadable.append(f"{path}: {reason(error)}")
            return None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            arrays = [array for array in pool.map(read, part) if array is not None]
            yield len(part), torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
