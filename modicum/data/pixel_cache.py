"""A folder of images, decoded once into one memory-mapped file beside them; without room for it, read anew whenever they are needed."""

import fcntl
import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from modicum.data.decode import INTERPOLATION, UNREADABLE, decode, reason, survey
from modicum.data.fingerprint import digest
from modicum.data.image_files import ImageFiles, Pixels
from modicum.data.listing import Tree, refuse
from modicum.errors import InputError
from modicum.files import replacing, write_atomically
from modicum.hardware import usable_cores
from modicum.record import progress, say, warn
from modicum.settings import Auto, DataSettings

VERSION = 2  # raised when decoding changes, so that older files are made anew
CHUNK = 256  # images in flight at a time: what a Ctrl-C waits for
LOCK = ".lock"
OURS = re.compile(r"([0-9a-f]{32})[-.].+")


@dataclass(frozen=True)
class Decoded:
    """The images of a folder as they are decoded. `listing` is the fingerprint of every image's path, size and time of change."""

    tree: Tree
    listing: str
    image_size: int
    channels: int

    @property
    def name(self) -> str:
        """Of the files that hold them."""
        return f"{self.listing}-{self.image_size}px-{self.channels}ch-{INTERPOLATION.name.lower()}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.tree.files), self.channels, self.image_size, self.image_size

    def find(self, places: list[Path], keep: bool) -> tuple[Pixels, np.ndarray] | None:
        """Pixels and digests, from the first of `places` that holds them; without `keep` the digests alone, and the images to read anew."""
        return next(filter(None, (self._open(place, keep) for place in places)), None)

    def _open(self, place: Path, keep: bool) -> tuple[Pixels, np.ndarray] | None:
        try:
            digests = np.load(place / f"{self.name}.digests.npy")
            # Read-only: a private writable mapping counts as memory, and Linux refuses one larger than the machine has.
            mapped = np.load(place / f"{self.name}.npy", mmap_mode="r") if keep else None
        except (OSError, ValueError, EOFError):  # not there, another user's, or cut short by a disk's failure: made anew
            return None
        if len(digests) != self.shape[0] or (mapped is not None and mapped.shape != self.shape):
            return None
        if mapped is None:
            paths = [file.path for file in self.tree.files]
            return ImageFiles(self.tree.root, paths, self.image_size, self.channels, self.name), digests
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor does anyone write to the images
            return torch.from_numpy(mapped), digests

    def decode(self, path: Path) -> np.ndarray:
        return decode(path, self.image_size, self.channels)

    def build(self, place: Path, keep: bool) -> None:
        """Decodes every image, writes the digests and, with `keep`, the pixels. Raises InputError listing every unreadable image."""
        failures: dict[int, str] = {}
        digests = []
        try:
            with ExitStack() as files:
                digest_file = files.enter_context(replacing(place / f"{self.name}.digests.npy"))
                file = files.enter_context(replacing(place / f"{self.name}.npy")) if keep else None
                if file:
                    # Written from front to back, not through a mapping: a full disk is then an error, not the end of the process.
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
                for pixels in _attempt("decoding images" if keep else "checking images", self.decode, self.tree, failures):
                    if not failures:
                        content = pixels.tobytes()
                        digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
                        if file:
                            file.write(content)
                if failures:
                    _refuse(self.tree, failures)
                np.save(digest_file, np.array(digests, dtype=np.uint64))
        except OSError as error:
            need = _amount(prod(self.shape)) if keep else _amount(8 * len(self.tree.files))
            raise InputError(f"Cannot write the decoded images to {place}: {error.strerror or error} ({need} are needed).") from None


def open_pixels(tree: Tree, settings: DataSettings, places: list[Path]) -> tuple[Pixels, np.ndarray]:
    """Pixels uint8 (N, C, S, S) and a digest of each image's pixels, uint64 (N,), in the order of `tree.files`.

    `settings.cache` says whether the pixels are kept, mapped read-only from one of `places`, or read anew whenever they are needed.
    Either way all images are decoded once before anything else, and what was kept of an earlier state of the folder is removed.
    Raises InputError listing every unreadable image, and where there is no room for what is to be kept.
    """
    listing = digest([VERSION, *tree.files])
    decoded = Decoded(tree, listing, *_size_and_channels(tree, listing, settings, places))
    keep = settings.cache != "none"
    found = decoded.find(places, keep)
    if found:
        return found
    with _alone(_writable(places)):
        found = decoded.find(places, keep)  # another process may have made it meanwhile
        if found:
            return found
        place, keep = _room(decoded, places, settings.cache)
        found = decoded.find([place], keep)  # digests, of pixels that there was no room for before either
        if not found:
            decoded.build(place, keep)
            found = decoded.find([place], keep)
        assert found
        return found


def _is_writable(place: Path) -> bool:
    """Whether files can be made there and the lock, which may be another user's, be taken."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place), (place / LOCK).open("a"):
            return True
    except OSError:
        return False


def _writable(places: list[Path]) -> Path:
    place = next(filter(_is_writable, places), None)
    if place is None:
        raise InputError(f"Neither {' nor '.join(map(str, places))} can be written to: the decoded images need a place.")
    return place


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Other processes that want to decode into `place`, such as torchrun's ranks, wait until the block ends, and then find it done."""
    with (place / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another process that decodes images into {place}.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _size_and_channels(tree: Tree, listing: str, settings: DataSettings, places: list[Path]) -> tuple[int, int]:
    """Those of the settings; where they are `auto`, what suits the images, of which a note is kept."""
    if settings.image_size != "auto" and settings.channels != "auto":
        return settings.image_size, settings.channels
    file = f"{listing}.json"
    note = next(filter(None, (_read_note(place / file) for place in places)), None)
    if note is None:
        failures: dict[int, str] = {}
        heads = list(_attempt("looking at images", survey, tree, failures))
        if not heads:
            _refuse(tree, failures)
        size = suitable_size([side for side, _ in heads])
        note = DataSettings(image_size=size, channels=1 if all(grey for _, grey in heads) else 3)
        if not failures:  # else decoding names them, with those that are damaged further on
            with suppress(OSError):  # it saves a look at the images, no more
                write_atomically(_writable(places) / file, note.model_dump_json(include={"image_size", "channels"}))
    size, channels = (getattr(note if getattr(settings, key) == "auto" else settings, key) for key in ("image_size", "channels"))
    return size, channels


def _read_note(path: Path) -> DataSettings | None:
    """None where it is not there, another user's, or damaged: made anew."""
    try:
        note = DataSettings.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return None if "auto" in (note.image_size, note.channels) else note


def suitable_size(shorter_sides: list[int]) -> int:
    """The median of the shorter sides, within 8..224; above 32 a multiple of 8, so that strides divide it."""
    median = float(np.median(shorter_sides))
    return int(np.clip(round(median) if median <= 32 else 8 * round(median / 8), 8, 224))


def _room(decoded: Decoded, places: list[Path], cache: Auto | Literal["disk", "none"]) -> tuple[Path, bool]:
    """Where to write, and whether the pixels too. Raises InputError where they are to be kept and there is no room for them."""
    need, full = prod(decoded.shape), []
    for place in filter(_is_writable, places):
        _remove_older(place, decoded.listing)
        free = shutil.disk_usage(place).free
        if cache == "none" or free >= need:
            return place, cache != "none"
        full.append((place, free))
    place, free = full[0]
    lacking = f"The decoded images need {_amount(need)}, but {place} has only {_amount(free)} free"
    if cache == "disk":
        raise InputError(
            f"{lacking}: make room, choose a smaller data.image_size, or set data.cache=none, which reads the files anew in every epoch."
        )
    warn(f"{lacking}, so the files are read anew in every epoch, which takes longer. Room there or a smaller data.image_size avoids it.")
    return place, False


def _remove_older(place: Path, listing: str) -> None:
    for old in place.iterdir():
        match = OURS.fullmatch(old.name)
        if match and match[1] != listing:
            with suppress(OSError):  # Windows keeps a file that another run has mapped
                old.unlink()


def _amount(number: int) -> str:
    """Bytes in words."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def _attempt(description: str, function: Callable[[Path], Any], tree: Tree, failures: dict[int, str]) -> Iterator[Any]:
    """`function` of each image, in order, by a pool of threads; what cannot be read is left out and noted."""

    def one(number: int) -> tuple[Any, str | None]:
        try:
            return function(tree.root / tree.files[number].path), None
        except UNREADABLE as error:
            return None, reason(error)

    # Pillow lets go of the interpreter while it decodes and resizes, so threads are enough.
    with ThreadPoolExecutor(usable_cores()) as pool, progress(description, len(tree.files)) as advance:
        for numbers in np.split(np.arange(len(tree.files)), range(CHUNK, len(tree.files), CHUNK)):
            for number, (result, failure) in zip(numbers.tolist(), pool.map(one, numbers.tolist()), strict=True):
                advance()
                if failure is None:
                    yield result
                else:
                    failures[number] = failure


def _refuse(tree: Tree, failures: dict[int, str]) -> None:
    mistakes = [f"{tree.files[number].path}: {failures[number]}" for number in sorted(failures)]
    refuse(f"{len(mistakes):,} of {len(tree.files):,} images below {tree.root} cannot be read; repair or remove them", mistakes)
