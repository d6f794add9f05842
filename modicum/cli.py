"""The command `modicum`. Only what is light is imported up here: help and finished runs answer at once."""

import errno
import functools
import importlib
import json
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.config import load_experiment
from modicum.data.fingerprint import input_fingerprint
from modicum.errors import InputError, Interrupted, ProcessLost
from modicum.explain import commented
from modicum.record import say, warn
from modicum.run_folder import RunFolder, in_words
from modicum.session import Request, make_request, prepare, run_stages, show_results
from modicum.session import dry_run as plan
from modicum.settings import Experiment
from modicum.signals import preempt

# What the paths of a command, or who may use them, can be wrong in.
UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}

app = typer.Typer(
    help="Unlabelled images and a modicum of labels in; an accurate classifier, a reusable backbone and an honest report out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Stage(StrEnum):
    pretrain = "pretrain"
    finetune = "finetune"
    evaluate = "evaluate"


Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped config such as digits", show_default=False)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings that beat the file's", show_default=False)]
Run = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="run folder; by default runs/<config name>", show_default=False)]
Init = Annotated[str | None, typer.Option("--init", metavar="PATH", help="a backbone folder or file to start from", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, with all settings; create nothing")]
Force = Annotated[bool, typer.Option("--force", help="clear and run again the stages that depend on changed settings")]
Nproc = Annotated[int, typer.Option("--nproc", min=1, metavar="N", help="processes on this machine that share each batch, as by torchrun")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def _with_exit_status(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command by its exit status and one clear sentence: 2 bad input, 130 interrupted, 75 preempted. A bug keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (InputError, Interrupted, KeyboardInterrupt, OSError, RuntimeError) as error:
            status, message = _ending(error)
            if status is None:
                raise
            if options.get("debug"):
                traceback.print_exc()
            print(f"modicum: {message}", file=sys.stderr)
            raise typer.Exit(status) from None

    return wrapped


def _ending(error: BaseException) -> tuple[int | None, str]:
    """Exit status and sentence of an expected end; no status for a bug."""
    if isinstance(error, InputError | Interrupted | ProcessLost):
        return error.exit_status, str(error) or "Stopped; the same command goes on from the last saved state."
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_status, "Interrupted; the same command goes on from the last saved state."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return 1, f"The disk is full{where}. Nothing saved is lost: make room, and the same command goes on from the last saved state."
    if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE:
        return InputError.exit_status, f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):  # raised by torch's signal handler, anywhere
        why = "most likely for want of memory, or of shared memory (/dev/shm)"
        return 1, f"A process that decodes images was lost, {why}: {error} The same command goes on from the last saved state."
    return None, ""


@app.command()
@_with_exit_status
def run(
    config: Config,
    overrides: Overrides = None,
    run: Run = None,
    init: Init = None,
    from_stage: Annotated[Stage | None, typer.Option("--from", help="run this stage and those after it again", show_default=False)] = None,
    nproc: Nproc = 1,
    dry_run: DryRun = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """The whole chain: pretrain, finetune, evaluate, report. Goes on from where it was and skips what is done.

    With --init, stage two starts from that backbone and stage one is skipped.
    """
    request = make_request(config, overrides or (), run=run, init=init)
    again = from_stage.value if from_stage else None
    options = {"--init": init, "--from": again, "--force": force, "--debug": debug}
    _share(nproc, request, request.stages, ["run", config, *(overrides or ())], options, dry=dry_run)
    _pipeline("run").run(request, force=force, again=again, dry=dry_run)


def _stage_command(stage: str, help: str) -> None:
    @app.command(stage, help=help)
    @_with_exit_status
    def command(
        config: Config,
        overrides: Overrides = None,
        run: Run = None,
        init: Init = None,
        nproc: Nproc = 1,
        dry_run: DryRun = False,
        force: Force = False,
        debug: Debug = False,
    ) -> None:
        request = make_request(config, overrides or (), run=run, init=init, init_stage=stage)
        options = {"--init": init, "--force": force, "--debug": debug}
        _share(nproc, request, [stage], [stage, config, *(overrides or ())], options, dry=dry_run)
        start = [f"pretrain.init={init}"] if stage == "pretrain" else ["--init", init]
        _one_stage(stage, [config, *(overrides or ()), *(start if init else ())], request, dry_run, force)


_stage_command("pretrain", "Stage one: unlabelled images to a backbone. With --init, training starts from those weights.")
_stage_command("finetune", "Stage two: a backbone, few labels and many unlabelled images to a classifier. With --init, from that backbone.")


@app.command()
@_with_exit_status
def evaluate(
    config: Config,
    overrides: Overrides = None,
    run: Run = None,
    init: Init = None,
    dry_run: DryRun = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Stage three: judge by kNN and linear probe, compare with the baselines, write the report."""
    request = make_request(config, overrides or (), run=run, init=init)
    _one_stage("evaluate", [config, *(overrides or ()), *(["--init", init] if init else ())], request, dry_run, force)
    if not dry_run:
        show_results(request.folder)


def _one_stage(stage: str, asked: Sequence[str], request: Request, dry: bool, force: bool) -> None:
    """`asked`: the words after `modicum run` that ask for the same."""
    if dry:
        for line in plan(request, [stage], force=force):
            print(line)
    elif not run_stages(request, [stage], force=force):
        say(f"{stage} is done in {request.folder}{_how_again(stage, asked, request)}")


def _how_again(stage: str, asked: Sequence[str], request: Request) -> str:
    """The command that runs the stage again, and what it does besides; none where the whole chain is without that stage."""
    if stage not in request.stages:
        return "."
    before = request.stages[: request.stages.index(stage)]
    missing = [name for name in before if not request.folder.finished(name, request.stages)]
    first = f"{in_words(missing)} first, not done yet, then " if missing else ""
    command = shlex.join(["modicum", "run", *asked, "--run", str(request.folder), "--from", stage])
    return f"; `{command}` runs {first}it again, and what follows."


def _share(nproc: int, request: Request, stages: Sequence[str], command: Sequence[str], options: dict[str, Any], *, dry: bool) -> None:
    """Ends with the status of `nproc` ranks that do the work; returns where there is none: one process, a dry run, all is done."""
    if nproc == 1:
        return
    launch = importlib.import_module("modicum.launch")
    launch.announce(nproc)
    force, again = options["--force"], options.get("--from")
    if dry or (again is None and all(request.done(stage) for stage in stages)):
        return
    for _ in plan(request, stages, force=force, again=again):
        pass  # bad input is refused here, by one process
    given = {"--run": str(request.folder), **options}.items()
    words = [word for key, value in given if value for word in ((key,) if value is True else (key, value))]
    raise typer.Exit(launch.launch([sys.executable, "-m", "modicum.cli", *command, *words], nproc))


@app.command()
@_with_exit_status
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder with a finished stage two", show_default=False)],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="a folder of images", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="CSV to write: path, class, confidence", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="overwrite FILE")] = False,
    debug: Debug = False,
) -> None:
    """Label a folder of images by the classifier of a run."""
    folder = RunFolder(run)
    recorded = folder.recorded()
    if recorded is None or not (folder.stage("finetune") / "done.json").is_file():
        raise InputError(f"{run} is no run folder with a finished stage two, so it has no classifier to predict with.")
    if out.exists() and not force:
        raise InputError(f"{out} is there already; give another --out, or --force to overwrite it.")
    hardware = importlib.import_module("modicum.hardware")
    chosen = hardware.choose_hardware(Experiment(device=recorded["device"], precision=recorded["precision"]))
    importlib.import_module("modicum.evaluate.predict").predict(folder.stage("finetune") / "classifier", images, out, chosen, force=force)
    say(f"Predictions: {out}")


@app.command()
@_with_exit_status
def sweep(
    config: Config,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="seeds and label draws 0 to N - 1", show_default=False)],
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None, typer.Option("--over", metavar="KEY=A,B,C", help="values to compare; may be repeated", show_default=False)
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="folder of the runs; by default runs/<config name>-sweep", show_default=False),
    ] = None,
    init: Init = None,
    skip_finetune: Annotated[bool, typer.Option("--skip-finetune", help="compare backbones: pretrain and evaluate alone")] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="runs at a time, which share the cores")] = 1,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """The same chain over seeds, methods, label counts: mean and spread in one table. Goes on from where it was."""
    options: dict[str, Any] = {"run": run, "init": init, "force": force, "skip_finetune": skip_finetune, "jobs": jobs}
    _pipeline("sweep").sweep(config, overrides or (), seeds=seeds, over=over or (), **options)


@app.command("config")
@_with_exit_status
def show_config(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="a YAML file or a shipped config", show_default=False)] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of a config instead, for editors")] = False,
    debug: Debug = False,
) -> None:
    """The resolved experiment: every setting, its value and its meaning. The output is a config itself."""
    if schema:
        print(json.dumps(Experiment.model_json_schema(), indent=2))
        return
    if config is None:
        raise InputError("Give a CONFIG, or --schema.")
    experiment = load_experiment(config, overrides or ())
    try:
        input_fingerprint(experiment.data)
    except InputError as error:
        warn(f"What depends on the data stays auto. {error}")
        print(commented(experiment), end="")
        return
    prepared = prepare(make_request(config, overrides or ()))
    print(commented(prepared.experiment, prepared.reasons), end="")


def _pipeline(name: str) -> Any:
    return importlib.import_module(f"modicum.pipelines.{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits by its status."""
    earlier = signal.signal(signal.SIGTERM, preempt)
    try:
        app(args=arguments, prog_name="modicum")
    finally:
        signal.signal(signal.SIGTERM, earlier)


def stage_main(stage: str) -> None:
    """`python -m STAGE ...` is `modicum STAGE ...`."""
    main([stage, *sys.argv[1:]])


if __name__ == "__main__":  # for torchrun, which takes a file or `-m MODULE`, not a command
    main()
