"""Stage three from end to end: features once, every figure from them, the tables, the report."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from modicum.checkpoint import Preprocessing, load_backbone, load_classifier
from modicum.config import Experiment, flatten, load_experiment, shipped_configs
from modicum.data.images import Images
from modicum.evaluate import galleries, metrics
from modicum.evaluate.features import FeatureStore, apply_head, raw_pixels
from modicum.evaluate.report import Pictures, write_report
from modicum.evaluate.rows import Judge, Row, Sets, cross_validated_rows, knn_rows, linear_rows, row_table
from modicum.exchange import initial_backbone
from modicum.files import write_atomically, write_table
from modicum.provenance import provenance
from modicum.session import Session

MISTAKES_SHOWN = 12


def run(session: Session) -> None:
    """Writes RUN/evaluate/* and RUN/report.html and .md from what stages one and two left; what they did not leave is not judged."""
    Evaluation(session).run()


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


class Evaluation:
    def __init__(self, session: Session) -> None:
        self.began = time.perf_counter()
        self.config, self.overrides = reproduction(session.name, session.requested)
        self.folder = session.folder
        self.out: Path = session.folder.stage("evaluate")
        self.experiment: Experiment = session.experiment
        self.images: Images = session.images
        self.hardware = session.hardware
        self.sets = Sets.of(session.splits, self.images.labels, self.images.num_classes)
        self.store = FeatureStore(self.out / "features", self.hardware, self.experiment.evaluate.batch_size)
        self.judge = Judge(self.experiment.evaluate, self.experiment.seed)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.left_out: dict[int, list[int]] = {}
        self.right: dict[str, np.ndarray] = {}  # classifier -> whether it names each test image rightly, bool (tests,)

    def run(self) -> None:
        pictures, shown = Pictures(), ""
        for name, features in self.feature_sets():
            self.judge_features(name, features)
            if name == "pretrained" or (name == "finetuned" and not shown):
                shown = name
                pictures = self.neighbours(name, features)
        confusion = self.judge_finetuned(pictures)
        self.judge_baselines()
        self.judge_refits()
        self.remark()
        results = self.results(confusion, shown)
        write_table(self.out / "results.csv", row_table(self.rows))
        # Strict JSON: NaN, which other readers refuse, is an error here.
        write_atomically(self.out / "results.json", json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        write_report(self.folder.path, results, self.experiment.model_dump(mode="json"), confusion, pictures)

    def feature_sets(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, features (N, D)) of all images; one at a time, since large sets fill the memory."""
        networks: dict[str, tuple[nn.Module, Preprocessing]] = {}
        data, init = self.experiment.data, self.experiment.finetune.init
        start = self.folder.stage("pretrain") / "backbone" if init == "pretrain" else Path(init)
        if init != "random" and start.exists():
            networks["pretrained"] = initial_backbone(str(start), self.experiment), Preprocessing.of(data)
        tuned = self.folder.stage("finetune") / "backbone"
        if tuned.exists():
            networks["finetuned"] = load_backbone(tuned)
        networks["random"] = initial_backbone(None, self.experiment), Preprocessing.of(data)
        for name, (network, preprocessing) in networks.items():
            yield name, self.store.features(name, network, preprocessing, self.images.pixels).numpy()
        pixels, note = raw_pixels(self.images.pixels)
        self.notes += [note] if note else []
        yield "pixels", pixels

    def judge_features(self, name: str, features: np.ndarray) -> None:
        seed, device = self.experiment.seed, self.hardware.device
        if len(self.sets.test):
            rows, self.left_out = knn_rows(self.judge, self.sets, name, features)
            self.rows += [*rows, *linear_rows(self.judge, self.sets, name, features, seed, device)]
        elif name != "finetuned":  # whose backbone has seen the very labels that would be held out
            self.rows += cross_validated_rows(self.judge, self.sets, name, features, seed, device)

    def classifier_scores(self, folder: Path, name: str, pixels: torch.Tensor) -> np.ndarray:
        """Logits (N, C) of the classifier in `folder`; its features are taken from the store if `name` is there already."""
        classifier, preprocessing, _ = load_classifier(folder)
        return apply_head(classifier.head, self.store.features(name, classifier.backbone, preprocessing, pixels), self.hardware)

    def judge_finetuned(self, pictures: Pictures) -> np.ndarray | None:
        """The headline; also what only the classifier can tell: predictions, confusion, confident mistakes."""
        folder, sets = self.folder.stage("finetune") / "classifier", self.sets
        if not folder.exists():
            self.notes.append("Stage two has not run, so there is no classifier to judge.")
            return None
        scores = self.classifier_scores(folder, "finetuned", self.images.pixels)
        names = self.images.class_names
        write_table(self.out / "predictions.csv", galleries.predictions(self.images, sets.unlabelled, scores[sets.unlabelled], names))
        if not len(sets.test):
            return None
        self.add_classifier(
            "finetuned", "finetuned", "finetuned", scores[sets.test], len(sets.few), self.experiment.finetune.method["name"]
        )
        wrong = galleries.mistakes(scores[sets.test], sets, MISTAKES_SHOWN)
        pictures.add_mistakes(self.images, wrong)
        truth = sets.labels[sets.test]
        confusion = metrics.confusion_matrix(truth, scores[sets.test].argmax(axis=1), sets.num_classes)
        write_table(self.out / "confusion.csv", pd.DataFrame(confusion, index=pd.Index(names, name="true"), columns=names), index=True)
        return confusion

    def judge_baselines(self) -> None:
        if not len(self.sets.test):
            return
        pixels = self.images.pixels[self.sets.test]
        start = "random" if self.experiment.finetune.init == "random" else "pretrained"
        for name, features in (("random", "random"), ("pretrained", start), ("all_labels", start)):
            folder = self.folder.stage("finetune") / "baselines" / name / "classifier"
            if name in self.experiment.finetune.baselines and folder.exists():
                labels = len(self.sets.known if name == "all_labels" else self.sets.few)
                scores = self.classifier_scores(folder, f"baseline_{name}", pixels)
                self.add_classifier(name, "supervised", features, scores, labels, "supervised")

    def judge_refits(self) -> None:
        """The images behind the labels that stage two trains on, each judged by the refit that was not told its label."""
        held_out = self.sets.held_out
        folders = [self.folder.stage("finetune") / "refits" / str(number) / "classifier" for number in range(1, len(held_out) + 1)]
        if not held_out or not all(folder.exists() for folder in folders):
            return
        scores = [
            self.classifier_scores(folder, f"refit_{number}", self.images.pixels[rows])
            for number, (folder, rows) in enumerate(zip(folders, held_out, strict=True), start=1)
        ]
        truth, few = self.sets.labels[np.concatenate(held_out)], len(self.sets.few)
        method = {"method": self.experiment.finetune.method["name"], "folds": len(held_out)}
        self.rows.append(self.judge.row("finetuned_cross_validated", "finetuned", few, np.concatenate(scores), truth, **method))

    def add_classifier(self, name: str, protocol: str, features: str, scores: np.ndarray, labels: int, method: str) -> None:
        truth = self.sets.labels[self.sets.test]
        self.right[name] = metrics.top_correct(scores, truth, 1)
        self.rows.append(self.judge.row(protocol, features, labels, scores, truth, method=method))

    def neighbours(self, name: str, features: np.ndarray) -> Pictures:
        settings, seed = self.experiment.evaluate, self.experiment.seed
        queries, neighbours, similarities = galleries.nearest(features, self.sets, settings.gallery_neighbours, seed)
        table = galleries.neighbour_table(self.images, queries, neighbours, similarities, name)
        write_table(self.out / "neighbours.csv", table)
        pictures = Pictures()
        for at in galleries.spread(queries, self.images.labels, settings.gallery_queries, seed):
            pictures.add_neighbours(self.images, int(queries[at]), neighbours[at], similarities[at])
        return pictures

    def remark(self) -> None:
        for size, ks in sorted(self.left_out.items()):
            self.notes.append(f"kNN with k {', '.join(map(str, ks))} left out: the bank holds {size} images.")
        limit = self.experiment.evaluate.knn.approximate_from
        for size in sorted({len(bank) for bank in self.sets.banks() if len(bank) >= limit}):
            self.notes.append(f"kNN in the bank of {size:,} images looked into an inverted index, which may miss a neighbour.")
        refitted = next((row for row in self.rows if row["protocol"] == "finetuned_cross_validated"), None)
        if not len(self.sets.test):
            probes = " The figures are those of a linear probe, cross-validated on the labels." if self.rows and not refitted else ""
            self.notes.append(f"There are no test images, so the classifier itself is not judged.{probes}")
        if refitted:
            self.notes.append(
                f"Cross-validated: stage two was refitted {refitted['folds']} times, each time without a part of the labels, and judged "
                f"on the {refitted['images']} images behind them; to the refit they were unlabelled ones. The classifier of this run has "
                "all the labels."
            )
        middle = next((row for row in self.rows if (row["chosen"] or "").startswith("the middle")), None)
        if middle:
            self.notes.append(f"Linear probes on {middle['labels']} labels use C {middle['C']:g}, {middle['chosen']}.")

    def results(self, confusion: np.ndarray | None, shown: str) -> dict[str, Any]:
        experiment, sets, names = self.experiment, self.sets, self.images.class_names
        headline = next((row for row in self.rows if row["protocol"] == "finetuned"), None)
        counts = None if confusion is None else confusion.sum(axis=1)
        accuracies = [None] * len(names) if confusion is None else metrics.class_accuracies(confusion)
        return {
            "headline": {
                "accuracy": headline["top1"] if headline else None,
                "interval": [headline["low"], headline["high"]] if headline else [None, None],
                "labels": len(sets.few),
            },
            "rows": self.rows,
            "gains": {
                name: self.judge.difference(self.right["finetuned"], right)
                for name, right in self.right.items()
                if name != "finetuned" and "finetuned" in self.right
            },
            "per_class": [
                {"class": name, "accuracy": accuracy, "images": 0 if counts is None else int(counts[at])}
                for at, (name, accuracy) in enumerate(zip(names, accuracies, strict=True))
            ],
            "run": self.folder.path.resolve().name,
            "config": self.config,
            "overrides": self.overrides,
            "dataset": self.images.name,
            "class_names": list(names),
            "images": {"train": len(sets.train), "test": len(sets.test), "labelled": len(sets.few), "all_labels": len(sets.known)},
            "pixels": {"size": self.images.image_size, "channels": self.images.channels},
            "seed": experiment.seed,
            "label_seed": experiment.finetune.label_seed,
            "split_seed": experiment.data.split_seed,
            "init": experiment.finetune.init if experiment.finetune.init in ("pretrain", "random") else "backbone",
            "methods": {"pretrain": experiment.pretrain.method["name"], "finetune": experiment.finetune.method["name"]},
            "backbone": experiment.backbone.name,
            "knn": {"temperature": experiment.evaluate.knn.temperature, "similarity": "cosine"},
            "neighbours_features": shown or None,
            "notes": self.notes,
            "hardware": self.hardware.describe(),
            "versions": provenance(),
            "seconds": round(time.perf_counter() - self.began, 1),
        }
