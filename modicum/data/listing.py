"""The walk over a folder of images. Light: shared by the loader and the fingerprint."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from modicum.errors import InputError
from modicum.files import expanded
from modicum.settings import DataSettings

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SHOWN = 20  # bad files or rows listed in one message; the rest are counted


class File(NamedTuple):
    path: str  # relative to the root, with `/`
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Tree:
    """The images below `root`, and the folders (empty ones too), each in the order of their paths."""

    root: Path
    files: list[File]
    folders: list[str]
    links: list[str]  # left out, because they are links to folders or lead out of the root


def refuse(headline: str, mistakes: Iterable[str]) -> NoReturn:
    """One InputError for all mistakes of a kind: the first twenty are listed, the rest counted."""
    listed = list(mistakes)
    more = [f"and {len(listed) - SHOWN:,} more"] if len(listed) > SHOWN else []
    raise InputError("\n  ".join([f"{headline}:", *listed[:SHOWN], *more]))


def walk(root: Path | None) -> Tree:
    """All images below `root`. Hidden files and folders are skipped, no link is followed out of the root.

    Raises InputError where the folder is missing, cannot be read or holds no image.
    """
    if root is None:
        raise InputError("data.root is not set: set it to the folder that holds the images.")
    root = expanded(root)
    tree = Tree(root, [], [], [])
    try:
        if not root.is_dir():
            raise InputError(
                f"data.root={root} is {'a file, not a folder' if root.exists() else 'not there'}: set it to the folder of the images."
            )
        _collect(tree)
    except OSError as error:
        raise InputError(f"Cannot read {error.filename}: {error.strerror}.") from None
    if not tree.files:
        links = f" ({len(tree.links):,} links to folders or out of it were not followed)" if tree.links else ""
        raise InputError(f"data.root={root} holds no image{links}; images end in {', '.join(SUFFIXES)}.")
    unspeakable = [repr(file.path) for file in tree.files if not _is_text(file.path)]
    if unspeakable:
        refuse(f"The names of {len(unspeakable):,} images below {root} are not valid UTF-8; rename them", unspeakable)
    for part in (tree.files, tree.folders, tree.links):
        part.sort()
    return tree


def _collect(tree: Tree) -> None:
    real_root = os.path.realpath(tree.root)
    left = [""]  # folders still to be read; by recursion, some trees are too deep
    while left:
        prefix = left.pop()
        with os.scandir(tree.root / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    tree.folders.append(path)
                    left.append(f"{path}/")
                elif entry.is_dir():
                    tree.links.append(path)
                elif entry.name.lower().endswith(SUFFIXES):
                    if entry.is_symlink() and not inside(os.path.realpath(entry.path), real_root):
                        tree.links.append(path)
                        continue
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):  # not a pipe, which would never end
                        tree.files.append(File(path, status.st_size, status.st_mtime_ns))


def is_file(path: Path) -> bool:
    """False too for a name too long, with a null in it or below a folder that cannot be entered, for which Path.is_file raises."""
    return os.path.isfile(path)  # noqa: PTH113


def inside(path: str, root: str) -> bool:
    """Whether one real path lies below another."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _is_text(path: str) -> bool:
    """Names that are not UTF-8 come from the system with surrogates, which no CSV or report can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def label_file(settings: DataSettings) -> Path | None:
    """The CSV of labels, relative to the current folder, or None where sub-folders are the classes."""
    if settings.labels is None:
        refuse_idle_columns(settings)
        return None
    path = expanded(settings.labels)
    if not is_file(path):
        beside = expanded(settings.root) / path if settings.root else path
        hint = f": did you mean {beside}?" if is_file(beside) else "."
        raise InputError(f"data.labels={path} is not there{hint}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"data.labels={path} cannot be read: {error.strerror}.") from None
    return path


def refuse_another_split(settings: DataSettings, why: str) -> None:
    """Raises InputError for settings of how test images are drawn, where the set brings its own."""
    for key in ("test_fraction", "split_seed"):
        if getattr(settings, key) != DataSettings.model_fields[key].default:
            raise InputError(f"data.{key} cannot be set: {why}; remove the setting.")


def refuse_idle_columns(settings: DataSettings) -> None:
    """Raises InputError for the header of a column, where there is no CSV."""
    for key in ("path_column", "label_column", "split_column"):
        given = getattr(settings, key)
        if given != DataSettings.model_fields[key].default:
            raise InputError(
                f"data.{key} = {given!r} would do nothing without data.labels, a folder's CSV: give that too, or remove the setting."
            )
