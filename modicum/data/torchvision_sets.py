"""The built-in sets that torchvision downloads and reads."""

import gzip
import socket
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from modicum.errors import InputError
from modicum.record import say

PATIENCE = 30.0  # seconds without an answer after which a server counts as unreachable


@dataclass(frozen=True)
class Part:
    """The images of one official split."""

    name: str  # train, unlabelled or test
    pixels: Tensor  # uint8 (N, C, H, W)
    labels: np.ndarray  # int64 (N,), -1 = unknown


def download(name: str, root: Path) -> str | None:
    """Downloads a set below `root`; returns why it failed, or None."""
    makers: dict[str, list[Callable[[], Any]]] = {
        "fashion_mnist": [lambda: datasets.FashionMNIST(root, train=False, download=True)],
        "cifar10": [lambda: datasets.CIFAR10(root, train=False, download=True)],
        "cifar100": [lambda: datasets.CIFAR100(root, train=False, download=True)],
        "stl10": [lambda: datasets.STL10(root, split="test", download=True)],
        "svhn": [lambda: datasets.SVHN(root, split="train", download=True), lambda: datasets.SVHN(root, split="test", download=True)],
        "eurosat": [lambda: datasets.EuroSAT(root, download=True)],
    }
    say(f"Downloading {name} to {root}.")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision sets none: without a network it might wait for ever
    try:
        root.mkdir(parents=True, exist_ok=True)
        for make in makers[name]:
            make()
    except (OSError, RuntimeError, HTTPException) as error:
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        socket.setdefaulttimeout(patience)
    return None


def read_parts(name: str, root: Path, files: list[Path]) -> tuple[list[Part], tuple[str, ...]]:
    """The splits and class names of a set whose files are there. Raises InputError where they are damaged."""
    with _damage_reported(name, root):
        if name == "fashion_mnist":
            images, labels, test_images, test_labels = (_read_idx(file) for file in files)
            classes = max(labels.max(initial=0), test_labels.max(initial=0)) + 1
            if {images.ndim, test_images.ndim} != {3} or {labels.ndim, test_labels.ndim} != {1} or classes > 10:
                raise RuntimeError("they do not hold images and labels of 10 classes")
            parts = [_part("train", images[:, None], labels), _part("test", test_images[:, None], test_labels)]
            return parts, tuple(datasets.FashionMNIST.classes)
        if name in {"cifar10", "cifar100"}:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            train, test = kind(root, train=True), kind(root, train=False)
            parts = [_part(split, each.data.transpose(0, 3, 1, 2), each.targets) for split, each in (("train", train), ("test", test))]
            return parts, tuple(train.classes)
        if name == "stl10":
            both, test = datasets.STL10(root, split="train+unlabeled"), datasets.STL10(root, split="test")
            known = int((both.labels >= 0).sum())  # torchvision puts the unlabelled images behind the labelled ones
            pixels = both.data
            parts = [_part("train", pixels[:known], both.labels[:known]), _part("unlabelled", pixels[known:], both.labels[known:])]
            return [*parts, _part("test", test.data, test.labels)], tuple(test.classes)
        assert name == "svhn"
        splits = {split: datasets.SVHN(root, split=split) for split in ("train", "test")}
        return [_part(split, each.data, each.labels) for split, each in splits.items()], tuple("0123456789")


def _part(name: str, pixels: np.ndarray, labels: Any) -> Part:
    if len(pixels) != len(labels):
        raise RuntimeError(f"{len(pixels):,} {name} images, {len(labels):,} labels")
    return Part(name, torch.from_numpy(pixels), np.array(labels, dtype=np.int64))


@contextmanager
def _damage_reported(name: str, root: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # CIFAR's pickles were written by a NumPy so old that a new one complains about them.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            yield
    except RuntimeError as error:  # torchvision's word for a wrong checksum, and ours for a wrong count
        raise InputError(f"The files of {name} below {root} are damaged ({error}): remove them and run again to fetch them anew.") from None


def _read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a file of MNIST's idx format, packed or not. Raises InputError naming a damaged file."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and get it anew.") from None
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4]) if len(content) >= 4 else (1, 0, 0)
    header = 4 + 4 * dimensions
    if zeros != 0 or kind != 8 or len(content) < header:  # 8 stands for unsigned bytes
        raise InputError(f"{path} is not a file of bytes in idx format: remove it and get it anew.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != np.prod(shape):
        raise InputError(
            f"{path} is damaged (it should hold {np.prod(shape):,} bytes, and holds {len(content) - header:,}): remove it and get it anew."
        )
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=header).reshape(shape)
