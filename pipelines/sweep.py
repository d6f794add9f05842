"""The same chain over seeds and settings: every run in its own folder, mean and spread in one table.

A seed moves the initialisation, the order and the label draw, never the test set. All runs share this process, which saves
the imports of each; runs that agree in stage one (same seed, same settings) share its backbone, which saves most of the time.
"""

import csv
import gc
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from modicum.config import load_experiment
from modicum.errors import InputError
from modicum.evaluate.table import BEST_K
from modicum.files import write_atomically
from modicum.record import say, standard_output
from modicum.session import Request, make_request, run_stages

MOVED = ("seed", "finetune.label_seed")  # by the sweep itself
FIXED = ("data.split_seed", "data.test_fraction")  # another test set is another question
Row = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    variant: str  # key=value,... or "" where nothing but the seed varies
    seed: int
    overrides: tuple[str, ...]
    folder: Path


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


def sweep(
    config: str,
    overrides: Sequence[str] = (),
    *,
    seeds: int,
    over: Sequence[str] = (),
    run: Path | None = None,
    init: str | None = None,
    force: bool = False,
    skip_finetune: bool = False,
) -> None:
    """Runs what is not done, writes sweep.csv and sweep.md and prints the table. Raises InputError naming the run that failed.

    With `skip_finetune` the question is the backbones alone: stages one and three.
    """
    if "RANK" in os.environ:
        raise InputError("A sweep runs in one process: under torchrun start its runs one by one, by `modicum run`.")
    root = run or Path("runs") / f"{Path(config).name.removesuffix('.yaml').removesuffix('.yml')}-sweep"
    members = list(_members(root, overrides, seeds, over))
    for member in members:  # all mistakes before the first hour of work
        load_experiment(config, member.overrides)
    backbones: dict[str, Path] = {}
    rows: list[Row] = []
    for number, member in enumerate(members, start=1):
        began = time.monotonic()
        try:
            request = _request(config, member, root, init, backbones)
            stages = [stage for stage in request.stages if stage != "finetune" or not skip_finetune]
            worked = run_stages(request, stages, force=force, quiet=True)
        except InputError as error:
            raise InputError(f"{member.folder}: {error}") from error
        if "pretrain" in request.stages:
            backbones.setdefault(request.fingerprint("pretrain"), request.folder.stage("pretrain") / "backbone")
        results = json.loads((request.folder.stage("evaluate") / "results.json").read_text(encoding="utf-8"))
        rows += [{"variant": member.variant, "seed": member.seed, "run": str(member.folder)} | row for row in results["rows"]]
        write_atomically(root / "sweep.csv", _csv(rows))
        took = f"{time.monotonic() - began:.0f} s" if worked else "done already"
        say(f"[{number}/{len(members)}] {member.folder}: {_headline(results)}, {took}")
        gc.collect()  # networks and images of the run, before the next one loads its own
    found = summaries(rows)
    write_atomically(root / "sweep.md", markdown(found))
    output = standard_output()
    output.print(_table(f"{config}, {seeds} seeds: accuracy in per cent, mean ± sample standard deviation", found))
    output.print(f"Table: {root / 'sweep.md'}   every row of every run: {root / 'sweep.csv'}", markup=False)


def _members(root: Path, overrides: Sequence[str], seeds: int, over: Sequence[str]) -> Iterator[Member]:
    choices = [_choices(text) for text in over]
    for override in (*overrides, *(choice for values in choices for choice in values)):
        key = override.partition("=")[0]
        if key in MOVED:
            raise InputError(f"{key} is moved by the sweep itself; use --seeds.")
    for key in FIXED:
        if any(values[0].startswith(f"{key}=") for values in choices):
            raise InputError(f"--over {key} would compare figures from different test sets; set it once, as {key}=VALUE.")
    for combination in itertools.product(*choices):
        variant = ",".join(combination)
        folder = root / variant.replace("/", "_") if variant else root
        for seed in range(seeds):
            moved = (f"seed={seed}", f"finetune.label_seed={seed}")
            yield Member(variant, seed, (*overrides, *combination, *moved), folder / f"seed-{seed}")


def _choices(text: str) -> list[str]:
    """`key=a,b` -> `key=a` and `key=b`; commas inside brackets do not separate."""
    key, separator, values = text.partition("=")
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if not separator or not key or not all(parts):
        raise InputError(f"--over {text!r} is not of the form KEY=A,B,C, for example --over finetune.labels=40,100.")
    if len(set(parts)) < len(parts):
        raise InputError(f"--over {text!r} names a value twice.")
    return [f"{key}={part}" for part in parts]


def _request(config: str, member: Member, root: Path, init: str | None, backbones: dict[str, Path]) -> Request:
    """The run's request; it starts from the backbone of an earlier run with the same stage one, where there is one.

    A folder that was begun keeps its own start, so that a sweep may be widened later.
    """
    request = make_request(config, member.overrides, run=member.folder, init=init)
    if init is not None or "pretrain" not in request.stages:
        return request
    recorded = request.folder.recorded()
    start = Path(recorded["finetune"]["init"]) if recorded else backbones.get(request.fingerprint("pretrain"))
    if start is None or not start.absolute().is_relative_to(root.absolute()):
        return request
    return make_request(config, member.overrides, run=member.folder, init=str(start))


def _headline(results: Row) -> str:
    headline = results["headline"]
    if headline["accuracy"] is not None:
        return f"{100 * headline['accuracy']:.1f} % with {headline['labels']:,} labels"
    nearest = [row for row in results["rows"] if _is_best_knn(row) and row["features"] == "pretrained"]
    return f"{100 * nearest[-1]['top1']:.1f} % by kNN with {nearest[-1]['labels']:,} labels" if nearest else "no test images"


def _is_best_knn(row: Row) -> bool:
    return row["protocol"] == "knn" and row["k"] == BEST_K


def _csv(rows: list[Row]) -> str:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Mean and spread over the seeds: the classifier, its supervised baselines, probes and kNN at one k; in the order of the rows."""
    groups: dict[tuple[str, str, str, int], list[float]] = {}
    for row in rows:
        if row["protocol"] != "knn" or _is_best_knn(row):
            detail = {"knn": f", k {BEST_K}", "finetuned_weights": f": {row.get('weights')}"}.get(row["protocol"], "")
            protocol = row["protocol"] + detail
            groups.setdefault((row["variant"], protocol, row["features"], row["labels"]), []).append(row["top1"])
    found = [
        Summary(*key, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
        for key, values in groups.items()
    ]
    order = ["finetuned", "supervised"]
    variants = list(dict.fromkeys(summary.variant for summary in found))
    return sorted(found, key=lambda s: (variants.index(s.variant), order.index(s.protocol) if s.protocol in order else len(order)))


def _cells(summary: Summary) -> tuple[str, ...]:
    spread = f" ± {100 * summary.spread:.1f}" if summary.spread is not None else ""
    return (
        summary.variant,
        summary.protocol,
        summary.features,
        f"{summary.labels:,}",
        f"{100 * summary.mean:.1f}{spread}",
        str(summary.count),
    )


HEADS = ("variant", "protocol", "features", "labels", "accuracy", "runs")


def markdown(found: Iterable[Summary]) -> str:
    lines = [HEADS, ("---", "---", "---", "---:", "---:", "---:"), *map(_cells, found)]
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        + "\n\nAccuracy in per cent: mean ± sample standard deviation over the runs.\n"
    )


def _table(title: str, found: Iterable[Summary]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="right" if head in {"labels", "accuracy", "runs"} else "left")
    for summary in found:
        table.add_row(*map(Text, _cells(summary)), style="bold green" if summary.protocol == "finetuned" else "")
    return table
