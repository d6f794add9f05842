"""From a command to stages at work: what was asked, what is left to do, and only then what is heavy."""

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.config import flatten, load_experiment
from modicum.console_log import ConsoleLog
from modicum.data.fingerprint import input_fingerprint
from modicum.errors import InputError
from modicum.inputs import named_inputs, refuse_clearing, with_setting
from modicum.provenance import provenance
from modicum.record import is_rank_zero, say, standard_output
from modicum.run_folder import STAGES, Change, RunFolder, chain, depends, in_words
from modicum.settings import Experiment

if TYPE_CHECKING:
    import pandas as pd

    from modicum.data.images import Images
    from modicum.hardware import Hardware
    from modicum.resolve import Reason

NUMBER_WORDS = dict(zip(STAGES, ("one", "two", "three"), strict=True))


@dataclass(frozen=True)
class Request:
    """What a command asks for: known without importing anything heavy, so that a finished run is told at once."""

    name: str  # of the config
    experiment: Experiment  # as asked for, `auto` undecided
    folder: RunFolder
    inputs: dict[str, str]  # what the settings name outside the config -> fingerprint of its content
    siblings: tuple[Path, ...] = ()  # other run folders, which may have judged the same features

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of the whole chain."""
        return chain(self.experiment.finetune.init)

    def fingerprint(self, stage: str) -> str:
        """sha256 of the settings and inputs that the stage's result depends on."""
        settings = flatten(self.experiment.model_dump(mode="json")) | {f"inputs.{key}": value for key, value in self.inputs.items()}
        relevant = {key: value for key, value in settings.items() if depends(stage, key, self.experiment.finetune.init)}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()

    def done(self, stage: str) -> bool:
        return self.folder.done(stage, self.fingerprint(stage), self.stages)


@dataclass(frozen=True)
class Session:
    """All that a stage may know. `experiment` is resolved, `requested` as asked for; `splits` is `make_splits`'s table."""

    name: str
    experiment: Experiment
    requested: Experiment
    images: "Images"
    splits: "pd.DataFrame"
    folder: RunFolder
    hardware: "Hardware"
    request: Request
    log: ConsoleLog


def make_request(
    config: str, overrides: Iterable[str] = (), *, run: Path | None = None, init: str | None = None, init_stage: str = "finetune"
) -> Request:
    """The request of a command line; `init` is what the stage `init_stage` starts from. Raises InputError, and creates nothing."""
    experiment = load_experiment(config, overrides)
    if init is not None:
        experiment = with_setting(experiment, init_stage, init=init)
    experiment, named = named_inputs(experiment)
    inputs = {"data": input_fingerprint(experiment.data), **named}
    name = Path(config).name.removesuffix(".yaml").removesuffix(".yml")
    return Request(name, experiment, RunFolder(run or Path("runs") / name), inputs)


@dataclass(frozen=True)
class Prepared:
    """The heavy part of a session, still without a trace on the disk."""

    images: "Images"
    experiment: Experiment
    reasons: "list[Reason]"
    splits: "pd.DataFrame"
    hardware: "Hardware"

    @property
    def settings(self) -> dict[str, Any]:
        return self.experiment.model_dump(mode="json")


def prepare(request: Request, stages: Iterable[str] = ()) -> Prepared:
    """Loads the images, decides every `auto`, draws the labels for `stages`. Raises InputError for whatever cannot be."""
    from modicum.data.sources import load_images
    from modicum.data.splits import make_splits
    from modicum.hardware import choose_hardware
    from modicum.resolve import resolve

    images = load_images(request.experiment.data)
    experiment, reasons = resolve(request.experiment, images)
    splits = make_splits(images, experiment.finetune, experiment.evaluate.cross_validate)
    _refuse_few_classes(stages, splits, images)
    return Prepared(images, experiment, reasons, splits, choose_hardware(experiment))


def _refuse_few_classes(stages: Iterable[str], splits: "pd.DataFrame", images: "Images") -> None:
    """Raises InputError where nothing could be told apart; stage one needs no label, and stage three shows features without any."""
    labels = splits["label"][splits["split"] == "labelled"].unique()
    if not len(labels) and "finetune" in stages:
        raise InputError(
            f"No training image of {images.name} carries a label, which stage two needs: name them by data.labels or by sub-folders, or "
            "run `modicum pretrain` alone."
        )
    if len(labels) == 1 and {"finetune", "evaluate"} & set(stages):
        raise InputError(
            f"The labels of {images.name} know one class only, {images.class_names[labels[0]]!r}, and a classifier needs two or more: is "
            "data.root, or data.label_column, the right one? `modicum pretrain` alone needs no labels."
        )


def _to_clear(
    request: Request, prepared: Prepared, stages: Iterable[str], *, force: bool, again: str | None
) -> tuple[list[Change], list[str]]:
    """What has changed, and the stages whose results must go for it. Raises InputError where they may not, or `stages` lack a ground."""
    changes = request.folder.changes(prepared.settings, request.inputs)
    clearing = request.folder.stages_to_clear(changes, force=force, again=again)
    refuse_clearing(request.experiment, map(request.folder.stage, clearing))
    _need_stages_before(request, stages, clearing)
    return changes, clearing


def _refuse_missing_stage(request: Request, again: str | None) -> None:
    if again and again not in request.stages:
        raise InputError(f"--from {again}: stage two starts from {request.experiment.finetune.init}, so this run has no stage {again}.")


@contextmanager
def open_session(
    request: Request, stages: Iterable[str] = (), *, force: bool = False, again: str | None = None, quiet: bool = False
) -> Iterator[Session]:
    """Locks the folder, prepares the session, writes experiment.yaml and splits.csv; all bad input is refused before the folder is made.

    `stages` are to be run; `again` names the first stage to run again; `quiet` leaves only progress bars on the console. Under torchrun
    every rank opens the session, and the first one alone touches the folder.
    """
    from modicum import distributed

    _refuse_missing_stage(request, again)
    folder, log = request.folder, ConsoleLog(quiet)
    with ExitStack() as held:
        held.enter_context(log.copying())
        existed = folder.exists()
        if existed:
            held.enter_context(folder.lock())
        prepared = prepare(request, stages)
        if not existed:
            _need_stages_before(request, stages, ())
            held.enter_context(folder.lock())
        changes, clearing = _to_clear(request, prepared, stages, force=force, again=again)
        held.callback(distributed.stop)
        distributed.start(prepared.hardware.device)
        distributed.barrier()  # until every rank has found nothing to refuse
        if is_rank_zero():
            _write_settings(request, prepared, changes, clearing)
        yield Session(
            name=request.name,
            experiment=prepared.experiment,
            requested=request.experiment,
            images=prepared.images,
            splits=prepared.splits,
            folder=folder,
            hardware=prepared.hardware,
            request=request,
            log=log,
        )


def _write_settings(request: Request, prepared: Prepared, changes: list[Change], clearing: list[str]) -> None:
    """Makes the folder this experiment's: clears what must go, writes experiment.yaml and splits.csv."""
    from modicum.data.splits import write_splits

    folder = request.folder
    fresh = folder.recorded() is None
    cleared = folder.clear(clearing)
    if cleared:
        say(f"Cleared {in_words(cleared)} of {folder}.")
    if fresh or changes:
        folder.record(prepared.settings, {"config": request.name, **provenance(), "inputs": request.inputs})
        for line in summary(prepared):
            say(line)
    if fresh or changes or not (folder.path / "splits.csv").is_file():
        write_splits(prepared.splits, folder.path / "splits.csv")


def summary(prepared: Prepared) -> Iterator[str]:
    """What a person should know before a fresh run: the images, the labels, the hardware, every decided `auto` with its reason."""
    counts = prepared.splits["split"].value_counts()
    yield f"{prepared.images.name}: " + ", ".join(f"{counts[split]:,} {split}" for split in counts.index) + " images"
    yield f"hardware: {prepared.hardware.describe()}"
    for reason in prepared.reasons:
        yield f"{reason.key} = {reason.value} ({reason.why})"


def run_stage(session: Session, stage: str) -> None:
    """Runs a stage that is not done yet; it goes on from its own state.

    All ranks train; the first one alone writes, and evaluates.
    """
    from modicum import distributed

    distributed.barrier()  # until rank 0 has written what this stage reads
    if stage == "evaluate" and not is_rank_zero():
        return
    folder, request = session.folder, session.request
    if folder.finished(stage, request.stages):
        say(f"Stage {NUMBER_WORDS[stage]}, {stage}: done already.")
        if is_rank_zero() and not request.done(stage):  # the same settings, said in other words
            folder.mark_done(stage, request.fingerprint(stage), request.stages)
        return
    path = folder.stage(stage)
    path.mkdir(exist_ok=True)
    with session.log.writing_to(path / "console.log") if is_rank_zero() else nullcontext():
        say(f"Stage {NUMBER_WORDS[stage]}, {stage}: {'goes on' if folder.begun(stage) else 'begins'} in {path}")
        importlib.import_module(f"modicum.{stage}.run").run(session)
    if is_rank_zero():
        folder.mark_done(stage, request.fingerprint(stage), request.stages)


def _need_stages_before(request: Request, stages: Iterable[str], clearing: Iterable[str]) -> None:
    """Raises InputError where what the first of `stages` reads is not there, or would be cleared."""
    folder, init, stages = request.folder, request.experiment.finetune.init, tuple(stages)
    there = {stage for stage in request.stages if folder.finished(stage, request.stages)} - set(clearing)
    if stages[:1] == ("finetune",) and init == "pretrain" and "pretrain" not in there:
        raise InputError(f"{folder} has no finished pretrain stage to start from: run `modicum pretrain` first, or give --init.")
    if stages[:1] == ("evaluate",) and init in ("pretrain", "random") and not there & {"pretrain", "finetune"}:
        raise InputError(f"{folder} has no finished stage to evaluate: run `modicum run`, `modicum pretrain` or `modicum finetune` first.")


def run_stages(request: Request, stages: Iterable[str], *, force: bool = False, again: str | None = None, quiet: bool = False) -> bool:
    """Runs those of `stages` that are not done. False where there was nothing to do, told without heavy imports."""
    stages = tuple(stages)
    if again is None and all(request.done(stage) for stage in stages):
        return False
    with open_session(request, stages, force=force, again=again, quiet=quiet) as session:
        for stage in stages:
            run_stage(session, stage)
    return True


def dry_run(request: Request, stages: Iterable[str], *, force: bool = False, again: str | None = None) -> Iterator[str]:
    """Lines that say what `run_stages` would do; nothing is created. Raises what it would raise."""
    _refuse_missing_stage(request, again)
    folder = request.folder
    folder.exists()
    prepared = prepare(request, stages)
    changes, clearing = _to_clear(request, prepared, stages, force=force, again=again)
    yield f"Run folder: {folder}"
    for stage in stages:
        if stage in clearing and folder.stage(stage).is_dir():
            yield f"  {stage}: would be cleared and run again"
        elif folder.finished(stage, request.stages) and stage not in clearing:
            yield f"  {stage}: done, would be skipped"
        else:
            yield f"  {stage}: would {'go on from its state' if folder.begun(stage) else 'run'}"
    for change in changes:
        yield f"  changed: {change}"
    yield from summary(prepared)
    yield ""
    from modicum.explain import commented

    yield commented(prepared.experiment, prepared.reasons)


def show_results(folder: RunFolder) -> None:
    """Prints the table of a finished run, and where its report lies, on standard output."""
    if not is_rank_zero():
        return
    path = folder.stage("evaluate") / "results.json"
    table = importlib.import_module("modicum.evaluate.table").results_table(json.loads(path.read_text(encoding="utf-8")))
    output = standard_output()
    output.print(table)
    output.print(f"Report: {folder.report}", markup=False)
