"""Runs through the command line: what is done, what is refused, what goes on, and that nothing is lost or overwritten unasked."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import modicum as package
from modicum.errors import InputError, Interrupted
from modicum.record import say, warn

Command = Callable[..., int]
Names = Callable[[str], list[str]]


def test_a_run_leaves_its_settings_and_results(house: Any, modicum: Command) -> None:
    assert modicum("run", "digits", "finetune.labels=40") == 0
    assert house.calls == ["pretrain", "finetune", "evaluate"]
    settings = yaml.safe_load(Path("runs/digits/experiment.yaml").read_text())
    assert settings["finetune"]["labels"] == 40
    assert settings["provenance"]["modicum"] == package.__version__
    assert settings["provenance"]["torch"]
    assert settings["provenance"]["config"] == "digits"
    with Path("runs/digits/splits.csv").open(newline="") as file:
        assert sum(row["split"] == "labelled" for row in csv.DictReader(file)) == 40
    assert json.loads(Path("runs/digits/finetune/done.json").read_text())["after"] == ["pretrain"]


def test_what_is_done_is_skipped(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("run", "digits") == modicum("run", "digits") == 0
    assert house.calls == ["pretrain", "finetune", "evaluate"]
    captured = capfd.readouterr()
    assert "All done in runs/digits" in captured.err
    assert captured.out.count("90.0 %") == 2


def test_the_same_settings_in_other_words_are_done(house: Any, modicum: Command) -> None:
    assert modicum("run", "digits") == 0
    assert modicum("run", "digits", "seed=0", "finetune.method.threshold=0.9") == 0
    assert len(house.calls) == 3


def test_an_interrupted_stage_goes_on(house: Any, modicum: Command) -> None:
    def stop(run: Any) -> None:
        raise Interrupted("Stopped after step 3.")

    house.act["finetune"] = stop
    assert modicum("run", "digits") == 130
    assert not Path("runs/digits/finetune/done.json").exists()
    house.act.clear()
    assert modicum("run", "digits") == 0
    assert house.calls == ["pretrain", "finetune", "finetune", "evaluate"]


def test_changed_settings_are_listed_and_refused(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("run", "digits", "finetune.labels=40", "finetune.steps=10") == 0
    assert modicum("run", "digits", "finetune.labels=100", "finetune.steps=20", "evaluate.gallery_queries=3") == 2
    error = capfd.readouterr().err
    assert "finetune.labels: 40 -> 100\n" in error
    assert "finetune.steps: 10 -> 20\n" in error
    assert "gallery" not in error
    assert "--force" in error
    assert len(house.calls) == 3
    assert yaml.safe_load(Path("runs/digits/experiment.yaml").read_text())["finetune"]["labels"] == 40


def test_force_clears_only_what_depends(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    modicum("run", "digits", "finetune.labels=40")
    Path("runs/digits/finetune/old").touch()
    Path("runs/digits/pretrain/kept").touch()
    house.calls.clear()
    assert modicum("run", "digits", "finetune.labels=100", "--force") == 0
    assert house.calls == ["finetune", "evaluate"]
    assert Path("runs/digits/pretrain/kept").exists()
    assert not Path("runs/digits/finetune/old").exists()
    assert "Cleared finetune and evaluate of runs/digits" in capfd.readouterr().err
    assert yaml.safe_load(Path("runs/digits/experiment.yaml").read_text())["finetune"]["labels"] == 100
    with Path("runs/digits/splits.csv").open(newline="") as file:
        assert sum(row["split"] == "labelled" for row in csv.DictReader(file)) == 100


def test_force_without_a_change_keeps_everything(house: Any, modicum: Command) -> None:
    assert modicum("run", "digits") == modicum("run", "digits", "--force") == 0
    assert len(house.calls) == 3


def test_settings_of_stages_not_begun_may_change(house: Any, modicum: Command) -> None:
    assert modicum("pretrain", "digits", "finetune.labels=40") == 0
    assert modicum("run", "digits", "finetune.labels=100") == 0
    assert house.calls == ["pretrain", "finetune", "evaluate"]
    assert yaml.safe_load(Path("runs/digits/experiment.yaml").read_text())["finetune"]["labels"] == 100


def test_harmless_settings_pass(house: Any, modicum: Command) -> None:
    assert modicum("run", "digits") == modicum("run", "digits", "evaluate.gallery_queries=3", "pretrain.log_every=1") == 0
    assert len(house.calls) == 3


@pytest.mark.parametrize("made", ["baselines/random/state.pt", "classifier/model.safetensors"])
def test_a_stage_has_begun_with_a_baseline_and_with_a_classifier(made: str, house: Any, modicum: Command) -> None:
    """A method that takes no step leaves a classifier before the run's baselines begin, and no state."""

    def stop(run: Any) -> None:
        (run.folder.stage("finetune") / "state.pt").unlink()
        result = run.folder.stage("finetune") / made
        result.parent.mkdir(parents=True)
        result.touch()
        raise Interrupted

    house.act["finetune"] = stop
    assert modicum("run", "digits") == 130
    assert modicum("run", "digits", "finetune.steps=5") == 2


def test_what_a_stage_left_before_it_began_goes_with_a_change(house: Any, modicum: Command) -> None:
    def stop_early(run: Any) -> None:
        (run.folder.stage("pretrain") / "state.pt").unlink()
        (run.folder.stage("pretrain") / "collapse.json").touch()
        raise Interrupted

    house.act["pretrain"] = stop_early
    assert modicum("run", "digits") == 130
    house.act.clear()
    assert modicum("run", "digits", "pretrain.epochs=7") == 0
    assert not Path("runs/digits/pretrain/collapse.json").exists()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_nothing_is_cleared_that_the_run_would_start_from(
    stage: str, house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    modicum("run", "digits")
    inside = f"runs/digits/{stage}/{'backbone' if stage == 'pretrain' else 'classifier'}"
    assert modicum(stage, "digits", "--init", inside, "--force") == 2
    assert f"lies in runs/digits/{stage}, which this command would clear" in capfd.readouterr().err
    assert (Path(inside) / "model.safetensors").is_file()
    assert Path("runs/digits/report.html").is_file()


def test_a_stage_whose_result_is_gone_runs_again(house: Any, modicum: Command) -> None:
    modicum("run", "digits")
    house.calls.clear()
    Path("runs/digits/finetune/classifier/model.safetensors").unlink()
    assert modicum("run", "digits") == 0
    assert house.calls == ["finetune"]


def test_a_chain_without_labels_is_refused_before_it_begins(
    house: Any, modicum: Command, names: Names, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = sys.modules["modicum.data.splits"].make_splits
    monkeypatch.setattr(sys.modules["modicum.data.splits"], "make_splits", lambda *given: draw(*given).replace("labelled", "unlabelled"))
    assert modicum("run", "digits") == modicum("run", "digits", "--dry-run") == 2
    assert capfd.readouterr().err.count("No training image of digits carries a label") == 2
    assert names(".") == []
    monkeypatch.setattr(sys.modules["modicum.data.splits"], "make_splits", lambda *given: draw(*given).assign(label=3))
    assert modicum("run", "digits") == modicum("evaluate", "digits") == 2
    assert capfd.readouterr().err.count("The labels of digits know one class only, '3'") == 2
    assert names(".") == []
    assert modicum("pretrain", "digits") == 0


def test_changed_images_are_noticed(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    modicum("run", "digits")
    house.fingerprint = "other images"
    assert modicum("run", "digits") == 2
    assert "the images or labels in the data set have changed" in capfd.readouterr().err
    assert modicum("run", "digits", "--force") == 0
    assert house.calls == ["pretrain", "finetune", "evaluate"] * 2


def test_init_skips_stage_one_and_its_content_counts(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    modicum("run", "digits")
    house.calls.clear()
    command = ("run", "digits", "--run", "runs/new", "--init", "runs/digits/pretrain/backbone", "finetune.labels=100")
    assert modicum(*command) == modicum(*command) == 0
    assert house.calls == ["finetune", "evaluate"]
    assert modicum(*command, "pretrain.epochs=7") == 0  # moves nothing here
    assert len(house.calls) == 2
    Path("runs/digits/pretrain/backbone/model.safetensors").write_text("other weights")
    assert modicum(*command) == 2
    assert "the content of finetune.init has changed" in capfd.readouterr().err


def test_from_runs_a_stage_and_what_follows_again(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    modicum("run", "digits")
    house.calls.clear()
    assert modicum("run", "digits", "--from", "finetune") == 0
    assert house.calls == ["finetune", "evaluate"]
    assert "Cleared finetune and evaluate" in capfd.readouterr().err
    assert modicum("run", "digits", "--from", "finetune", "finetune.steps=3") == 0  # what has changed is cleared anyway
    assert modicum("run", "digits", "--from", "finetune", "finetune.steps=3", "pretrain.epochs=3") == 2
    assert Path("runs/digits/finetune/done.json").exists()
    assert modicum("run", "digits", "--from", "pretrain", "finetune.init=random") == 2


def test_evaluation_is_made_again_once_there_is_a_classifier(house: Any, modicum: Command) -> None:
    assert modicum("pretrain", "digits") == modicum("evaluate", "digits") == modicum("run", "digits") == 0
    assert house.calls == ["pretrain", "evaluate", "finetune", "evaluate"]


def test_a_stage_needs_the_one_before(house: Any, modicum: Command, names: Names, capfd: pytest.CaptureFixture[str]) -> None:
    for stage in ("finetune", "evaluate"):
        assert modicum(stage, "digits", "--dry-run") == modicum(stage, "digits") == 2
    assert names(".") == []
    error = capfd.readouterr().err
    assert "no finished pretrain stage" in error
    assert "no finished stage to evaluate" in error
    assert modicum("finetune", "digits", "finetune.init=random", "--run", "runs/fresh") == 0


def test_a_stage_does_not_clear_the_one_before(house: Any, modicum: Command) -> None:
    modicum("run", "digits")
    assert modicum("finetune", "digits", "pretrain.epochs=3", "--force") == 2
    assert Path("runs/digits/pretrain/done.json").is_file()
    assert Path("runs/digits/report.html").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain.epoch=3"],
        ["seed=x"],
        ["--init", "nowhere"],
        ["pretrain.init=random"],
        ["pretrain.init=pretrain"],
        ["--from", "pretrain", "finetune.init=random"],
    ],
)
def test_bad_input_creates_no_folder(arguments: list[str], house: Any, modicum: Command, names: Names) -> None:
    assert modicum("run", "digits", *arguments) == 2
    assert names(".") == []


def test_bad_input_found_late_creates_no_folder(house: Any, modicum: Command, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: Any) -> None:
        raise InputError("unreadable: cat.png")

    monkeypatch.setattr(sys.modules["modicum.data.sources"], "load_images", refuse)
    assert modicum("run", "digits") == 2
    assert names(".") == []


def test_the_console_is_kept_beside_the_results(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    def talk(run: Any) -> None:
        say("loss [0.5]")
        warn("low")

    house.act["finetune"] = talk
    assert modicum("run", "digits") == 0
    first = Path("runs/digits/pretrain/console.log").read_text()
    assert "data.mirror = False (cardboard has no sides)" in first  # decided before the first stage
    assert "40 labelled" in first
    second = Path("runs/digits/finetune/console.log").read_text()
    assert "loss [0.5]\nwarning low\n" in second
    assert "\x1b" not in first + second
    assert "loss [0.5]" in capfd.readouterr().err


def test_the_log_says_how_a_stage_ended(house: Any, modicum: Command) -> None:
    def crash(run: Any) -> None:
        raise ZeroDivisionError("a bug")

    house.act["pretrain"] = crash
    with pytest.raises(ZeroDivisionError):
        modicum("run", "digits")
    assert "Traceback" in Path("runs/digits/pretrain/console.log").read_text()
    house.act.clear()
    assert modicum("run", "digits") == 0
    assert Path("runs/digits/pretrain/console.log").read_text().count("--- ") == 2


def test_dry_run_creates_nothing(house: Any, modicum: Command, names: Names, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("run", "digits", "--dry-run", "finetune.labels=40") == 0
    assert names(".") == []
    output = capfd.readouterr().out
    assert "pretrain: would run" in output
    assert "data.mirror = False (cardboard has no sides)" in output
    assert "labels: 40 " in output
    modicum("run", "digits", "finetune.labels=40")
    assert modicum("run", "digits", "--dry-run", "finetune.labels=40") == 0
    assert "pretrain: done, would be skipped" in capfd.readouterr().out
    assert modicum("run", "digits", "--dry-run", "finetune.labels=100") == 2
    assert modicum("run", "digits", "--dry-run", "finetune.labels=100", "--force") == 0
    output = capfd.readouterr().out
    assert "pretrain: done, would be skipped" in output
    assert "finetune: would be cleared and run again" in output
    assert "changed: finetune.labels: 40 -> 100" in output
    assert Path("runs/digits/finetune/done.json").exists()
