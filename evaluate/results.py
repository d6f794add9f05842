"""The content of results.json: the rows, and all that the table and the report say beside them."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modicum.config import flatten, load_experiment, shipped_configs
from modicum.evaluate.metrics import class_accuracies
from modicum.evaluate.rows import Judge, Row, Sets
from modicum.method import find_method
from modicum.provenance import provenance
from modicum.session import Session
from modicum.settings import Experiment


@dataclass
class Findings:
    """What the stage has found so far."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[int, list[int]] = field(default_factory=dict)  # size of a bank -> the k that it does not hold
    right: dict[str, np.ndarray] = field(default_factory=dict)  # classifier -> whether it names each test image rightly, bool (tests,)
    confusion: np.ndarray | None = None  # int64 (C, C)
    shown: str | None = None  # the features whose neighbours the report shows

    def first(self, protocol: str) -> Row | None:
        return next((row for row in self.rows if row["protocol"] == protocol), None)


def results(session: Session, sets: Sets, judge: Judge, found: Findings, seconds: float) -> dict[str, Any]:
    experiment, images, names = session.experiment, session.images, session.images.class_names
    config, overrides = reproduction(session.name, session.requested)
    headline = found.first("finetuned")
    counts = None if found.confusion is None else found.confusion.sum(axis=1)
    accuracies = [None] * len(names) if found.confusion is None else class_accuracies(found.confusion)
    return {
        "headline": {
            "accuracy": headline["top1"] if headline else None,
            "interval": [headline["low"], headline["high"]] if headline else [None, None],
            "labels": len(sets.few),
        },
        "rows": found.rows,
        "gains": {
            name: judge.difference(found.right["finetuned"], right)
            for name, right in found.right.items()
            if name != "finetuned" and "finetuned" in found.right
        },
        "per_class": [
            {"class": name, "accuracy": accuracy, "images": 0 if counts is None else int(counts[at])}
            for at, (name, accuracy) in enumerate(zip(names, accuracies, strict=True))
        ],
        "run": session.folder.path.resolve().name,
        "config": config,
        "overrides": overrides,
        "dataset": images.name,
        "class_names": list(names),
        "images": {
            "train": len(sets.train),
            "test": len(sets.test),
            "labelled": len(sets.few),
            "all_labels": len(sets.known),
            "a_class": labels_a_class(sets),
        },
        "pixels": {"size": images.image_size, "channels": images.channels},
        "seed": experiment.seed,
        "label_seed": experiment.finetune.label_seed,
        "split_seed": experiment.data.split_seed,
        "given": given(experiment),
        "init": experiment.finetune.init if experiment.finetune.init in ("pretrain", "random") else "backbone",
        "finish": experiment.finetune.finish,
        "methods": {"pretrain": experiment.pretrain.method["name"], "finetune": experiment.finetune.method["name"]},
        "classifier": (session.folder.stage("finetune") / "classifier").is_dir(),
        "takes_steps": bool(find_method("finetune", experiment.finetune.method["name"]).views),
        "backbone": experiment.backbone.name,
        "knn": {"temperature": experiment.evaluate.knn.temperature, "similarity": "cosine"},
        "neighbours_features": found.shown,
        "notes": [*found.notes, *remarks(sets, found, experiment.evaluate.knn.approximate_from)],
        "hardware": session.hardware.describe(),
        "versions": provenance(),
        "seconds": round(seconds, 1),
    }


def given(experiment: Experiment) -> list[str]:
    """What the run learnt from beside its images and labels, whose own training is not known."""
    init = experiment.finetune.init
    found = {
        "starting weights": init == "pretrain" and experiment.pretrain.init is not None,
        "backbone": init not in ("pretrain", "random"),
        "teacher": experiment.finetune.method.get("teacher_from") is not None,
    }
    return [name for name, there in found.items() if there]


def labels_a_class(sets: Sets) -> int | None:
    """How many labels each class has, where all have the same number."""
    counts = set(np.bincount(sets.labels[sets.few], minlength=sets.num_classes).tolist())
    return counts.pop() if len(counts) == 1 else None


def remarks(sets: Sets, found: Findings, approximate_from: int) -> list[str]:
    """What has to be said of the rows, a sentence or two each."""
    said = [f"kNN with k {', '.join(map(str, ks))} left out: the bank holds {size} images." for size, ks in sorted(found.left_out.items())]
    said += [
        f"kNN in the bank of {size:,} images looked into an inverted index, which may miss a neighbour."
        for size in sorted({len(bank) for bank in sets.banks() if len(bank) >= approximate_from})
    ]
    refitted = found.first("finetuned_cross_validated")
    if not len(sets.test):
        probes = " The figures are those of a linear probe, cross-validated on the labels." if not refitted else ""
        if not found.rows:
            probes = " To cross-validate a linear probe, some class needs two labels."
        said.append(f"There are no test images, so the classifier itself is not judged.{probes}")
    if refitted:
        said.append(
            f"Cross-validated: stage two was refitted {refitted['folds']} times, each time without a part of the labels, and judged "
            f"on the {refitted['images']} images behind them; to the refit they were unlabelled ones. The classifier of this run has "
            "all the labels."
        )
    middle = next((row for row in found.rows if (row["chosen"] or "").startswith("the middle")), None)
    if middle:
        said.append(f"Linear probes on {middle['labels']} labels use C {middle['C']:g}, {middle['chosen']}.")
    return said


def reproduction(config: str, requested: Experiment) -> tuple[str | None, list[str]]:
    """The shipped config that a run was made with and the `key=value` that it was given beside it; None for a file of one's own."""
    if config not in shipped_configs():
        return None, []
    original, asked = by_key(load_experiment(config)), by_key(requested)
    return config, [f"{key}={json.dumps(value)}" for key, value in asked.items() if original.get(key) != value]


def by_key(experiment: Experiment) -> dict[str, Any]:
    """Every setting under its dotted key; a method's block is one value, since `method: NAME` replaces it as a whole."""
    settings = experiment.model_dump(mode="json")
    methods = {f"{stage}.method": settings[stage].pop("method") for stage in ("pretrain", "finetune")}
    return flatten(settings) | methods
