"""What a sweep found: mean and spread over the seeds, as a table for people and the rows behind it for programs."""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from modicum.evaluate.table import BEST_K

Row = dict[str, Any]
HEADS = ("variant", "protocol", "features", "labels", "accuracy", "runs")
EVERY = "every variant"
KNN = ("knn", "knn_whitened")


@dataclass(frozen=True)
class Summary:
    """One protocol of one variant over the seeds; accuracies are fractions, `spread` the sample standard deviation (None for one run)."""

    variant: str
    protocol: str
    features: str
    labels: int
    mean: float
    spread: float | None
    count: int


def headline(results: Row) -> str:
    """The figure of one run in words, of its results.json: the classifier's accuracy, or else kNN's on the pretrained features."""
    found = results["headline"]
    if found["accuracy"] is not None:
        return f"{100 * found['accuracy']:.1f} % with {found['labels']:,} labels"
    nearest = [row for row in _quoted(results["rows"]) if (row["protocol"], row["features"]) == ("knn", "pretrained")]
    return f"{100 * nearest[-1]['top1']:.1f} % by kNN with {nearest[-1]['labels']:,} labels" if nearest else "no test images"


def _quoted(rows: Sequence[Row]) -> list[Row]:
    """Of kNN the one k that is quoted everywhere: 20, or the largest below it that a tiny bank holds."""
    best: dict[tuple[str, ...], int] = {}
    for row in rows:
        if row["protocol"] in KNN and row["k"] <= BEST_K:
            best[_question(row)] = max(row["k"], best.get(_question(row), 0))
    return [row for row in rows if row["protocol"] not in KNN or row["k"] == best.get(_question(row))]


def _question(row: Row) -> tuple[str, ...]:
    return row.get("run", ""), row["protocol"], row["features"], row["labels"]


def csv_text(rows: list[Row]) -> str:
    """Rows as CSV, with every column that any of them has; not by pandas, which would make a count with gaps a float."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Mean and spread over the seeds: the classifier, its supervised baselines, probes and kNN at one k; of each, all variants."""
    groups: dict[tuple[str, str, str, int], list[float]] = {}
    for row in _quoted(list(rows)):
        details = {"finetuned_weights": f": {row.get('weights')}"} | dict.fromkeys(KNN, f", k {row.get('k')}")
        protocol = row["protocol"] + details.get(row["protocol"], "")
        groups.setdefault((row["variant"], protocol, row["features"], row["labels"]), []).append(row["top1"])
    found = [
        Summary(*key, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
        for key, values in groups.items()
    ]
    first, places = {"finetuned": -2, "supervised": -1}, dict[tuple[str, str], int]()  # the rest as they come
    questions: dict[tuple[int, int, int], list[Summary]] = {}
    for summary in found:
        place = places.setdefault((summary.protocol, summary.features), len(places))
        questions.setdefault((first.get(summary.protocol, 0), place, summary.labels), []).append(summary)
    return [row for question in sorted(questions) for row in _once(questions[question])]


def _once(answers: list[Summary]) -> list[Summary]:
    """What is the same for every variant that has it, as pixels are and a backbone that all share, is one row."""
    same = {replace(answer, variant=EVERY) for answer in answers}
    return list(same) if len(same) == 1 < len(answers) else answers


def short(variant: str) -> str:
    """Without the sections of its keys, where the keys alone tell it: `finetune.method.teacher=none` is `teacher=none`."""
    bare = re.sub(r"(?<![\w.])(?:\w+\.)+(?=\w+=)", "", variant)
    keys = re.findall(r"(?<![\w.])\w+(?==)", bare)
    return bare if len(keys) == len(set(keys)) else variant


def _cells(summary: Summary) -> tuple[str, ...]:
    spread = f" ± {100 * summary.spread:.1f}" if summary.spread is not None else ""
    return (
        short(summary.variant),
        summary.protocol,
        summary.features,
        f"{summary.labels:,}",
        f"{100 * summary.mean:.1f}{spread}",
        str(summary.count),
    )


def markdown(found: Iterable[Summary]) -> str:
    """The table for sweep.md, in per cent."""
    lines = [HEADS, ("---", "---", "---", "---:", "---:", "---:"), *map(_cells, found)]
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        + "\n\nAccuracy in per cent: mean ± sample standard deviation over the runs.\n"
    )


def table(title: str, found: Iterable[Summary]) -> Table:
    """The same for a terminal, the fine-tuned classifiers in bold."""
    drawn = Table(title=Text(title), title_justify="left")
    for head in HEADS:
        drawn.add_column(head, justify="right" if head in {"labels", "accuracy", "runs"} else "left")
    for summary in found:
        drawn.add_row(*map(Text, _cells(summary)), style="bold green" if summary.protocol == "finetuned" else "")
    return drawn
