"""The same chain over seeds and settings: every run in its own folder, mean and spread in one table.

A seed moves the initialisation, the order and the label draw, never the test set. Runs that agree in stage one (same seed, same
settings) share its backbone, which saves most of the time; what several of them have to judge alike (raw pixels, a random encoder,
a shared backbone) is judged by the first, and all runs of one process share its imports.
"""

import csv
import gc
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from modicum.config import load_experiment
from modicum.errors import InputError
from modicum.files import write_atomically
from modicum.pipelines.processes import as_they_end
from modicum.pipelines.summary import Row, csv_text, headline, markdown, summaries, table
from modicum.record import progress, say, standard_output
from modicum.run_folder import RunFolder
from modicum.session import Request, make_request, run_stages

MOVED = ("seed", "finetune.label_seed")  # by the sweep itself
FIXED = ("split_seed", "test_fraction")  # another test set is another question
DRAWN_FROM = ("root", "labels", "path_column", "label_column")  # test images, where data.test_fraction is given


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    variant: str  # key=value,... or "" where nothing but the seed varies
    seed: int
    overrides: tuple[str, ...]
    folder: Path


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
    jobs: int = 1,
) -> None:
    """Runs what is not done, writes sweep.csv and sweep.md and prints the table. Raises InputError naming the run that failed.

    With `skip_finetune` the question is the backbones alone: stages one and three. `jobs` runs at a time share the cores.
    """
    if "RANK" in os.environ:
        raise InputError("A sweep starts no ranks: under torchrun start its runs one by one, by `modicum run`.")
    root = run or Path("runs") / f"{Path(config).name.removesuffix('.yaml').removesuffix('.yml')}-sweep"
    members = list(_members(root, overrides, seeds, over))
    _refuse_incomparable(config, members)  # all mistakes before the first hour of work
    backbones = _backbones(config, members, root, init)
    folders = tuple(member.folder for member in members)
    _number_tables(root, members)
    rows: dict[Member, list[Row]] = {}
    # one bar for all, unless each run draws its own
    with progress("sweep", len(members), "runs", overall=True) if jobs > 1 else nullcontext(lambda: None) as advance:
        for wave in _waves(members, backbones):
            requests = {member: _request(config, member, root, init, backbones) for member in wave}
            requests = {member: replace(request, siblings=folders) for member, request in requests.items()}
            calls = {member: (request, _stages(request, skip_finetune), force) for member, request in requests.items()}
            with closing(as_they_end(_work, calls, jobs)) as done:  # closed, it stops what is still at work
                for member, seconds in done:
                    results = json.loads((requests[member].folder.stage("evaluate") / "results.json").read_text(encoding="utf-8"))
                    about = {"variant": member.variant, "seed": member.seed, "run": str(member.folder)}
                    rows[member] = [about | row for row in results["rows"]]
                    write_atomically(root / "sweep.csv", csv_text(_in_order(rows, members)))
                    took = "done already" if seconds is None else f"{seconds:.0f} s"
                    say(f"[{len(rows)}/{len(members)}] {member.folder}: {headline(results)}, {took}")
                    advance()
    found = summaries(_in_order(rows, members))
    write_atomically(root / "sweep.md", markdown(found))
    output = standard_output()
    output.print(table(f"{config}, {seeds} seeds: accuracy in per cent, mean ± sample standard deviation", found))
    output.print(f"Table: {root / 'sweep.md'}   every row of every run: {root / 'sweep.csv'}", markup=False)


def _work(request: Request, stages: Sequence[str], force: bool) -> float | None:
    """Seconds that the run took; None where all of it was done. Here or in a process of its own."""
    began = time.monotonic()
    try:
        worked = run_stages(request, stages, force=force, quiet=True)
    except InputError as error:
        raise InputError(f"{request.folder}: {error}") from error
    gc.collect()  # networks and images of this run, before the next one loads its own
    return time.monotonic() - began if worked else None


def _stages(request: Request, skip_finetune: bool) -> list[str]:
    return [stage for stage in request.stages if stage != "finetune" or not skip_finetune]


def _number_tables(root: Path, members: Iterable[Member]) -> None:
    """An earlier sweep's tables get a number in their names where they hold a run that this sweep has not, and would lose it."""
    path = root / "sweep.csv"
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        told = {(row.get("variant"), row.get("seed")) for row in csv.DictReader(file)}
    if told <= {(member.variant, str(member.seed)) for member in members}:
        return
    number = next(number for number in itertools.count(1) if not (root / f"sweep-{number}.csv").exists())
    for old in (path, path.with_suffix(".md")):
        if old.exists():
            old.rename(old.with_stem(f"sweep-{number}"))
    say(f"{path} is of a sweep with other runs; it is kept as sweep-{number}.csv.")


def _in_order(rows: dict[Member, list[Row]], members: Iterable[Member]) -> list[Row]:
    return [row for member in members for row in rows.get(member, ())]


def _members(root: Path, overrides: Sequence[str], seeds: int, over: Sequence[str]) -> Iterator[Member]:
    choices = [_choices(text) for text in over]
    for override in (*overrides, *(choice for values in choices for choice in values)):
        key = override.partition("=")[0]
        if key in MOVED:
            raise InputError(f"{key} is moved by the sweep itself; use --seeds.")
    for combination in itertools.product(*choices):
        variant = ",".join(combination)
        folder = root / variant.replace("/", "_") if variant else root
        for seed in range(seeds):
            moved = (f"seed={seed}", f"finetune.label_seed={seed}")
            yield Member(variant, seed, (*overrides, *combination, *moved), folder / f"seed-{seed}")


def _refuse_incomparable(config: str, members: Sequence[Member]) -> None:
    """Raises InputError for a member that cannot be, two that share a folder, or test sets that differ."""
    folders = Counter(member.folder for member in members)
    if shared := [str(folder) for folder, count in folders.items() if count > 1]:
        raise InputError(f"Two variants of the sweep would share the folder {shared[0]}: sweep over values whose names differ more.")
    settings = [load_experiment(config, member.overrides).data.model_dump() for member in members]
    for key in FIXED:
        if len({found[key] for found in settings}) > 1:
            raise InputError(f"--over data.{key} would compare figures from different test sets; set it once, as data.{key}=VALUE.")
    if settings[0]["test_fraction"] in ("auto", 0):
        return
    for key in DRAWN_FROM:
        if len({found[key] for found in settings}) > 1:
            raise InputError(
                f"--over data.{key} would compare figures from different test sets, since data.test_fraction draws test images from the "
                "labelled ones: name them in the CSV or lay them in a folder test instead."
            )


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


def _backbones(config: str, members: Iterable[Member], root: Path, init: str | None) -> dict[str, Member]:
    """Which run makes the backbone of each stage one that the sweep needs: fingerprint -> the first that has it."""
    makers: dict[str, Member] = {}
    for member in members:
        request = _request(config, member, root, init, {})
        if "pretrain" in request.stages:
            makers.setdefault(request.fingerprint("pretrain"), member)
    return makers


def _waves(members: Sequence[Member], backbones: dict[str, Member]) -> Iterator[list[Member]]:
    """Those who make backbones, then those who start from them."""
    makers = set(backbones.values())
    yield [member for member in members if member in makers]
    yield [member for member in members if member not in makers]


def _request(config: str, member: Member, root: Path, init: str | None, backbones: dict[str, Member]) -> Request:
    """The run's request; it starts from the backbone of another run with the same stage one, where there is one.

    A folder that was begun keeps its own start, so that a sweep may be widened later.
    """
    request = make_request(config, member.overrides, run=member.folder, init=init)
    if init is not None or "pretrain" not in request.stages:
        return request
    recorded = request.folder.recorded()
    maker = backbones.get(request.fingerprint("pretrain"), member)
    if recorded:
        start = Path(recorded["finetune"]["init"])
    elif maker != member:
        start = RunFolder(maker.folder).stage("pretrain") / "backbone"
    else:
        return request
    if not start.absolute().is_relative_to(root.absolute()):
        return request
    return make_request(config, member.overrides, run=member.folder, init=str(start))
