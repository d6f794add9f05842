"""The chain as a user runs it, from the command line, on real digits; small, so that it takes seconds."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

SMALL = [
    "pretrain.epochs=1", "pretrain.warmup_epochs=1", "pretrain.batch_size=64", "pretrain.optimizer={name: adamw, lr: 0.001}",
    "finetune.steps=10", "finetune.warmup_steps=10", "finetune.batch_size=16", "finetune.mu=2", "finetune.log_every=2",
    "evaluate.linear.strengths=[1.0]", "evaluate.bootstrap=50",
]  # fmt: skip
ROOT = Path(__file__).parent.parent
# Saves after every step, so that a kill anywhere finds a state to go on from.
EAGER = "import modicum.loop; modicum.loop.SAVE_SECONDS = -1; from modicum.cli import main; import sys; main(sys.argv[1:])"


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def modicum(*arguments: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "modicum", *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `modicum run digits` was run, in small."""
    cwd = tmp_path_factory.mktemp("finished")
    modicum("run", "digits", *SMALL, cwd=cwd)
    return cwd


def test_a_run_leaves_what_the_design_promises(finished: Path) -> None:
    run = finished / "runs" / "digits"
    for name in (
        "experiment.yaml", "splits.csv", "report.html", "report.md",
        "pretrain/metrics.csv", "pretrain/console.log", "pretrain/state.pt", "pretrain/done.json",
        "pretrain/backbone/config.json", "pretrain/backbone/model.safetensors", "pretrain/backbone/README.md",
        "finetune/metrics.csv", "finetune/state.pt", "finetune/done.json", "finetune/classifier/model.safetensors",
        "evaluate/results.csv", "evaluate/results.json", "evaluate/confusion.csv", "evaluate/neighbours.csv", "evaluate/predictions.csv",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results["headline"]["labels"] == 40
    low, high = results["headline"]["interval"]
    assert 0 <= low <= results["headline"]["accuracy"] <= high <= 1
    kinds = {(row["protocol"], row["features"], row["labels"]) for row in results["rows"]}
    for kind in [
        ("finetuned", "finetuned", 40), ("supervised", "random", 40), ("supervised", "pretrained", 40), ("supervised", "pretrained", 1347),
        *(("linear", features, labels) for features in ("pixels", "random", "pretrained") for labels in (40, 1347)),
        *(
            (protocol, features, labels)
            for protocol in ("knn", "knn_whitened") for features in ("pixels", "random", "pretrained") for labels in (40, 1347)
        ),
    ]:  # fmt: skip
        assert kind in kinds


def test_what_stage_two_asks_of_a_network_stage_three_does_not_ask_again(finished: Path) -> None:
    run = finished / "runs" / "digits"
    made = {path.stem: path.stat().st_mtime_ns for path in (run / "features").iterdir()}
    in_stage_two = {name for name, moment in made.items() if moment <= (run / "finetune" / "done.json").stat().st_mtime_ns}
    assert in_stage_two == {f"{name}_{what}" for name in ("pretrained", "finetuned") for what in ("train", "neighbours")}
    assert {"pretrained_test", "finetuned_test", "random_train", "random_test"} <= made.keys()


def test_the_number_of_labels_asked_for_is_the_number_used(finished: Path) -> None:
    with (finished / "runs" / "digits" / "splits.csv").open() as file:
        rows = list(csv.DictReader(file))
    labelled = [row["label"] for row in rows if row["split"] == "labelled"]
    assert sorted(labelled) == sorted(str(digit) for digit in range(10) for _ in range(4))
    assert sum(row["split"] == "test" for row in rows) == 450


def test_a_second_run_says_that_all_is_done_and_shows_the_table_again(finished: Path) -> None:
    started = time.monotonic()
    done = modicum("run", "digits", *SMALL, cwd=finished)
    assert "All done" in done.stderr
    assert "40 labels" in done.stdout
    assert "report.html" in done.stdout
    assert time.monotonic() - started < 60  # the five seconds are measured by tests/test_imports.py: nothing heavy is imported


def test_changed_settings_are_listed_and_refused(finished: Path) -> None:
    refused = modicum("run", "digits", *SMALL, "finetune.steps=12", "pretrain.log_every=7", cwd=finished, status=2)
    assert "finetune.steps: 10 -> 12" in refused.stderr
    assert "log_every" not in refused.stderr
    assert "Traceback" not in refused.stderr


def test_predict_labels_a_folder_of_images(finished: Path, tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    for number, pixels in enumerate(load_digits().images[:5]):
        Image.fromarray((pixels * 15.9).astype("uint8")).save(tmp_path / f"{number}.png")
    run = str(finished / "runs" / "digits")
    modicum("predict", run, str(tmp_path), "--out", str(tmp_path / "labels.csv"), cwd=tmp_path)
    with (tmp_path / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{number}.png" for number in range(5)]
    assert {row["class"] for row in rows} <= set("0123456789")
    assert (
        "is there already" in modicum("predict", run, str(tmp_path), "--out", str(tmp_path / "labels.csv"), cwd=tmp_path, status=2).stderr
    )


def states(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in sorted(folder.rglob("state.pt"))}


def test_a_run_killed_anywhere_goes_on_to_the_same_bits(finished: Path, tmp_path: Path, assert_same: Callable[[Any, Any], None]) -> None:
    """SIGKILL at random moments of both stages, then the same command again: every tensor equals the uninterrupted run's."""
    run, draw = tmp_path / "runs" / "digits", random.Random(os.getpid())
    moments = [
        ("pretrain/state.pt", draw.randrange(1, 20)),
        ("finetune/state.pt", draw.randrange(1, 9)),
        ("finetune/baselines/random/state.pt", 4),
    ]
    for state, step in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", EAGER, "run", "digits", *SMALL], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE
        )
        while process.poll() is None:
            if (run / state).is_file() and torch.load(run / state, weights_only=True)["step"] >= step:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"finished before step {step} of {state}"
    modicum("run", "digits", *SMALL, cwd=tmp_path)
    reference = finished / "runs" / "digits"
    assert_same(states(reference), states(run))
    for name in (
        "pretrain/metrics.csv",
        "finetune/metrics.csv",
        "pretrain/backbone/model.safetensors",
        "finetune/classifier/model.safetensors",
    ):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    assert (run / "evaluate" / "predictions.csv").read_text() == (reference / "evaluate" / "predictions.csv").read_text()


def test_runs_of_a_sweep_in_several_processes_have_the_bits_of_single_ones(finished: Path, tmp_path: Path) -> None:
    options = "--seeds", "1", "--jobs", "2", "--over", "finetune.labels=40,50,60", "finetune.baselines=[]"
    done = modicum("sweep", "digits", *options, *SMALL, cwd=tmp_path)
    assert [line[:5] for line in done.stderr.splitlines() if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    name = "finetune/classifier/model.safetensors"
    run = tmp_path / "runs/digits-sweep/finetune.labels=40/seed-0"
    assert (run / name).read_bytes() == (finished / "runs" / "digits" / name).read_bytes()
    for labels in (50, 60):
        settings = yaml.safe_load((tmp_path / f"runs/digits-sweep/finetune.labels={labels}/seed-0/experiment.yaml").read_text())
        assert settings["finetune"]["init"] == str(run / "pretrain" / "backbone")
        features = {path.stem for path in (tmp_path / f"runs/digits-sweep/finetune.labels={labels}/seed-0/features").iterdir()}
        assert {"finetuned_train", "finetuned_test", "finetuned_neighbours"} <= features
        assert not any(name.startswith(("pretrained", "random")) for name in features)  # the first run had them


def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        command = [sys.executable, "-c", EAGER, "pretrain", "digits", *SMALL]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        earlier = (tmp_path / "runs/digits/pretrain/state.pt").stat().st_mtime_ns if status == 130 else 0
        while process.poll() is None:
            state = tmp_path / "runs/digits/pretrain/state.pt"
            if state.is_file() and state.stat().st_mtime_ns != earlier:
                process.send_signal(number)
                break
            time.sleep(0.01)
        _, error = process.communicate()
        assert process.returncode == status, error
        assert "the same command goes on from there" in error


def write_tree(root: Path, count: int) -> list[tuple[str, str]]:
    """Real digits as PNG files in nested folders; returns (path, label)."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, rows = load_digits(), []
    for number in range(count):
        label = int(digits.target[number])
        path = root / f"batch{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype("uint8")).save(path)
        rows.append((path.relative_to(root).as_posix(), f"digit {label}"))
    return rows


def test_a_folder_with_a_csv_most_of_it_unlabelled(tmp_path: Path) -> None:
    rows = write_tree(tmp_path / "images", 300)
    with (tmp_path / "labels.csv").open("w") as file:
        file.write("file,what\n" + "".join(f"{path},{label}\n" for path, label in rows[:120]))
    settings = ["data.root=images", "data.labels=labels.csv", "data.path_column=file", "data.label_column=what", "data.mirror=false"]
    folder = [item for item in SMALL if "optimizer" not in item]
    folder += ["data.image_size=16", "backbone.name=resnet10_small"]
    refused = modicum("run", "folder", *settings, *folder, "evaluate.cross_validate=50", cwd=tmp_path, status=2)
    assert "evaluate.cross_validate = 50" in refused.stderr
    assert not (tmp_path / "runs").exists()
    modicum("run", "folder", *settings, *folder, "evaluate.cross_validate=2", cwd=tmp_path)
    run = tmp_path / "runs" / "folder"
    results = json.loads((run / "evaluate/results.json").read_text())
    assert results["headline"]["accuracy"] is None  # no test images, so no claim
    assert {row["protocol"] for row in results["rows"]} == {"finetuned_cross_validated", "linear_cross_validated"}
    [refitted] = [row for row in results["rows"] if row["protocol"] == "finetuned_cross_validated"]
    assert (refitted["folds"], refitted["images"]) == (2, 120)
    with (run / "evaluate/predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 180
    assert {row["class"] for row in predictions} <= {f"digit {digit}" for digit in range(10)}


def test_bad_input_creates_no_folder(tmp_path: Path) -> None:
    refused = modicum("run", "digits", "pretrain.method.queue_size=100000", cwd=tmp_path, status=2)
    assert "larger than the data set" in refused.stderr
    refused = modicum("run", "digits", "finetune.labels=100000", cwd=tmp_path, status=2)
    assert "labels" in refused.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "evaluate"])
def test_a_bare_checkout_runs_its_stages_as_modules(stage: str) -> None:
    done = subprocess.run([sys.executable, "-m", stage, "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "CONFIG" in done.stdout


def test_the_shell_pipeline_is_the_same_chain(finished: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "modicum"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m modicum "$@"\n')
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "pipelines" / "digits.sh", *SMALL], cwd=tmp_path, env=environment() | path, check=True, capture_output=True)
    one, other = (json.loads((folder / "runs/digits/evaluate/results.json").read_text()) for folder in (finished, tmp_path))
    assert one["rows"] == other["rows"]
