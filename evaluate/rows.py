"""One row of results a protocol: kNN, linear probe, classifiers, each judged on the same test images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from modicum import neighbours
from modicum.data.images import UNKNOWN
from modicum.evaluate import linear, metrics
from modicum.randomness import seed_of
from modicum.settings import EvaluateSettings
from modicum.whitening import standardise, whiten

Row = dict[str, Any]


COLUMNS = ["protocol", "features", "labels", "k", "C", "method", "weights", "chosen", "folds", "top1", "low", "high", "top5", "images"]


def row_table(rows: list[Row]) -> pd.DataFrame:
    """The rows as they go into results.csv: whole numbers stay whole beside empty cells."""
    return pd.DataFrame(rows, columns=COLUMNS).astype({"k": "Int64", "folds": "Int64"})


@dataclass(frozen=True)
class Sets:
    """Row numbers of the images by what may be done with them, and their labels (test labels serve scoring alone)."""

    labels: np.ndarray  # int64 (N,), -1 = unknown
    num_classes: int
    train: np.ndarray  # all images that are not test
    few: np.ndarray  # those whose labels the run has: labelled and validation
    validation: np.ndarray  # bool, over `few`
    known: np.ndarray  # training images whose label is known at all
    test: np.ndarray  # test images with a label
    unlabelled: np.ndarray
    held_out: list[np.ndarray]  # a refit of stage two each: the labelled images whose labels it was not told

    @classmethod
    def of(cls, splits: pd.DataFrame, labels: np.ndarray, num_classes: int) -> "Sets":
        """From the splits of the run (labels there: true or -1) in the order of the images."""
        split = splits["split"].to_numpy()
        few = np.flatnonzero(np.isin(split, ["labelled", "validation"]))
        known = labels != UNKNOWN
        return cls(
            labels=labels,
            num_classes=num_classes,
            train=np.flatnonzero(split != "test"),
            few=few,
            validation=split[few] == "validation",
            known=np.flatnonzero((split != "test") & known),
            test=np.flatnonzero((split == "test") & known),
            unlabelled=np.flatnonzero(split == "unlabelled"),
            held_out=[np.flatnonzero(splits["refit"] == refit) for refit in range(splits["refit"].max() + 1)] if "refit" in splits else [],
        )

    def banks(self) -> list[np.ndarray]:
        """The run's own labels and all labels of training images: one where both are the same, none where there are none."""
        return [bank for bank in ([self.few, self.known] if len(self.few) < len(self.known) else [self.known]) if len(bank)]


class Judge:
    """Turns scores (N, C) of images into rows."""

    def __init__(self, settings: EvaluateSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed_of(seed, "evaluate", "bootstrap")

    def row(self, protocol: str, features: str, labels: int, scores: np.ndarray, truth: np.ndarray, **more: Any) -> Row:
        """`labels`: how many were used. Accuracies are fractions; `top5` is None for 5 classes or fewer."""
        right = metrics.top_correct(scores, truth, 1)
        low, high = metrics.interval(right, self.settings.bootstrap, self.seed)
        top5 = float(metrics.top_correct(scores, truth, 5).mean()) if scores.shape[1] > 5 else None
        empty = {"k": None, "C": None, "method": None, "weights": None, "chosen": None, "folds": None}
        figures = {"top1": float(right.mean()), "low": low, "high": high, "top5": top5, "images": len(truth)}
        return {"protocol": protocol, "features": features, "labels": labels, **empty, **figures, **more}

    def difference(self, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
        """By how much `first` (bool (N,), right or not) is better than `second` on the same images, with its interval."""
        low, high = metrics.difference_interval(first, second, self.settings.bootstrap, self.seed)
        return {"difference": float(first.mean() - second.mean()), "low": low, "high": high}


def knn_rows(judge: Judge, sets: Sets, name: str, features: np.ndarray) -> tuple[list[Row], dict[int, list[int]]]:
    """Rows for every k and bank, of the features as they are and whitened over all training images; the k's left out, by bank size."""
    rows, left_out = _knn_rows(judge, sets, "knn", name, features)
    if judge.settings.knn.whitened:
        rows += _knn_rows(judge, sets, "knn_whitened", name, whiten(features, sets.train))[0]
    return rows, left_out


def _knn_rows(judge: Judge, sets: Sets, protocol: str, name: str, features: np.ndarray) -> tuple[list[Row], dict[int, list[int]]]:
    rows, left_out = [], {}
    normalised = neighbours.normalise(features)
    for bank in sets.banks():
        ks, too_large = neighbours.usable(judge.settings.knn.k, len(bank))
        if too_large:
            left_out[len(bank)] = too_large
        if not ks:
            continue
        approximate = len(bank) >= judge.settings.knn.approximate_from
        similarities, found = neighbours.search(normalised[bank], normalised[sets.test], ks[-1], approximate)
        neighbour_labels = sets.labels[bank][found]
        for k, scores in neighbours.scores(similarities, neighbour_labels, ks, judge.settings.knn.temperature, sets.num_classes):
            rows.append(judge.row(protocol, name, len(bank), scores, sets.labels[sets.test], k=k))
    return rows, left_out


def linear_rows(judge: Judge, sets: Sets, name: str, features: np.ndarray, seed: int, device: torch.device) -> Iterator[Row]:
    """One row a bank on the test images."""
    standardised = standardise(features, sets.train)
    for bank in sets.banks():
        validation = sets.validation if bank is sets.few or len(bank) == len(sets.few) else None
        settings = judge.settings.linear
        probe = linear.fit_probe(standardised[bank], sets.labels[bank], sets.num_classes, settings, seed, validation, device)
        scores = probe.scores(standardised[sets.test])
        yield judge.row("linear", name, len(bank), scores, sets.labels[sets.test], C=probe.strength, chosen=probe.chosen)


def cross_validated_rows(judge: Judge, sets: Sets, name: str, features: np.ndarray, seed: int, device: torch.device) -> Iterator[Row]:
    """Without test images: a linear probe on the run's labels, every one judged by a probe that did not see it."""
    if not len(sets.few):
        return
    standardised, truth = standardise(features, sets.train)[sets.few], sets.labels[sets.few]
    scores, folds = linear.cross_validated(standardised, truth, sets.num_classes, judge.settings.linear, seed, device)
    judged = ~np.isnan(scores[:, 0]) if folds else np.zeros(len(truth), dtype=bool)
    if judged.any():
        yield judge.row("linear_cross_validated", name, len(truth), scores[judged], truth[judged], folds=folds)
