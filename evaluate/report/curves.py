"""Learning curves from the stages' metrics.csv: charts of what they hold, none of what they lack."""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from modicum.evaluate.report.charts import Series, bars, line_chart
from modicum.record import Metrics

Curves = dict[str, list[tuple[float, float]]]
BASELINES = {"random": "supervised, random weights", "pretrained": "supervised, backbone", "all_labels": "supervised, all labels"}
EMBEDDINGS = [  # title, note, figures
    (
        "effective rank",
        "How many directions features and embeddings fill, at most as many as they have or as there are images watched. "
        "Comparable between runs of one method.",
        {"feature_rank": "effective rank of the features", "embedding_rank": "effective rank of the embeddings"},
    ),
    (
        "spread of the embeddings",
        "Standard deviation on the unit sphere: 1 where they are spread evenly, 0 where all images are one point.",
        {"embedding_std": "spread of the embeddings"},
    ),
    (
        "alignment and uniformity",
        "Squared distance of an image's two views, and how unevenly all views fill the sphere. Of both, less is better, but a collapse "
        "takes both to 0.",
        {"alignment": "alignment", "uniformity": "uniformity"},
    ),
]
PSEUDO_LABELS = {
    "share_above_threshold": "share that counts",
    "pseudo_label_accuracy": "right, of all",
    "pseudo_label_accuracy_above_threshold": "right, of those that count",
}


AUDIT = {
    "epoch/share_used": "share that counts",
    "epoch/accuracy": "right, of all",
    "epoch/accuracy_used": "right, of those that count",
}
STEADINESS = {
    "agreement": "student and average agree",
    "epoch/flips": "changed since the last epoch",
    "epoch/distance_to_prior": "distance of classes to the labels'",
    "epoch/calibration_error": "calibration error",
    "validation_calibration_error": "calibration error, validation labels",
}
MOST_CLASSES = 30  # bars; of more, those furthest off are drawn


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    drawing: Markup


def read_curves(path: Path, scale: float = 1.0) -> Curves:
    """Name -> [(step * scale, value)]; empty where there is no file. NaN, which no chart can show, is left out."""
    curves: Curves = defaultdict(list)
    if path.is_file():
        for step, name, value in Metrics.read(path):
            if value == value and abs(value) != float("inf"):
                curves[name].append((step * scale, value))
    return curves


def learning_charts(folder: Path, settings: dict[str, Any], *, pretrained: bool) -> list[Chart]:
    """All charts of stages one (if the run has one) and two that the run folder has the figures for."""
    charts = _stage_one(folder, settings) if pretrained else []
    charts += _stage_two(folder)
    return [chart for chart in charts if chart.drawing]


def _stage_one(folder: Path, settings: dict[str, Any]) -> list[Chart]:
    curves = read_curves(folder / "pretrain" / "metrics.csv")
    if not curves:
        return []
    last = max(step for points in curves.values() for step, _ in points)
    curves = read_curves(folder / "pretrain" / "metrics.csv", settings["pretrain"]["epochs"] / max(last, 1))
    knn = [Series("online kNN", curves.get("knn", []), 0, dots=True)]
    return [
        Chart("Pretraining: loss", "What stage one minimises, without any label.", _losses(curves, "epochs")),
        Chart(
            "Pretraining: online kNN, %",
            "How often the nearest training images are of the same class, while it learns. Watched only: no label enters training.",
            line_chart(knn, "epochs", share=True, label="Online kNN accuracy over epochs"),
        ),
        *(Chart(f"Pretraining: {title}", note, _watched(curves, names, label=f"{title} over epochs")) for title, note, names in EMBEDDINGS),
        _similarities(folder),
    ]


def _watched(curves: Curves, names: dict[str, str], label: str) -> Markup:
    series = [Series(words, curves.get(name, []), at, dots=True) for at, (name, words) in enumerate(names.items())]
    return line_chart(series, "epochs", share=False, label=label)


def _similarities(folder: Path) -> Chart:
    """The cosines of the first reading and the last, over the range that they take."""
    title = "Pretraining: similarities, % of pairs"
    note = "Cosines of the embeddings of two views: of one image, which should lie high, and of two, which should lie lower. Bins of 0.05."
    path = folder / "pretrain" / "similarities.csv"
    if not path.is_file():
        return Chart(title, note, Markup())
    table = pd.read_csv(path)
    series = []
    for when, step in {"first": table["step"].min(), "last": table["step"].max()}.items():
        reading = table[table["step"] == step]
        middles = (reading["low"] + reading["high"]) / 2
        for at, (name, words) in enumerate({"positives": "one image", "negatives": "two images"}.items()):
            points = list(zip(middles, reading[name], strict=True))
            series.append(Series(f"{words}, {when} reading", points, at, dashed=when == "first"))
    taken = [x for s in series for x, share in s.points if share > 0]
    low, high = min(taken) - 0.06, max(taken) + 0.06  # and the empty bin at either end
    series = [replace(s, points=[(x, share) for x, share in s.points if low <= x <= high]) for s in series]
    return Chart(title, note, line_chart(series, "cosine", share=True, label="Similarities of views of one image and of two"))


def watched(folder: Path) -> list[tuple[str, float, float]]:
    """(figure, its first reading, its last) of what stage one watched; empty where it left none."""
    curves = read_curves(folder / "pretrain" / "metrics.csv")
    curves["knn"] = [(step, 100 * share) for step, share in curves["knn"]]
    figures = {"knn": "online kNN, %"} | {name: words for _, _, names in EMBEDDINGS for name, words in names.items()}
    return [(words, curves[name][0][1], curves[name][-1][1]) for name, words in figures.items() if curves[name]]


def collapse_note(folder: Path) -> str | None:
    """What stage one said when it found its embeddings collapsed; None where it did not."""
    path = folder / "pretrain" / "collapse.json"
    return json.loads(path.read_text(encoding="utf-8"))["message"] if path.is_file() else None


def _stage_two(folder: Path) -> list[Chart]:
    curves = read_curves(folder / "finetune" / "metrics.csv")
    audit = [Series(words, curves.get(name, []), at) for at, (name, words) in enumerate(PSEUDO_LABELS.items())]
    validation = [Series("this run", curves.get("validation_accuracy", []), 0, dots=True)]
    for at, (name, words) in enumerate(BASELINES.items(), start=1):
        baseline = read_curves(folder / "finetune" / "baselines" / name / "metrics.csv")
        validation.append(Series(words, baseline.get("validation_accuracy", []), at, dashed=True))
    return [
        Chart("Fine-tuning: loss", "What stage two minimises.", _losses(curves, "steps")),
        Chart(
            "Fine-tuning: pseudo-labels, %",
            "The classifier's own guesses on unlabelled images. Where the truth is known it audits them here; it never reaches a loss."
            + _mean_accuracy(curves),
            line_chart(audit, "steps", share=True, label="Pseudo-labels over steps"),
        ),
        *_audit(folder),
        Chart(
            "Fine-tuning: validation accuracy, %",
            "On the labels held out to watch training.",
            line_chart(validation, "steps", share=True, label="Validation accuracy over steps"),
        ),
    ]


def _mean_accuracy(curves: Curves) -> str:
    """How many of the run's guesses were right: rows stand for equal stretches of steps, so that their mean is that of the run."""
    shares = [value for _, value in curves.get("pseudo_label_accuracy", [])]
    if not shares:
        return ""
    return f" Of all guesses of the run, whether or not they counted, {100 * sum(shares) / len(shares):.1f} % were right."


def _audit(folder: Path) -> list[Chart]:
    """The pseudo-labels of whole epochs, over images: what the run's audit.csv holds."""
    curves = read_curves(folder / "finetune" / "audit.csv")
    watched = curves | {name: points for name, points in read_curves(folder / "finetune" / "metrics.csv").items() if curves}
    truth, steadiness = (
        [Series(words, watched.get(name, []), at) for at, (name, words) in enumerate(words_of.items())] for words_of in (AUDIT, STEADINESS)
    )
    last = {name: points[-1][1] for name, points in curves.items()}
    classes = [name.removeprefix("epoch/share/") for name in last if name.startswith("epoch/share/")]
    shares = [(name, last[f"epoch/share/{name}"], last[f"epoch/prior/{name}"]) for name in classes]
    right = [(name, last[f"epoch/accuracy/{name}"], None) for name in classes if f"epoch/accuracy/{name}" in last]
    known = (
        ""
        if right
        else " The true labels are not known, so that whether they are right cannot be said; the next chart shows what can be: whether "
        "student and average agree, how many guesses change and, with a validation split, whether the classifier is as sure as it is right."
    )
    shares = sorted(sorted(shares, key=lambda row: -abs(row[1] - (row[2] or 0)))[:MOST_CLASSES], key=lambda row: classes.index(row[0]))
    right = sorted(sorted(right, key=lambda row: row[1])[:MOST_CLASSES], key=lambda row: classes.index(row[0]))
    return [
        Chart(
            "Pseudo-labels by epoch, %",
            "Each unlabelled image counted once an epoch; labelled ones, which the network was told, are left out of what is right."
            + known,
            line_chart(truth, "steps", share=True, label="Pseudo-labels over epochs"),
        ),
        Chart(
            "Pseudo-labels: how steady, how well calibrated, %",
            "Agreement over some unlabelled images as they are; the rest over the guesses of an epoch.",
            line_chart(steadiness, "steps", share=True, label="Steadiness and calibration of pseudo-labels over epochs"),
        ),
        Chart("Classes guessed in the last epoch, %", "Bars: guesses. Marks: the labels.", bars(shares, label="Classes guessed")),
        Chart("Pseudo-labels right in the last epoch, by true class, %", "", bars(right, label="Pseudo-labels right by class")),
    ]


def _losses(curves: Curves, x_name: str) -> Markup:
    """The total, and its parts where there are several of them."""
    parts = [name for name in curves if name.startswith("loss/")]
    series = [Series("total", curves.get("loss", []), 0)]
    if len(parts) > 1:
        words = [name.removeprefix("loss/").replace("_", " ") for name in parts]
        series += [Series(word, curves[name], 1 + at % 5, dashed=True) for at, (name, word) in enumerate(zip(parts, words, strict=True))]
    return line_chart(series, x_name, share=False, label="Loss over time")


FEATURES = {"finetuned": "fine-tuned backbone", "pretrained": "pretrained backbone", "random": "random encoder", "pixels": "raw pixels"}


def knn_charts(results: dict[str, Any]) -> list[Chart]:
    """kNN accuracy over k, a chart a bank and kind of features."""
    charts = []
    kinds = {"knn": "", "knn_whitened": ", whitened"}
    rows = [row for row in results["rows"] if row["protocol"] in kinds]
    for bank, protocol in sorted({(row["labels"], row["protocol"]) for row in rows}):
        series = []
        for at, (features, words) in enumerate(FEATURES.items()):
            wanted = (bank, protocol, features)
            points = [(row["k"], row["top1"]) for row in rows if (row["labels"], row["protocol"], row["features"]) == wanted]
            series.append(Series(words, sorted(points), at, dashed=features in ("random", "pixels"), dots=True))
        whole = "all " if bank == results["images"]["all_labels"] else "the run's "
        name = f"{whole}{bank:,} labels{kinds[protocol]}"
        drawing = line_chart(series, "k, the neighbours that vote", share=True, log_x=True, label=f"kNN accuracy over k, {name}")
        charts.append(Chart(f"kNN among {name}, %", "", drawing))
    return charts
