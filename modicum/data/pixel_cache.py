"""A folder of images, decoded once into one memory-mapped file beside them."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from modicum.data.decode import UNREADABLE, decode, reason, survey
from modicum.data.fingerprint import digest
from modicum.data.listing import Tree, refuse
from modicum.errors import InputError
from modicum.files import replacing
from modicum.record import progress
from modicum.settings import Auto

VERSION = 1  # raised when decoding changes, so that older files are made anew
CHUNK = 256  # images in flight at a time: what a Ctrl-C waits for
OURS = re.compile(r"([0-9a-f]{32})-(auto|\d+)-(auto|\d+)(\.digests)?\.npy")


def cached_pixels(tree: Tree, image_size: int | Auto, channels: int | Auto, places: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, C, S, S), mapped read-only, and a digest of each image's pixels, uint64 (N,), in the order of `tree.files`.

    They are read from the first of `places` that holds them, else made in the first that can be written to. What was made
    there for an earlier state of the same folder is removed. Raises InputError listing every unreadable image.
    """
    listing = digest([VERSION, *tree.files])
    key = f"{listing}-{image_size}-{channels}"
    for place in places:
        found = _open(place, key, len(tree.files))
        if found:
            return found
    place = _writable(places)
    for old in place.iterdir():
        match = OURS.fullmatch(old.name)
        if match and match[1] != listing:
            with suppress(OSError):  # Windows keeps a file that another run has mapped
                old.unlink()
    _build(tree, image_size, channels, place, key)
    built = _open(place, key, len(tree.files))
    assert built
    return built


def _open(place: Path, key: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        # Read-only: a private writable mapping counts as memory, and Linux refuses one larger than the machine has.
        pixels = np.load(place / f"{key}.npy", mmap_mode="r")
        digests = np.load(place / f"{key}.digests.npy")
    except (OSError, ValueError):  # not there, or cut short by a disk's failure: made anew
        return None
    return (pixels, digests) if len(pixels) == len(digests) == count else None


def _writable(places: list[Path]) -> Path:
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
    raise InputError(f"Neither {' nor '.join(map(str, places))} can be written to: the decoded images need a place.")


def _build(tree: Tree, image_size: int | Auto, channels: int | Auto, place: Path, key: str) -> None:
    failures: dict[int, str] = {}
    everything = list(range(len(tree.files)))
    if image_size == "auto" or channels == "auto":
        heads = dict(_attempt("looking at images", survey, tree, everything, failures))
        if not heads:
            _refuse(tree, failures)
        if image_size == "auto":
            image_size = suitable_size([side for side, _ in heads.values()])
        if channels == "auto":
            channels = 1 if all(grey for _, grey in heads.values()) else 3
    shape = (len(tree.files), channels, image_size, image_size)
    rest = [number for number in everything if number not in failures]
    digests = []
    try:
        with replacing(place / f"{key}.digests.npy") as digest_file, replacing(place / f"{key}.npy") as file:
            # Written from front to back rather than through a mapping: a full disk is then an error, not the end of the process.
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for _, pixels in _attempt("decoding images", lambda path: decode(path, image_size, channels), tree, rest, failures):
                if not failures:
                    content = pixels.tobytes()
                    digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
                    file.write(content)
            if failures:
                _refuse(tree, failures)
            np.save(digest_file, np.array(digests, dtype=np.uint64))
    except OSError as error:
        need = np.prod(shape, dtype=np.int64) / 2**20
        raise InputError(f"Cannot write the decoded images to {place}: {error.strerror or error} ({need:,.0f} MiB are needed).") from None


def suitable_size(shorter_sides: list[int]) -> int:
    """The median of the shorter sides, within 8..224; above 32 a multiple of 8, so that strides divide it."""
    median = float(np.median(shorter_sides))
    return int(np.clip(round(median) if median <= 32 else 8 * round(median / 8), 8, 224))


def _attempt(
    description: str, function: Callable[[Path], Any], tree: Tree, numbers: list[int], failures: dict[int, str]
) -> Iterator[tuple[int, Any]]:
    """`function` of each numbered image, in order, by a pool of threads; what cannot be read is left out and noted."""

    def one(number: int) -> tuple[int, Any, str | None]:
        try:
            return number, function(tree.root / tree.files[number].path), None
        except UNREADABLE as error:
            return number, None, reason(error)

    # Pillow lets go of the interpreter while it decodes and resizes, so threads are enough.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, progress(description, len(numbers)) as advance:
        for start in range(0, len(numbers), CHUNK):
            for number, result, failure in pool.map(one, numbers[start : start + CHUNK]):
                advance()
                if failure is None:
                    yield number, result
                else:
                    failures[number] = failure


def _refuse(tree: Tree, failures: dict[int, str]) -> None:
    mistakes = [f"{tree.files[number].path}: {failures[number]}" for number in sorted(failures)]
    refuse(f"{len(mistakes):,} of {len(tree.files):,} images below {tree.root} cannot be read; repair or remove them", mistakes)
