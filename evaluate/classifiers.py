"""The classifiers that stage two left, each judged on images whose labels it was not told: its own, the baselines, the refits."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from modicum.checkpoint import load_classifier
from modicum.evaluate import galleries, metrics
from modicum.evaluate.report import Pictures
from modicum.evaluate.results import Findings
from modicum.evaluate.rows import Judge, Sets
from modicum.features import FeatureStore
from modicum.files import write_table
from modicum.hardware import Hardware
from modicum.session import Session

MISTAKES_SHOWN = 12


class Classifiers:
    def __init__(self, session: Session, sets: Sets, store: FeatureStore, judge: Judge, found: Findings) -> None:
        self.images, self.hardware = session.images, session.hardware
        self.settings = session.experiment.finetune
        self.folder, self.out = session.folder.stage("finetune"), session.folder.stage("evaluate")
        self.sets, self.store, self.judge, self.found = sets, store, judge, found

    def scores(self, folder: Path, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits (n, C) of the classifier in `folder` for the images in `rows`, or all; its features are kept in the store as `name`."""
        classifier, preprocessing, _ = load_classifier(folder)
        network = classifier.backbone, preprocessing
        features = self.store.of_all(name, *network) if rows is None else self.store.features(name, *network, rows)
        return apply_head(classifier.head, features, self.hardware)

    def judge_finetuned(self, pictures: Pictures) -> None:
        """The headline; also what only the classifier can tell: predictions, confusion, confident mistakes."""
        sets, images, names = self.sets, self.images, self.images.class_names
        if not (self.folder / "classifier").exists():
            self.found.notes.append("Stage two has not run, so there is no classifier to judge.")
            return
        scores = self.scores(self.folder / "classifier", "finetuned")
        write_table(self.out / "predictions.csv", galleries.predictions(images, sets.unlabelled, scores[sets.unlabelled], names))
        if not len(sets.test):
            return
        method = {"method": self.settings.method["name"], "weights": self.settings.export}
        self._add("finetuned", "finetuned", "finetuned", scores[sets.test], len(sets.few), **method)
        self.judge_weights()
        pictures.add_mistakes(images, galleries.mistakes(scores[sets.test], sets, MISTAKES_SHOWN))
        confusion = metrics.confusion_matrix(sets.labels[sets.test], scores[sets.test].argmax(axis=1), sets.num_classes)
        write_table(self.out / "confusion.csv", pd.DataFrame(confusion, index=pd.Index(names, name="true"), columns=names), index=True)
        self.found.confusion = confusion

    def judge_weights(self) -> None:
        """The same training's weights that are not exported: for the record, after the settings have chosen."""
        truth = self.sets.labels[self.sets.test]
        for folder in sorted((self.folder / "weights").glob("*/")):
            scores = self.scores(folder, f"weights_{folder.name}", self.sets.test)
            more = {"method": self.settings.method["name"], "weights": folder.name}
            self.found.rows.append(self.judge.row("finetuned_weights", "finetuned", len(self.sets.few), scores, truth, **more))

    def judge_baselines(self) -> None:
        if not len(self.sets.test):
            return
        start = "random" if self.settings.init == "random" else "pretrained"
        for name, features in (("random", "random"), ("pretrained", start), ("all_labels", start)):
            folder = self.folder / "baselines" / name / "classifier"
            if name in self.settings.baselines and folder.exists():
                labels = len(self.sets.known if name == "all_labels" else self.sets.few)
                self._add(
                    name, "supervised", features, self.scores(folder, f"baseline_{name}", self.sets.test), labels, method="supervised"
                )

    def judge_refits(self) -> None:
        """The images behind the labels that stage two trains on, each judged by the refit that was not told its label."""
        held_out = self.sets.held_out
        folders = [self.folder / "refits" / str(number) / "classifier" for number in range(1, len(held_out) + 1)]
        if not held_out or not all(folder.exists() for folder in folders):
            return
        scores = [
            self.scores(folder, f"refit_{number}", rows)
            for number, (folder, rows) in enumerate(zip(folders, held_out, strict=True), start=1)
        ]
        truth, few = self.sets.labels[np.concatenate(held_out)], len(self.sets.few)
        method = {"method": self.settings.method["name"], "folds": len(held_out)}
        self.found.rows.append(self.judge.row("finetuned_cross_validated", "finetuned", few, np.concatenate(scores), truth, **method))

    def _add(self, name: str, protocol: str, features: str, scores: np.ndarray, labels: int, **more: str) -> None:
        truth = self.sets.labels[self.sets.test]
        self.found.right[name] = metrics.top_correct(scores, truth, 1)
        self.found.rows.append(self.judge.row(protocol, features, labels, scores, truth, **more))


@torch.inference_mode()
def apply_head(head: nn.Module, features: torch.Tensor, hardware: Hardware) -> np.ndarray:
    """Logits float32 (N, C), from features (N, D): in fp32, since the head costs nothing."""
    return head.to(hardware.device).eval()(features.to(hardware.device)).float().cpu().numpy()
