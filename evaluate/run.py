"""Stage three from end to end: features once, every figure from them, the tables, the report."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from modicum.checkpoint import Preprocessing, load_backbone
from modicum.evaluate import galleries
from modicum.evaluate.classifiers import Classifiers
from modicum.evaluate.judged import Found, Judged
from modicum.evaluate.raw_pixels import raw_pixels
from modicum.evaluate.report import Pictures, write_report
from modicum.evaluate.results import Findings, results
from modicum.evaluate.rows import Judge, Sets, cross_validated_rows, knn_rows, linear_rows, row_table
from modicum.exchange import initial_backbone
from modicum.features import FeatureStore
from modicum.files import write_atomically, write_table
from modicum.record import working
from modicum.session import Session


def run(session: Session) -> None:
    """Writes RUN/evaluate/* and RUN/report.html and .md from what stages one and two left; what they did not leave is not judged."""
    began = time.perf_counter()
    out, settings = session.folder.stage("evaluate"), session.experiment.evaluate
    sets = Sets.of(session.splits, session.images.labels, session.images.num_classes)
    store = FeatureStore.of(session)
    judge, judged, found, pictures = Judge(settings, session.experiment.seed), Judged(session), Findings(), Pictures()
    for name, features in feature_sets(session, store, found):
        with working(f"kNN and linear probe ({name})"):
            rows, left_out = judged.find(name, features, partial(judge_features, session, sets, judge, name, features))
        found.rows += rows
        found.left_out |= left_out
        if name == "pretrained" or (name == "finetuned" and not found.shown):
            found.shown = name
            add_neighbours(session, sets, pictures, name, features)
    classifiers = Classifiers(session, sets, store, judge, found)
    classifiers.judge_finetuned(pictures)
    classifiers.judge_baselines()
    classifiers.judge_refits()
    content = results(session, sets, judge, found, time.perf_counter() - began)
    write_table(out / "results.csv", row_table(found.rows))
    # Strict JSON: NaN, which other readers refuse, is an error here.
    write_atomically(out / "results.json", json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    write_report(session.folder.path, content, session.experiment.model_dump(mode="json"), found.confusion, pictures)


def feature_sets(session: Session, store: FeatureStore, found: Findings) -> Iterator[tuple[str, np.ndarray]]:
    """(name, features (N, D)) of all images; one at a time, since large sets fill the memory."""
    networks: dict[str, tuple[nn.Module, Preprocessing]] = {}
    experiment, folder, init = session.experiment, session.folder, session.experiment.finetune.init
    start = folder.stage("pretrain") / "backbone" if init == "pretrain" else Path(init)
    if init != "random" and start.exists():
        networks["pretrained"] = initial_backbone(str(start), experiment), Preprocessing.of(experiment.data)
    tuned = folder.stage("finetune") / "backbone"
    if tuned.exists():
        networks["finetuned"] = load_backbone(tuned)
    networks["random"] = initial_backbone(None, experiment), Preprocessing.of(experiment.data)
    for name, (network, preprocessing) in networks.items():
        yield name, store.of_all(name, network, preprocessing).numpy()
    pixels, note = raw_pixels(session.images.pixels)
    found.notes += [note] if note else []
    yield "pixels", pixels


def judge_features(session: Session, sets: Sets, judge: Judge, name: str, features: np.ndarray) -> Found:
    seed, device = session.experiment.seed, session.hardware.device
    if len(sets.test):
        rows, left_out = knn_rows(judge, sets, name, features)
        return [*rows, *linear_rows(judge, sets, name, features, seed, device)], left_out
    if name != "finetuned":  # whose backbone has seen the very labels that would be held out
        return list(cross_validated_rows(judge, sets, name, features, seed, device)), {}
    return [], {}


def add_neighbours(session: Session, sets: Sets, pictures: Pictures, name: str, features: np.ndarray) -> None:
    """Writes neighbours.csv, and puts some of its queries into the report's gallery."""
    settings, seed, images = session.experiment.evaluate, session.experiment.seed, session.images
    with working(f"neighbours ({name})"):
        queries, neighbours, similarities = galleries.nearest(features, sets, settings.gallery_neighbours, seed)
    table = galleries.neighbour_table(images, queries, neighbours, similarities, name)
    write_table(session.folder.stage("evaluate") / "neighbours.csv", table)
    for at in galleries.spread(queries, images.labels, settings.gallery_queries, seed):
        pictures.add_neighbours(images, int(queries[at]), neighbours[at], similarities[at])
