"""What several files of tests share: digits, short sessions of stage two, and a house of cardboard.

The house is the real command line, run folder and sessions, with stages that write a line instead of training.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from modicum import cli, session
from modicum.config import load_experiment
from modicum.data.images import Images
from modicum.data.sources import load_images
from modicum.data.splits import make_splits
from modicum.hardware import Hardware
from modicum.resolve import resolve
from modicum.run_folder import RESULTS, STAGES, RunFolder

SHORT = ("finetune.steps=3", "finetune.warmup_steps=0", "finetune.batch_size=8", "finetune.mu=2")
ACCURACY = {0: 0.9, 1: 0.8, 2: 0.7}  # of the seed


class House:
    """What the tests of the shell steer and look at."""

    def __init__(self) -> None:
        self.calls: list[str] = []  # the stages that worked
        self.fingerprint = "these images"  # of the data set
        self.act: dict[str, Callable[[Any], None]] = {}  # what a stage does after its line

    def stage(self, name: str) -> Callable[[Any], None]:
        def run(run: Any) -> None:
            self.calls.append(name)
            (run.folder.stage(name) / "state.pt").write_text("a state")
            self.act.get(name, lambda _: None)(run)
            result = run.folder.stage(name) / RESULTS[name]
            if name == "evaluate":
                write_results_of(result, ACCURACY[run.experiment.seed])
                run.folder.report.write_text("<html>")
            else:
                result.parent.mkdir(exist_ok=True)
                result.write_text(f"weights of seed {run.experiment.seed}")

        return run


def write_results_of(path: Path, accuracy: float) -> None:
    """A results.json as stage three writes it, as far as a table needs it."""
    common = {"labels": 40, "low": accuracy - 0.01, "high": accuracy + 0.01, "k": None}
    results = {
        "headline": {"accuracy": accuracy, "interval": [accuracy - 0.01, accuracy + 0.01], "labels": 40},
        "rows": [
            {"protocol": "knn", "features": "pretrained", "top1": accuracy - 0.2, **common, "k": 20},
            {"protocol": "finetuned", "features": "finetuned", "top1": accuracy, **common},
            {"protocol": "supervised", "features": "random", "top1": accuracy - 0.1, **common},
        ],
        "images": {"train": 1347, "test": 450, "labelled": 40, "all_labels": 1347, "a_class": 4},
        "methods": {"pretrain": "moco_v2", "finetune": "fixmatch"},
        "init": "pretrain",
        "dataset": "digits",
        "class_names": list("0123456789"),
        "notes": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))


def cardboard_splits(images: Any, settings: Any, num_refits: int) -> pd.DataFrame:
    labels = settings.labels if isinstance(settings.labels, int) else 40
    split = ["labelled"] * labels + ["unlabelled"] * 10 + ["test"] * 5
    return pd.DataFrame({"id": range(len(split)), "path": "x.png", "label": [at % 10 for at in range(len(split))], "split": split})


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> House:
    house = House()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "input_fingerprint", lambda settings: house.fingerprint)
    monkeypatch.setattr(cli, "input_fingerprint", lambda settings: house.fingerprint)

    def replace(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    hardware = SimpleNamespace(describe=lambda: "cardboard", device="cpu")
    replace("modicum.data.sources", load_images=lambda settings: SimpleNamespace(name=settings.name, class_names="0123456789"))
    replace("modicum.data.splits", make_splits=cardboard_splits, write_splits=lambda splits, path: splits.to_csv(path, index=False))
    monkeypatch.setattr("modicum.hardware.choose_hardware", lambda experiment: hardware)
    reason = SimpleNamespace(key="data.mirror", value=False, why="cardboard has no sides")
    replace("modicum.resolve", resolve=lambda experiment, images: (experiment, [reason]))
    for name in STAGES:
        replace(f"modicum.{name}.run", run=house.stage(name))
    return house


@pytest.fixture
def names() -> Callable[[str], list[str]]:
    """What a folder holds, hidden files apart."""
    return lambda folder: sorted(entry.name for entry in Path(folder).iterdir() if not entry.name.startswith("."))


@pytest.fixture
def modicum(house: House) -> Callable[..., int]:
    """The command line in this process: takes its arguments, returns its exit status."""

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        return int(ended.value.code or 0)

    return command


@pytest.fixture
def write_results() -> Callable[[Path, float], None]:
    return write_results_of


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Asserts that two nests of tensors and plain values, as a state is, are equal to the last bit."""

    def compare(one: Any, other: Any, path: str = "") -> None:
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), path
        elif isinstance(one, dict):
            assert one.keys() == other.keys(), path
            for key in one:
                compare(one[key], other[key], f"{path}/{key}")
        elif isinstance(one, list | tuple):
            for at, (a, b) in enumerate(zip(one, other, strict=True)):
                compare(a, b, f"{path}/{at}")
        else:
            assert one == other, path

    return compare


@pytest.fixture(scope="session")
def digits() -> Images:
    return load_images(load_experiment("digits").data)


@pytest.fixture
def session_of(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Images, a folder and settings -> a short session of stage two, with the settings in the file's `SMALL` below those given."""

    def make(images: Images, folder: Path, *overrides: str) -> Any:
        experiment, _ = resolve(load_experiment("digits", [*SHORT, *request.module.SMALL, *overrides]), images)
        splits = make_splits(images, experiment.finetune, experiment.evaluate.cross_validate)
        hardware = Hardware(torch.device("cpu"), "fp32", 1)
        run_folder, asked = RunFolder(folder), SimpleNamespace(siblings=())
        return SimpleNamespace(experiment=experiment, images=images, splits=splits, folder=run_folder, hardware=hardware, request=asked)

    return make
