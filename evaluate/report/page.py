"""The page: what is said and shown, in which order. The looks are in page.html.jinja and style.css."""

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from modicum.evaluate.metrics import most_confused
from modicum.evaluate.report import words
from modicum.evaluate.report.charts import heat_map
from modicum.evaluate.report.curves import collapse_note, knn_charts, learning_charts, watched
from modicum.evaluate.report.pictures import Pictures
from modicum.evaluate.table import columns, judged_images, lines, percent, results_markdown, title
from modicum.files import write_atomically

MOST_CLASSES = 30  # a larger confusion matrix cannot be read: its worst pairs are listed
MOST_PAIRS = 20


def write_report(folder: Path, results: dict[str, Any], settings: dict[str, Any], confusion: np.ndarray | None, pictures: Pictures) -> Path:
    """report.html and report.md in the run folder, from results.json's content, the resolved settings and what can be shown."""
    report = folder / "report.html"
    write_atomically(report, render(folder, results, settings, confusion, pictures))
    write_atomically(report.with_suffix(".md"), markdown(folder, results, settings))
    return report


def render(folder: Path, results: dict[str, Any], settings: dict[str, Any], confusion: np.ndarray | None, pictures: Pictures) -> str:
    """The whole HTML page; it refers to nothing outside itself. Every text from the data is escaped by the template."""
    here = files("modicum.evaluate.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    axis, table = scaled(results)
    return template.render(
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        results=results,
        headline=results["headline"],
        sentences=words.headline(results),
        gains=words.gains(results),
        title=title(results),
        judged=judged_images(results),
        heads=columns(results),
        table=table,
        axis=axis,
        collapse=collapse_note(folder) if results["init"] == "pretrain" else None,
        learning=learning_charts(folder, settings, pretrained=results["init"] == "pretrain"),
        knn=knn_charts(results),
        matrix=matrix(results, confusion),
        pairs=pairs(results, confusion),
        classes=classes(results),
        classes_cut=sum(entry["accuracy"] is not None for entry in results["per_class"]) > MOST_CLASSES,
        pictures=pictures,
        shown={"pretrained": "pretrained", "finetuned": "fine-tuned"}.get(results["neighbours_features"] or "", ""),
        facts=words.facts(results, settings),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        commands=commands(results),
        loading=loading(folder),
    )


def scaled(results: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The lines of the table, and where on a common axis each figure and its interval stand, in per cent of the axis."""
    made = lines(results)
    lows = [cell.low for line in made for cell in (line.few, line.all) if cell]
    start = max(0.0, np.floor(10 * min(lows, default=0.0)) / 10 - (0.1 if min(lows, default=0.0) > 0.95 else 0.0))

    def place(fraction: float) -> float:
        return round(100 * (fraction - start) / (1 - start), 2)

    table = []
    for line in made:
        cells = [
            cell and {"cell": cell, "at": place(cell.top1), "low": place(cell.low), "span": max(0.8, place(cell.high) - place(cell.low))}
            for cell in (line.few, line.all)[: len(columns(results))]
        ]
        table.append({"what": line.what, "headline": line.headline, "cells": cells})
    return {"start": float(start), "end": 1.0}, table


def matrix(results: dict[str, Any], confusion: np.ndarray | None) -> Markup | None:
    if confusion is None or not 1 < len(confusion) <= MOST_CLASSES:
        return None
    return heat_map(confusion.tolist(), results["class_names"])


def pairs(results: dict[str, Any], confusion: np.ndarray | None) -> list[dict[str, Any]]:
    """The pairs that are mixed up most often: all that can be shown of many classes, a summary of few."""
    if confusion is None:
        return []
    names = results["class_names"]
    limit = MOST_PAIRS if len(confusion) > MOST_CLASSES else 5
    return [
        {"true": names[true], "taken": names[taken], "count": count, "of": int(confusion[true].sum())}
        for true, taken, count in most_confused(confusion, limit)
    ]


def classes(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Per-class accuracy, worst first where there are too many to show all."""
    known = [entry for entry in results["per_class"] if entry["accuracy"] is not None]
    return known if len(known) <= MOST_CLASSES else sorted(known, key=lambda entry: entry["accuracy"])[:MOST_PAIRS]


def commands(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(what it does, command) to repeat the run and to see how far luck goes."""
    config = results["config"] or "RUN/experiment.yaml"  # of a config that is not shipped all settings stand there
    given = "".join(f" {shlex.quote(override)}" for override in results["overrides"])
    moved = ("seed=", "finetune.label_seed=")  # by the sweep itself
    kept = "".join(f" {shlex.quote(override)}" for override in results["overrides"] if not override.startswith(moved))
    return [
        ("The same run again, in another folder", f"modicum run {config} --run AGAIN{given}"),
        ("Five seeds and draws of the labels: mean and spread", f"modicum sweep {config} --seeds 5{kept}"),
        ("Label a folder of new images with this classifier", "modicum predict RUN IMAGES --out labels.csv"),
    ]


def loading(folder: Path) -> dict[str, str] | None:
    """The lines that load the backbone without Modicum, from the README beside it."""
    for stage in ("finetune", "pretrain"):
        readme = folder / stage / "backbone" / "README.md"
        if readme.is_file():
            _, found, rest = readme.read_text(encoding="utf-8").partition("```python\n")
            if found:
                return {"folder": f"{stage}/backbone", "code": rest.partition("```")[0].rstrip()}
    return None


def markdown(folder: Path, results: dict[str, Any], settings: dict[str, Any]) -> str:
    """report.md: headline, table, facts and commands."""
    headline = results["headline"]["accuracy"]
    first = f"## {percent(headline)} with {results['headline']['labels']:,} labels\n\n" if headline is not None else ""
    code = "\n".join(f"# {what}\n{command}" for what, command in commands(results))
    load = loading(folder)
    parts = [
        f"# {words.plain(results['run'])}\n",
        first + "\n".join([*words.headline(results), *words.gains(results)]) + "\n",
        f"{words.plain(title(results))}\n",
        results_markdown(results),
        *(pretraining(folder) if results["init"] == "pretrain" else []),
        "## What was used\n",
        "\n".join(f"- **{name}**: {words.plain(value)}" for name, value in words.facts(results, settings)) + "\n",
        f"## How to repeat it\n\n```\n{code}\n```\n",
        *([f"## How to load the backbone\n\nIn `{load['folder']}`:\n\n```python\n{load['code']}\n```\n"] if load else []),
    ]
    return "\n".join(parts)


def pretraining(folder: Path) -> list[str]:
    """For report.md: what stage one watched, at its first reading and its last, and whether its embeddings collapsed."""
    rows = [f"| {what} | {first:.3g} | {last:.3g} |" for what, first, last in watched(folder)]
    if not rows:
        return []
    note = collapse_note(folder)
    return [
        "## Pretraining, as watched\n",
        *([f"{words.plain(note)}\n"] if note else []),
        "\n".join(["| | first reading | last reading |", "| --- | ---: | ---: |", *rows]) + "\n",
    ]
