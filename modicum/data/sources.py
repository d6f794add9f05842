"""Images in, by the name of their source."""

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from modicum.data.catalogue import built_in, download_root, find_set
from modicum.data.folder import load_folder
from modicum.data.images import Images
from modicum.data.listing import walk
from modicum.data.stratify import hold_out
from modicum.data.torchvision_sets import Part, read_parts
from modicum.errors import InputError
from modicum.record import warn
from modicum.settings import DataSettings

CHUNK = 1024  # images resized at a time, as float
EUROSAT_IMAGES = 27_000


def load_images(settings: DataSettings) -> Images:
    """The images that `settings` names, all in memory or mapped from a cache.

    Built-in sets come in their own size and colour unless `image_size` or `channels` says otherwise. Raises InputError for
    an unknown name, missing or damaged files, and everything wrong with a folder of images.
    """
    if settings.name == "folder":
        return load_folder(settings)
    built_in(settings)  # an unknown name is refused before anything is loaded
    if settings.name == "digits":
        return _digits(settings)
    files = find_set(settings)
    if settings.name == "eurosat":
        return _eurosat(settings, files[0])
    root = download_root(settings)
    if settings.name == "fashion_mnist":
        if settings.root and not files[0].is_relative_to(root):
            warn(f"data.root={root} holds no fashion_mnist: it is read from {files[0].parent}.")
        root = files[0].parent
    parts, class_names = read_parts(settings.name, root, files)
    return _assemble(settings, parts, class_names)


def _digits(settings: DataSettings) -> Images:
    from sklearn.datasets import load_digits  # seconds to import, and only needed here

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    # 0..16 in the files, 0..255 here; a blank pixel stays 0 and a full one becomes 255.
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    images = _assemble(settings, [Part("digits", pixels, labels)], tuple(str(name) for name in digits.target_names))
    fraction = cast(float, built_in(settings).test_fraction) if settings.test_fraction == "auto" else settings.test_fraction
    split = np.full(len(labels), "train", dtype=object)
    if fraction > 0:
        split[hold_out(labels, fraction, "data.test_fraction", "test", settings.split_seed)] = "test"
    images.manifest["split"] = split.astype(str)
    return images


def _eurosat(settings: DataSettings, folder: Path) -> Images:
    known = built_in(settings)
    found = len(walk(folder).files)
    if found != EUROSAT_IMAGES:  # torchvision takes a folder that it did not finish unpacking for the whole
        raise InputError(
            f"{folder} holds {found:,} images, EuroSAT has {EUROSAT_IMAGES:,}: remove {folder} and run again to unpack it anew."
        )
    autos = {"image_size": known.image_size, "channels": known.channels, "test_fraction": known.test_fraction}
    chosen = {key: value for key, value in autos.items() if getattr(settings, key) == "auto"}
    # The cache lies beside the class folders, not among them, where torchvision would take it for a class.
    return load_folder(settings.model_copy(update={"root": folder, **chosen}), cache=folder.parent / ".modicum")


def _assemble(settings: DataSettings, parts: list[Part], class_names: tuple[str, ...]) -> Images:
    known = built_in(settings)
    size = known.image_size if settings.image_size == "auto" else settings.image_size
    channels = known.channels if settings.channels == "auto" else settings.channels
    paths = [f"{part.name}/{number:06d}" for part in parts for number in range(len(part.pixels))]
    manifest = pd.DataFrame(
        {
            "id": paths,
            "path": paths,
            "label": np.concatenate([part.labels for part in parts]),
            "split": [("test" if part.name == "test" else "train") for part in parts for _ in range(len(part.pixels))],
        }
    )
    mirror = known.mirror if settings.mirror == "auto" else settings.mirror
    pixels = torch.empty((len(manifest), channels, size, size), dtype=torch.uint8)
    start = 0
    for part in parts:
        for piece in part.pixels.split(CHUNK):
            pixels[start : start + len(piece)] = fit(piece, size, channels)
            start += len(piece)
    return Images(settings.name, pixels, manifest, class_names, mirror)


def fit(pixels: Tensor, size: int, channels: int) -> Tensor:
    """uint8 (B, 1 or 3, H, H) -> uint8 (B, channels, size, size): antialiased bilinear, grey by the luma weights of ITU-R BT.601."""
    if channels == 1 and pixels.shape[1] == 3:
        red, green, blue = pixels.float().unbind(1)
        pixels = (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8)[:, None]
    if pixels.shape[-1] != size:
        resized = functional.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
        pixels = resized.round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, channels, -1, -1)
