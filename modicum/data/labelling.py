"""Which image of a folder carries which label, and which are test: from a CSV, or from the names of the sub-folders."""

import csv
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from modicum.data.listing import SUFFIXES, Tree, inside, is_file, label_file, refuse
from modicum.errors import InputError
from modicum.settings import DataSettings

UNLABELLED = {"unlabelled", "unlabeled"}
SPLITS = {"train", "test"}
LIKE_SPLITS = {"val", "valid", "validation", "dev", "eval"}


@dataclass(frozen=True)
class Labelling:
    """By path relative to the root: the class of each labelled image, spelled as given, and the test images."""

    labels: dict[str, str] = field(default_factory=dict)
    test: set[str] = field(default_factory=set)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In natural order: `2` before `10`."""
        return tuple(sorted(set(self.labels.values()), key=natural))


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers inside of names by their value."""
    parts = re.split(r"(\d{1,640})", name)  # Python may turn no more digits into one number: a longer one counts as several
    return [int(part) if number % 2 else part.casefold() for number, part in enumerate(parts)], name


def read_labelling(tree: Tree, settings: DataSettings) -> Labelling:
    """Raises InputError naming every row or folder that cannot be used."""
    source = label_file(settings)
    return _by_csv(tree, source, settings) if source else _by_folders(tree)


def _by_folders(tree: Tree) -> Labelling:
    top = {folder for folder in tree.folders if "/" not in folder}
    words = {folder.casefold() for folder in top}
    has_splits = "train" in words and words <= SPLITS | UNLABELLED
    if "train" in words and not has_splits and words <= SPLITS | UNLABELLED | LIKE_SPLITS:
        raise InputError(
            f"{tree.root} has the sub-folders {', '.join(sorted(top))}: only train, test and unlabelled are splits. "
            "Rename the folder of test images to test and move the others out; validation images are drawn from the labels."
        )
    found = Labelling()
    nameless = []
    for file in tree.files:
        folders = file.path.split("/")[:-1]
        if has_splits and folders and folders[0].casefold() in SPLITS and folders.pop(0).casefold() == "test":
            found.test.add(file.path)
        if folders and folders[0].casefold() not in UNLABELLED:
            found.labels[file.path] = folders[0]
        elif file.path in found.test:
            nameless.append(file.path)
    if nameless:
        refuse(f"{len(nameless):,} test images below {tree.root} lie in no class folder; give them one or move them out of test", nameless)
    classes = [folder for folder in tree.folders if _is_class(folder, has_splits)]
    filled = {_class_folder(path, has_splits) for path in found.labels}
    empty = [folder for folder in classes if folder not in filled]
    if empty:
        refuse(f"These class folders below {tree.root} hold no image; fill or remove them", empty)
    return found


def _is_class(folder: str, has_splits: bool) -> bool:
    *above, name = folder.split("/")
    if name.casefold() in UNLABELLED:
        return False
    return len(above) == 1 and above[0].casefold() in SPLITS if has_splits else not above


def _class_folder(path: str, has_splits: bool) -> str:
    return "/".join(path.split("/")[: 2 if has_splits else 1])


def _by_csv(tree: Tree, source: Path, settings: DataSettings) -> Labelling:
    rows = _rows(source)
    headers = [header.strip() for header in rows[0]] if rows else []
    columns = {}
    for setting, header in (
        ("path_column", settings.path_column),
        ("label_column", settings.label_column),
        ("split_column", settings.split_column),
    ):
        if headers.count(header) > 1:
            raise InputError(f"{source} has the column {header!r} {headers.count(header)} times: rename or remove all but one.")
        if header in headers:
            columns[setting] = headers.index(header)
        elif setting != "split_column" or header != type(settings).model_fields[setting].default:
            raise InputError(
                f"{source} has no column {header!r} (found: {', '.join(headers) or 'none'}): set data.{setting} to the right header."
            )
    known = {file.path for file in tree.files}
    real_root = os.path.realpath(tree.root)
    found = Labelling()
    seen: dict[str, tuple[int, str]] = {}
    mistakes = []
    for number, row in enumerate(rows[1:], start=2):  # as a spreadsheet counts them: the header is row 1
        if not any(cell.strip() for cell in row):
            continue
        cells = {setting: row[column].strip() if column < len(row) else "" for setting, column in columns.items()}
        path, label = cells["path_column"].removeprefix("./"), cells["label_column"]
        split = cells.get("split_column", "").casefold()
        if len(row) > len(headers):
            mistakes.append(f"row {number}: has {len(row)} fields, the header has {len(headers)}; quote what holds a comma")
        elif path not in known:
            mistakes.append(f"row {number}: {_why_unknown(path, tree, real_root)}")
        elif path in seen:
            first, other = seen[path]
            same = f"repeats row {first}" if label == other else f"labels {path!r} {label!r}, row {first} labels it {other!r}"
            mistakes.append(f"row {number}: {same}")
        elif split not in {"", *SPLITS}:
            mistakes.append(
                f"row {number}: the split {cells['split_column']!r} is neither train nor test (validation is drawn from the labels)"
            )
        elif split == "test" and not label:
            mistakes.append(f"row {number}: the test image {path!r} has no label; give it one, or let it be train")
        else:
            if label:
                found.labels[path] = label
            if split == "test":
                found.test.add(path)
        seen.setdefault(path, (number, label))
    if mistakes:
        refuse(f"{len(mistakes):,} rows of {source} cannot be used" if len(mistakes) > 1 else f"{source} cannot be used", mistakes)
    return found


def _rows(source: Path) -> list[list[str]]:
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark before the header
            return list(csv.reader(file, strict=True))
    except UnicodeDecodeError:
        raise InputError(f"{source} is not UTF-8 text: save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{source} is not a valid CSV file: {error}.") from None


def _why_unknown(path: str, tree: Tree, real_root: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not path:
        return "the path is empty"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute() or ".." in parts:
        return f"{path!r} leaves the folder {tree.root}; paths are relative to data.root, without '..'"
    there = tree.root / path
    if not is_file(there):
        return f"there is no file {path!r} below {tree.root}" + (" (write / between folders)" if "\\" in path else "")
    if not inside(os.path.realpath(there), real_root):
        return f"{path!r} leads out of {tree.root} by a link"
    return f"{path!r} is not among the images that are read (not hidden, not behind a linked folder, ending in {', '.join(SUFFIXES)})"
