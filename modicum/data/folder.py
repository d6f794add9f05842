"""The source `folder`: any tree of images, most of them without a label."""

from pathlib import Path

import numpy as np
import pandas as pd

from modicum.data.catalogue import cache_root
from modicum.data.fingerprint import digest
from modicum.data.images import UNKNOWN, Images
from modicum.data.labelling import read_labelling
from modicum.data.listing import SHOWN, Tree, refuse_another_split, walk
from modicum.data.pixel_cache import open_pixels
from modicum.data.stratify import hold_out
from modicum.errors import InputError
from modicum.record import warn
from modicum.settings import DataSettings


def load_folder(settings: DataSettings, cache: Path | None = None) -> Images:
    """Labels by sub-folder or by CSV, pixels decoded once and mapped from `cache`, by default `ROOT/.modicum`, or read anew.

    An image's id is its path. Raises InputError for everything that is wrong with the files and the CSV.
    """
    tree = walk(settings.root)
    if tree.links:
        warn(f"{len(tree.links):,} links below {tree.root} to folders or out of it were left out, for example {tree.links[0]}")
    labelling = read_labelling(tree, settings)
    if labelling.test:
        refuse_another_split(settings, f"{tree.root} has {len(labelling.test):,} test images of its own")
    if len(labelling.test) == len(tree.files):
        raise InputError(f"Every image of {tree.root} is a test image: there is none to train on.")
    paths = [file.path for file in tree.files]
    class_names = labelling.class_names
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers[labelling.labels[path]] if path in labelling.labels else UNKNOWN for path in paths], dtype=np.int64)
    test = np.array([path in labelling.test for path in paths])

    fraction = 0.0 if settings.test_fraction == "auto" else settings.test_fraction
    if fraction > 0:
        test[hold_out(labels, fraction, "data.test_fraction", "test", settings.split_seed)] = True
    places = [cache or tree.root / ".modicum", cache_root() / "folders" / digest([str(tree.root.resolve())])]
    pixels, digests = open_pixels(tree, settings, places)
    _warn_of_copies(tree, digests, test)
    split = np.where(test, "test", "train")
    manifest = pd.DataFrame({"id": paths, "path": paths, "label": labels, "split": split})
    mirror = True if settings.mirror == "auto" else settings.mirror
    return Images(settings.name, pixels, manifest, class_names, mirror)


def _warn_of_copies(tree: Tree, digests: np.ndarray, test: np.ndarray) -> None:
    """Names the test images whose pixels, once resized, are also in train: they make the test too easy."""
    train_digests, first = np.unique(digests[~test], return_index=True)
    train_rows = np.flatnonzero(~test)[first]
    twins = [
        f"{tree.files[row].path} = {tree.files[train_rows[np.searchsorted(train_digests, digests[row])]].path}"
        for row in np.flatnonzero(test & np.isin(digests, train_digests))
    ]
    if twins:
        more = [f"and {len(twins) - SHOWN:,} more"] if len(twins) > SHOWN else []
        warn("\n  ".join([f"{len(twins):,} test images are copies of training images, which flatters the test:", *twins[:SHOWN], *more]))
