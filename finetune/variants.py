"""The runs that stage two is made of: the method asked for, its baselines, refits without a part of the labels, teachers and rounds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modicum.data.images import UNKNOWN
from modicum.method import find_method, settings_model
from modicum.session import Session
from modicum.settings import FinetuneSettings


@dataclass(frozen=True)
class Variant:
    """One fine-tuning run of the stage: the method asked for, one of its baselines, or a refit without a part of the labels."""

    title: str
    folder: Path
    method: dict[str, Any]
    labelled: np.ndarray  # rows
    unlabelled: np.ndarray  # rows
    init: str | None  # None: random weights
    warm_start: str = "none"
    finish: str = "none"
    compared: bool = False  # whether the weights that are not exported are kept, too, to be judged


def variants(session: Session) -> list[Variant]:
    """The method asked for, first, the baselines that differ from it, and its refits."""
    settings, folder = session.experiment.finetune, session.folder.stage("finetune")
    start = {"pretrain": str(session.folder.stage("pretrain") / "backbone"), "random": None}.get(settings.init, settings.init)
    split = session.splits["split"]
    labelled = np.flatnonzero(split == "labelled")
    everything = np.flatnonzero((split != "test") & (session.splits["label"] != UNKNOWN))
    supervised = supervised_method()
    unlabelled = unlabelled_rows(settings, session.splits)
    title = f"finetune {settings.method['name']}"
    how = {"warm_start": settings.warm_start, "finish": settings.finish}
    chosen = [Variant(title, folder, settings.method, labelled, unlabelled, start, **how, compared=True)]
    for name, rows, init in (("random", labelled, None), ("pretrained", labelled, start), ("all_labels", everything, start)):
        plain = supervised, init, len(rows), "none", "none"
        same = any(plain == (v.method, v.init, len(v.labelled), v.warm_start, v.finish) for v in chosen)
        if name in settings.baselines and not same:
            chosen.append(Variant(f"baseline {name}", folder / "baselines" / name, supervised, rows, unlabelled, init))
    return chosen + refits(session, chosen[0])


def refits(session: Session, whole: Variant) -> list[Variant]:
    """The same once for every part of the labels that `evaluate.cross_validate` wants held out, without that part.

    To a refit those images are unlabelled ones, like the images that the run is to name: their pixels are seen, their labels are not.
    """
    count = session.experiment.evaluate.cross_validate
    held_out = [np.flatnonzero(session.splits["refit"] == number) for number in range(count)]
    return [
        replace(
            whole,
            title=f"refit {number} of {count}",
            folder=whole.folder / "refits" / str(number),
            labelled=np.setdiff1d(whole.labelled, held),
            unlabelled=np.union1d(whole.unlabelled, held),
            compared=False,
        )
        for number, held in enumerate(held_out, start=1)
    ]


def supervised_method() -> dict[str, Any]:
    """The block of the method `supervised` with its defaults, as baselines and first teachers have it."""
    return {"name": "supervised", **settings_model(find_method("finetune", "supervised"))().model_dump()}


def with_teachers(variant: Variant) -> Iterator[Variant]:
    """The variant, after the runs whose classifiers teach it: one on the labels, unless its settings name a teacher, and its rounds."""
    method = variant.method
    if "teacher_from" in method and method["teacher_from"] is None:
        title, folder = f"{variant.title}, teacher", variant.folder / "teacher"
        first = replace(variant, title=title, folder=folder, method=supervised_method(), compared=False)
        yield first
        method = {**method, "teacher_from": str(first.folder / "classifier")}
    rounds = method.get("rounds", 1)
    for number in range(1, rounds):
        title, folder = f"{variant.title}, round {number} of {rounds}", variant.folder / "rounds" / str(number)
        yield replace(variant, title=title, folder=folder, method=method, compared=False)
        method = {**method, "teacher_from": str(folder / "classifier")}
    yield replace(variant, method=method)


def unlabelled_rows(settings: FinetuneSettings, splits: pd.DataFrame) -> np.ndarray:
    """Rows of the unlabelled set: never test or validation images."""
    return np.flatnonzero(splits["split"].isin(["unlabelled", *(["labelled"] if settings.labelled_in_unlabelled else [])]))


def rates_of(variant: Variant, settings: FinetuneSettings) -> FinetuneSettings:
    """The settings; for the baseline from random weights without lower rates for its backbone, which knows nothing worth keeping."""
    if variant.init is not None or settings.init == "random":
        return settings
    return settings.model_copy(update={"backbone_lr_scale": 1.0, "layer_decay": 1.0})
