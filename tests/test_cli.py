"""The command line: which commands there are and how each of them ends."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from modicum.errors import InputError, Interrupted, Preempted

COMMANDS = ["run", "pretrain", "finetune", "evaluate", "predict", "sweep", "config"]
LATER = ["compare", "inspect", "select", "export", "import"]
Command = Callable[..., int]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum(command, "--help") == 0
    output = capfd.readouterr().out
    assert "--debug" in output
    assert command in output


@pytest.mark.parametrize("command", LATER)
def test_no_command_before_its_time(command: str, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum(command) == 2
    assert "No such command" in capfd.readouterr().err


def test_help_lists_these_commands_alone(modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("--help") == 0
    listed = capfd.readouterr().out.split("Commands:")[1].strip().splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") or line[0].isalpha()] == COMMANDS


def test_usage_errors_end_with_2(modicum: Command) -> None:
    assert (
        modicum("run")
        == modicum("run", "digits", "--nonsense")
        == modicum("sweep", "digits")
        == modicum("sweep", "digits", "--seeds", "0")
        == 2
    )


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("cat.png cannot be read."), 2, "cat.png cannot be read."),
        (Interrupted("Stopped after step 3."), 130, "Stopped after step 3."),
        (Preempted("Stopped after step 3."), 75, "Stopped after step 3."),
        (KeyboardInterrupt(), 130, "goes on from the last saved state"),
        (OSError(28, "No space left on device", "state.pt"), 1, "The disk is full at state.pt."),
        (PermissionError(13, "Permission denied", "labels.csv"), 2, "labels.csv cannot be used: Permission denied."),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "A process that decodes images was lost"),
    ],
)
def test_exit_statuses(
    error: BaseException, status: int, words: str, house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(run: Any) -> None:
        raise error

    house.act["pretrain"] = stop
    assert modicum("run", "digits") == status
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("modicum: ")
    assert words in last
    assert modicum("run", "digits", "--debug") == status
    captured = capfd.readouterr().err
    assert "Traceback" in captured
    assert words in captured


def test_no_traceback_without_debug(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("run", "digits", "pretrain.epoch=3") == 2
    assert capfd.readouterr().err == "modicum: digits: unknown key 'pretrain.epoch': did you mean 'epochs'?\n"


def test_a_bug_keeps_its_traceback(house: Any, modicum: Command) -> None:
    def crash(run: Any) -> None:
        raise ZeroDivisionError("a bug")

    house.act["pretrain"] = crash
    with pytest.raises(ZeroDivisionError, match="a bug"):
        modicum("run", "digits")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run", "here", "digits", "seed=1", "finetune.labels=40"],
        ["digits", "--run", "here", "seed=1", "finetune.labels=40"],
        ["digits", "seed=1", "--run", "here", "finetune.labels=40"],
        ["digits", "seed=1", "finetune.labels=40", "--run=here"],
    ],
)
def test_options_stand_anywhere(arguments: list[str], house: Any, modicum: Command) -> None:
    assert modicum("run", *arguments) == 0
    settings = yaml.safe_load(Path("here/experiment.yaml").read_text())
    assert (settings["seed"], settings["finetune"]["labels"]) == (1, 40)


def test_the_default_folder_has_the_name_of_the_config(house: Any, modicum: Command, names: Callable[[str], list[str]]) -> None:
    Path("mine.yaml").write_text("data: {name: digits}\n")
    assert modicum("run", "mine.yaml") == modicum("pretrain", "digits") == 0
    assert names("runs") == ["digits", "mine"]


def test_init_of_each_stage(house: Any, modicum: Command) -> None:
    Path("weights.safetensors").write_text("weights")
    for stage, section in (("pretrain", "pretrain"), ("finetune", "finetune")):
        assert modicum(stage, "digits", "--run", stage, "--init", "weights.safetensors") == 0
        assert yaml.safe_load(Path(stage, "experiment.yaml").read_text())[section]["init"] == str(Path("weights.safetensors").absolute())


def test_one_stage_at_a_time_is_the_chain(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert [modicum(stage, "digits") for stage in ("pretrain", "finetune", "evaluate", "run")] == [0, 0, 0, 0]
    assert house.calls == ["pretrain", "finetune", "evaluate"]
    captured = capfd.readouterr()
    assert captured.out.count("90.0 %") == 2
    assert "All done" in captured.err
    assert modicum("pretrain", "digits") == 0
    assert "pretrain is done in runs/digits" in capfd.readouterr().err


def test_how_to_run_a_stage_again_is_told_for_this_run(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    modicum("run", "digits")
    house.calls.clear()
    started = ["--init", "runs/digits/pretrain/backbone"]
    for stage, words in (("pretrain", ["seed=1", "--run", "one run"]), ("finetune", ["--run", "two", "seed=1", *started])):
        assert modicum(stage, "digits", *words) == modicum(stage, "digits", *words) == 0
        command = shlex.split(capfd.readouterr().err.rpartition("`")[0].rpartition("`")[2])
        assert modicum(*command[1:]) == 0
    assert house.calls == ["pretrain", "pretrain", "finetune", "evaluate", "finetune", "finetune", "evaluate"]


def test_no_command_is_told_for_a_stage_that_the_chain_is_without(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert modicum("pretrain", "digits", "finetune.init=random") == 0
    assert capfd.readouterr().err.rstrip().endswith("pretrain is done in runs/digits.")
    assert house.calls == ["pretrain"]


def test_what_runs_before_a_stage_that_is_run_again_is_told(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    for stage in ("pretrain", "evaluate", "evaluate"):
        assert modicum(stage, "digits") == 0
    told = capfd.readouterr().err
    assert "--from evaluate` runs finetune first, not done yet, then it again, and what follows." in told
    house.calls.clear()
    assert modicum(*shlex.split(told.rpartition("`")[0].rpartition("`")[2])[1:]) == 0
    assert house.calls == ["finetune", "evaluate"]


def test_predict(house: Any, modicum: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    calls = []
    fake = ModuleType("modicum.evaluate.predict")
    fake.predict = lambda *arguments, **options: calls.append((arguments, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modicum.evaluate.predict", fake)
    assert modicum("predict", "runs/digits", "photos", "--out", "labels.csv") == 2
    assert "runs/digits is no run folder" in capfd.readouterr().err
    modicum("run", "digits")
    assert modicum("predict", "runs/digits", "photos", "--out", "labels.csv") == 0
    ((classifier, images, out, _), options) = calls[0]
    assert (classifier, images, out) == (Path("runs/digits/finetune/classifier"), Path("photos"), Path("labels.csv"))
    assert options == {"force": False}
    Path("labels.csv").touch()
    assert modicum("predict", "runs/digits", "photos", "--out", "labels.csv") == 2
    assert modicum("predict", "runs/digits", "photos", "--out", "labels.csv", "--force") == 0
    assert len(calls) == 2


def test_config_prints_a_config_with_meanings(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("config", "digits", "finetune.labels=10%", "evaluate.knn.k=[1, 5]") == 0
    output = capfd.readouterr().out
    settings = yaml.safe_load(output)
    assert settings["finetune"]["labels"] == "10%"
    assert settings["evaluate"]["knn"]["k"] == [1, 5]
    assert "# where" in next(line for line in output.splitlines() if line.strip().startswith("root:"))
    assert "auto: cardboard has no sides" in output
    Path("again.yaml").write_text(output)
    assert modicum("config", "again.yaml") == 0
    assert capfd.readouterr().out == output


def test_config_without_its_data(house: Any, modicum: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def missing(settings: Any) -> str:
        raise InputError("There is no folder photos.")

    monkeypatch.setattr("modicum.cli.input_fingerprint", missing)
    assert modicum("config", "digits") == 0
    captured = capfd.readouterr()
    assert "There is no folder photos." in captured.err
    assert yaml.safe_load(captured.out)["data"]["mean"] == "auto"


def test_schema(modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("config", "--schema") == 0
    schema = json.loads(capfd.readouterr().out)
    assert {"seed", "data", "pretrain", "finetune", "evaluate"} <= schema["properties"].keys()
    method = schema["$defs"]["PretrainSettings"]["properties"]["method"]
    assert {choice["type"] for choice in method["anyOf"]} == {"string", "object"}
