"""What is measured is kept: a table of rows, where they were measured, and both as text."""

import csv
import io
import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby
from pathlib import Path

from rich.table import Table

from benchmarks.pairs import BARE, Row
from modicum.files import write_atomically
from modicum.hardware import choose_hardware
from modicum.provenance import provenance
from modicum.settings import Experiment

RESULTS = Path(__file__).with_name("results.csv")
README = Path(__file__).with_name("README.md")
FRONT = README.parents[1] / "README.md"
START, END = "<!-- speed table -->", "<!-- /speed table -->"
PEERS = ("lightly", "kornia")
COLUMNS = [*(field.name for field in fields(Row)), "held"]
HEADLINES = {  # what the front page tells: case and setting -> its words for them
    ("pretraining", "resnet10_small, moco_v2, eman"): "MoCo v2 with EMAN, small network, 32 px",
    ("pretraining", "resnet18, moco_v2, eman"): "MoCo v2 with EMAN, ResNet-18, 32 px",
    ("fixmatch", "WRN-28-2, weak views apart"): "FixMatch, WideResNet-28-2, 64 + 448 images",
    ("views", "moco_v2, 32 px"): "MoCo v2 views, 32 px, one thread",
    ("neighbours", "10,000 queries in 60,000 x 512"): "exact kNN, 10,000 in 60,000 x 512, k 200",
    ("probe", "60,000 x 512"): "linear probe, 60,000 x 512, six strengths",
}
WORDS = {True: "yes", False: "no", None: ""}


def environment() -> str:
    """Hardware, versions, commit and day, on one line."""
    made = provenance()
    versions = [f"{name} {number}" for name, number in made.items() if name not in ("commit", "modified", "modicum") and number]
    for name in PEERS:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    commit = f"{str(made.get('commit', 'none'))[:9]}{' with changes' if made.get('modified') else ''}"
    machine = f"{processor_name()}, {os.cpu_count()} cores; {choose_hardware(Experiment(compile=False)).describe()}"
    return f"{machine}; {', '.join(versions)}; commit {commit}; {datetime.now(UTC):%d %B %Y}"


def processor_name() -> str:
    """The model's name, which Python itself does not know on Linux; with its numbers, since hypervisors give many models one name."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = (line.partition(":") for line in information.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines}
        if {"model name", "cpu family", "model"} <= about.keys():
            return f"{about['model name']} (family {about['cpu family']}, model {about['model']})"
    return platform.processor() or platform.machine()


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                line["case"],
                line["setting"],
                line["candidate"],
                float(line["median"]),
                float(line["best"]),
                line["unit"],
                float(line["ratio"]) if line["ratio"] else None,
                float(line["bar"]) if line["bar"] else None,
            )
            for line in csv.DictReader(file)
        ]


def keep(path: Path, case: str, rows: list[Row], place: str) -> None:
    """Replaces what the table at `path` holds of the case, in its place; the line on where it was measured, `place`, goes beside it."""
    of_case = {name: list(found) for name, found in groupby(read(path), lambda row: row.case)} | {case: rows}
    write(path, chain.from_iterable(of_case.values()))
    places = path.with_suffix(".json")
    known = json.loads(places.read_text(encoding="utf-8")) if places.is_file() else {}
    write_atomically(places, json.dumps(known | {case: place}, indent=2) + "\n")


def write(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()}
        writer.writerow(cells | {"held": WORDS[row.held]})
    write_atomically(path, text.getvalue())


def table(case: str, rows: Iterable[Row]) -> Table:
    """For the terminal: every candidate's figures."""
    shown = Table(title=case, title_justify="left")
    for name in ("setting", "candidate", "median", "best", "unit", "ours is better", "bar", "held"):
        shown.add_column(name, justify="right" if name in ("median", "best", "ours is better", "bar") else "left")
    for row in rows:
        ratio, bar = (times(value) if value is not None else "" for value in (row.ratio, row.bar))
        held = {True: "[green]yes", False: "[bold red]no", None: ""}[row.held]
        shown.add_row(row.setting, row.candidate, figure(row.median), figure(row.best), row.unit, ratio, bar, held)
    return shown


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(value: float) -> str:
    return f"{value:.2f} x" if value < 10 else f"{value:.0f} x"


def markdown(rows: Iterable[Row], places: dict[str, str]) -> str:
    """One line a setting: our figure, and how many times as good it is as each other's, with the bar where there is one."""
    lines = []
    for case, of_case in groupby(rows, lambda row: row.case):
        lines += [f"### {case}", "", places.get(case, ""), "", "| setting | ours | times as good as |", "|---|---:|---|"]
        for setting, of_setting in groupby(of_case, lambda row: row.setting):
            ours, *others = of_setting
            ratios = [(row, row.ratio) for row in (ours, *others) if row.ratio is not None]
            beside = "; ".join(f"{'what is asked' if row is ours else row.candidate} {times(ratio)}{_bar(row)}" for row, ratio in ratios)
            lines.append(f"| {setting} | {figure(ours.median)} {ours.unit} | {beside} |")
        lines.append("")
    return "\n".join(lines)


def _bar(row: Row) -> str:
    return "" if row.bar is None else f" (bar {row.bar:g}, {'held' if row.held else '**not held**'})"


def headlines(rows: Iterable[Row], places: dict[str, str]) -> str:
    """The front page's table: our figure, and how many times as fast it is as each peer; machine, commit and day without the versions."""
    where: list[str] = []
    lines = ["| the same work | Modicum | times as fast as | on |", "| --- | ---: | --- | ---: |"]
    for key, (ours, *others) in groupby(rows, lambda row: (row.case, row.setting)):
        if key in HEADLINES:
            place = re.sub("; python.*(?=; commit)", "", places.get(ours.case, "a machine that is not known"))
            if place not in where:
                where.append(place)
            peers = [(row.candidate.partition(",")[0], row.ratio) for row in others if row.ratio and row.candidate != BARE]
            beside = ", ".join(f"{name} {ratio:.{1 if ratio < 10 else 0}f}" for name, ratio in peers)
            lines.append(f"| {HEADLINES[key]} | {figure(ours.median)} {ours.unit} | {beside} | {where.index(place) + 1} |")
    numbered = (f"{number}. {place}" for number, place in enumerate(where, 1))
    return "\n".join(["Each row in one run, in turns; measured on:", "", *numbered, "", *lines, ""])


def write_table(results: Path = RESULTS, document: Path = README, front: Path = FRONT) -> None:
    """Puts what the kept results say between the markers of the documents."""
    rows, places = read(results), json.loads(results.with_suffix(".json").read_text(encoding="utf-8"))
    for path, made in ((document, markdown(rows, places)), (front, headlines(rows, places))):
        before, start, rest = path.read_text(encoding="utf-8").partition(START)
        _, end, after = rest.partition(END)
        assert start, f"{path} has lost its marker {START}"
        assert end, f"{path} has lost its marker {END}"
        write_atomically(path, f"{before}{start}\n\n{made}\n{end}{after}")
