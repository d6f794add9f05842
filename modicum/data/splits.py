"""Which images carry labels in stage two: drawn by seed, written to `splits.csv`, exactly as many as were asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from modicum.data.images import Images
from modicum.data.stratify import apportion, draw_by_class, hold_out, stratified_folds
from modicum.errors import InputError
from modicum.files import write_table
from modicum.randomness import seed_of
from modicum.settings import FinetuneSettings

COLUMNS = ["id", "path", "label", "split"]
VALIDATION_FROM = 20  # labels a class; with fewer, a validation split costs more than it tells


def draw_labels(
    labels: np.ndarray, num_classes: int, request: int | str, seed: int, balance: str, class_names: Sequence[str] | None = None
) -> np.ndarray:
    """Sorted int64 positions, among `labels` (N,), of the training images that carry their label.

    `labels` are 0..num_classes - 1, or -1 where unknown; `request` is a total count, a share of the known labels such as
    "10%", or "all". `balance` "class": equally many a class, what is left over to random ones; "proportional": as the
    classes occur, at least one each. Raises InputError where there are fewer labels than asked for.
    """
    names = class_names or [str(number) for number in range(num_classes)]
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    if counts.sum() == 0:
        raise InputError("No training image carries a label: name them by data.labels or by sub-folders.")
    missing = [names[int(number)] for number in np.flatnonzero(counts == 0)]
    if missing:
        raise InputError(f"No training image carries the label {', '.join(map(repr, missing[:20]))}: label one, or remove the class.")
    if request == "all":
        return np.flatnonzero(labels >= 0)
    total = num_labels(request, int(counts.sum()))
    if total < num_classes:
        raise InputError(
            f"finetune.labels={request} gives {total} labels, fewer than the {num_classes} classes: ask for {num_classes} or more."
        )
    if total > counts.sum():
        raise InputError(f"finetune.labels={request} asks for more labels than the {counts.sum():,} that the training images have.")
    draws = np.random.default_rng(seed_of("labels", seed))
    if balance == "class":
        shares = _equal_shares(total, counts, names, request, draws)
    else:
        shares = apportion(total, counts, np.ones_like(counts), counts, draws)
    drawn = draw_by_class(labels, shares, draws)
    assert len(drawn) == total
    return drawn


def num_labels(request: int | str, known: int) -> int:
    """How many labels `finetune.labels` asks for, where `known` training images have one."""
    if not isinstance(request, str):
        return request
    if request == "all":
        return known
    percent = float(request.removesuffix("%"))
    if percent > 100:
        raise InputError(f"finetune.labels={request} is more than all: the share may be at most 100%.")
    return int(np.floor(percent / 100 * known + 0.5))


def _equal_shares(total: int, counts: np.ndarray, names: Sequence[str], request: int | str, draws: np.random.Generator) -> np.ndarray:
    each, left_over = divmod(total, len(counts))
    roomy = np.flatnonzero(counts > each)
    if counts.min() < each or len(roomy) < left_over:
        scarce = int(counts.argmin())
        largest = int(counts.min() * len(counts) + (counts > counts.min()).sum())
        asked = f"{each} to {each + 1}" if left_over else f"{each}"
        raise InputError(
            f"finetune.labels={request} asks for {asked} labelled images of each class, and {names[scarce]!r} has {counts[scarce]}: "
            f"ask for at most {largest}, or set finetune.balance=proportional."
        )
    shares = np.full(len(counts), each)
    shares[draws.permutation(roomy)[:left_over]] += 1
    return shares


def make_splits(images: Images, finetune: FinetuneSettings, num_refits: int = 0) -> pd.DataFrame:
    """One row an image, in the order of `images`: id, path, label, split, and with `num_refits` the refit.

    `label` is the true label or -1, `split` one of labelled, validation (from 20 labels of each class up), unlabelled and
    test. Training images without any label give none to `finetune.labels: all`: that is enough for pretraining.
    `refit` is the one of 0..num_refits - 1 from which the image's label is held out, -1 where it is in none.
    Raises InputError as `draw_labels` and `draw_refits` do.
    """
    labels = images.labels
    rows = images.rows("train")
    drawn = rows[:0]
    if finetune.labels != "all" or (labels[rows] >= 0).any():
        drawn = rows[
            draw_labels(labels[rows], images.num_classes, finetune.labels, finetune.label_seed, finetune.balance, images.class_names)
        ]
    split = np.full(len(labels), "unlabelled", dtype=object)
    split[images.rows("test")] = "test"
    split[drawn] = "labelled"
    enough = len(drawn) > 0 and np.bincount(labels[drawn], minlength=images.num_classes).min() >= VALIDATION_FROM
    if enough and finetune.validation_fraction > 0:
        held = hold_out(labels[drawn], finetune.validation_fraction, "finetune.validation_fraction", "validation", finetune.label_seed)
        split[drawn[held]] = "validation"
    assert np.isin(split, ["labelled", "validation"]).sum() == len(drawn)
    splits = images.manifest[["id", "path", "label"]].assign(split=split.astype(str))
    if num_refits:
        splits["refit"] = draw_refits(np.where(split == "labelled", labels, -1), num_refits, finetune.label_seed, images.class_names)
    return splits


def draw_refits(labels: np.ndarray, num_refits: int, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """The refit from which each label that stage two trains on is held out, stratified, int64 (N,); -1 where `labels` is -1.

    Raises InputError where a class would leave a refit with none of its labels to hold out.
    """
    told = np.flatnonzero(labels >= 0)
    counts = np.bincount(labels[told], minlength=len(class_names))
    if counts.min(initial=num_refits) < num_refits or not len(told):
        scarce = f"{class_names[int(counts.argmin())]!r} has {counts.min()}" if len(told) else "there is none"
        choice = f"choose {counts.min()} or fewer" if len(told) and counts.min() > 1 else "leave it 0"
        raise InputError(
            f"evaluate.cross_validate = {num_refits} holds out labels of each class {num_refits} times, and of those to train on "
            f"{scarce}: {choice}, or label more images."
        )
    refits = np.full(len(labels), -1)
    refits[told] = stratified_folds(labels[told], num_refits, seed_of("refits", seed))
    return refits


def write_splits(splits: pd.DataFrame, path: Path) -> None:
    """The table as CSV, the same bytes for the same table, whole or not at all."""
    write_table(path, splits[COLUMNS])
