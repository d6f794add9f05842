"""A sweep: seeds and settings, each in its own folder, resumed, and one table of mean and spread."""

import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from modicum.errors import InputError
from modicum.pipelines.summary import EVERY, short, summaries

Command = Callable[..., int]
Names = Callable[[str], list[str]]


def settings_of(folder: str) -> dict[str, Any]:
    return dict(yaml.safe_load(Path(folder, "experiment.yaml").read_text()))


def rows_of(folder: str, name: str = "sweep") -> list[dict[str, str]]:
    with Path(folder, f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_move_the_seed_and_the_labels_and_never_the_test_set(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("sweep", "digits", "--seeds", "3", "finetune.labels=40") == 0
    for seed in range(3):
        settings = settings_of(f"runs/digits-sweep/seed-{seed}")
        assert (settings["seed"], settings["finetune"]["label_seed"], settings["data"]["split_seed"]) == (seed, seed, 0)
    captured = capfd.readouterr()
    assert "80.0 ± 10.0" in captured.out  # 0.9, 0.8, 0.7
    assert "70.0 ± 10.0" in captured.out  # supervised
    lines = [line.rpartition(", ") for line in captured.err.splitlines() if line]
    assert [words for words, _, _ in lines] == [
        f"[{seed + 1}/3] runs/digits-sweep/seed-{seed}: {90 - 10 * seed}.0 % with 40 labels" for seed in range(3)
    ]  # one line a run, nothing else
    assert all(re.fullmatch(r"\d+ s", took) for _, _, took in lines)
    assert len(rows_of("runs/digits-sweep")) == 9  # every row of every run
    assert "| finetuned | finetuned | 40 | 80.0 ± 10.0 | 3 |" in Path("runs/digits-sweep/sweep.md").read_text()
    assert "Stage one, pretrain: begins" in Path("runs/digits-sweep/seed-0/pretrain/console.log").read_text()


def test_every_combination_has_its_folder(house: Any, modicum: Command, names: Names) -> None:
    command = [
        "sweep",
        "digits",
        "--seeds",
        "1",
        "--run",
        "out",
        "--over",
        "finetune.labels=40,100",
        "--over",
        "finetune.method=fixmatch,supervised",
    ]
    assert modicum(*command) == 0
    assert [name for name in names("out") if "=" in name] == [
        f"finetune.labels={labels},finetune.method={method}" for labels in (100, 40) for method in ("fixmatch", "supervised")
    ]
    settings = settings_of("out/finetune.labels=100,finetune.method=supervised/seed-0")
    assert (settings["finetune"]["labels"], settings["finetune"]["method"]["name"]) == (100, "supervised")
    assert {row["variant"] for row in rows_of("out")} == {name for name in names("out") if "=" in name}


def test_values_with_commas_of_their_own(house: Any, modicum: Command) -> None:
    assert modicum("sweep", "digits", "--seeds", "1", "--run", "out", "--over", "evaluate.knn.k=[1, 5],[20]") == 0
    assert settings_of("out/evaluate.knn.k=[1, 5]/seed-0")["evaluate"]["knn"]["k"] == [1, 5]
    assert settings_of("out/evaluate.knn.k=[20]/seed-0")["evaluate"]["knn"]["k"] == [20]


def test_runs_that_agree_in_stage_one_share_it(house: Any, modicum: Command) -> None:
    assert modicum("sweep", "digits", "--seeds", "2", "--run", "out", "--over", "finetune.labels=40,100") == 0
    assert house.calls.count("pretrain") == 2
    assert house.calls.count("finetune") == 4
    for seed in range(2):
        shared = Path(f"out/finetune.labels=40/seed-{seed}/pretrain/backbone").absolute()
        assert settings_of(f"out/finetune.labels=100/seed-{seed}")["finetune"]["init"] == str(shared)


def test_a_sweep_may_be_widened(house: Any, modicum: Command) -> None:
    assert modicum("sweep", "digits", "--seeds", "1", "--run", "out", "--over", "finetune.labels=40,100") == 0
    assert modicum("sweep", "digits", "--seeds", "2", "--run", "out", "--over", "finetune.labels=100,40,10") == 0
    assert house.calls.count("finetune") == 6
    assert {(row["variant"], row["seed"]) for row in rows_of("out")} == {
        (f"finetune.labels={labels}", seed) for labels in ("100", "40", "10") for seed in "01"
    }


def test_another_sweep_in_the_same_folder_keeps_the_tables_of_the_first(house: Any, modicum: Command) -> None:
    command = ["sweep", "digits", "--seeds", "1", "--run", "out", "--over"]
    for labels in ("40,100", "100,250", "40,250"):
        assert modicum(*command, f"finetune.labels={labels}") == 0
    found = {name: {row["variant"] for row in rows_of("out", name)} for name in ("sweep-1", "sweep-2", "sweep")}
    assert found == {
        name: {f"finetune.labels={count}" for count in labels.split(",")}
        for name, labels in (("sweep-1", "40,100"), ("sweep-2", "100,250"), ("sweep", "40,250"))
    }
    assert all(Path(f"out/{name}.md").is_file() for name in found)


def test_what_is_done_is_skipped(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert modicum("sweep", "digits", "--seeds", "2") == 0
    before = len(house.calls)
    capfd.readouterr()
    assert modicum("sweep", "digits", "--seeds", "2") == 0
    assert len(house.calls) == before
    captured = capfd.readouterr()
    assert captured.err.count("done already") == 2
    assert "85.0 ± 7.1" in captured.out


def test_init_is_passed_on(house: Any, modicum: Command) -> None:
    Path("weights.safetensors").write_text("weights")
    assert modicum("sweep", "digits", "--seeds", "2", "--init", "weights.safetensors") == 0
    assert "pretrain" not in house.calls


def test_backbones_are_compared_without_stage_two(house: Any, modicum: Command) -> None:
    assert modicum("sweep", "digits", "--seeds", "2", "--skip-finetune") == 0
    assert house.calls == ["pretrain", "evaluate"] * 2


def test_a_failing_run_is_named_and_stops_the_sweep(house: Any, modicum: Command, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(run: Any) -> None:
        if run.experiment.seed == 1:
            raise InputError("The loss is no longer finite.")

    house.act["finetune"] = fail
    assert modicum("sweep", "digits", "--seeds", "3") == 2
    assert "runs/digits-sweep/seed-1: The loss is no longer finite." in capfd.readouterr().err
    assert not Path("runs/digits-sweep/seed-2").exists()
    assert {row["seed"] for row in rows_of("runs/digits-sweep")} == {"0"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seed=3"], "seed is moved by the sweep"),
        (["--over", "finetune.label_seed=1,2"], "finetune.label_seed is moved by the sweep"),
        (["--over", "data.split_seed=1,2"], "different test sets"),
        (["--over", "data={name: digits, split_seed: 1},{name: digits, split_seed: 2}"], "different test sets"),
        (["data.test_fraction=0.2", "--over", "data.labels=a.csv,b.csv"], "data.labels would compare figures from different test sets"),
        (["data.test_fraction=0.2", "--over", "data.label_column=kind,genus"], "different test sets, since data.test_fraction draws"),
        (["data.test_fraction=0.2", "--over", "data.root=a,b"], "different test sets, since data.test_fraction draws"),
        (["--over", "finetune.init=a/b,a_b"], "would share the folder"),
        (["--over", "finetune.labels"], "KEY=A,B,C"),
        (["--over", "finetune.labels=40,"], "KEY=A,B,C"),
        (["--over", "finetune.labels=40,40"], "twice"),
        (["--over", "finetune.label=40,100"], "did you mean 'labels'"),
        (["--over", "finetune.steps=100,x"], "finetune.steps"),
    ],
)
def test_bad_input_runs_nothing(
    arguments: list[str], words: str, house: Any, modicum: Command, names: Names, capfd: pytest.CaptureFixture[str]
) -> None:
    assert modicum("sweep", "digits", "--seeds", "2", *arguments) == 2
    assert words in capfd.readouterr().err
    assert names(".") == []


def test_label_files_that_name_their_test_images_may_be_compared(house: Any, modicum: Command) -> None:
    assert modicum("sweep", "folder", "--seeds", "1", "--run", "out", "data.root=photos", "--over", "data.labels=a.csv,b.csv") == 0
    assert {row["variant"] for row in rows_of("out")} == {"data.labels=a.csv", "data.labels=b.csv"}


def test_mean_and_spread() -> None:
    values = [0.91, 0.95, 0.99, 0.9]
    rows = [{"variant": "", "protocol": "finetuned", "features": "finetuned", "labels": 40, "top1": value} for value in values]
    (summary,) = summaries(rows)
    assert (summary.mean, summary.spread, summary.count) == (statistics.fmean(values), statistics.stdev(values), 4)
    found = summaries({**row, "protocol": protocol, "k": k} for row in rows for k in (1, 20) for protocol in ("knn", "knn_whitened"))
    assert [(summary.protocol, summary.count) for summary in found] == [("knn, k 20", 4), ("knn_whitened, k 20", 4)]
    tiny = summaries({**rows[0], "protocol": "knn", "k": k, "run": "tiny"} for k in (1, 5, 10))
    assert [(summary.protocol, summary.count) for summary in tiny] == [("knn, k 10", 1)]
    (single,) = summaries(rows[:1])
    assert (single.mean, single.spread, single.count) == (0.91, None, 1)


def test_variants_stand_together_and_what_they_have_in_common_is_told_once() -> None:
    rows = [
        {"variant": variant, "seed": seed, "protocol": protocol, "top1": top1, "features": "pixels", "labels": labels}
        for variant, offset, labels in (("a", 0.0, 40), ("b", 0.1, 40), ("c", 0.2, 100))
        for seed in range(2)
        for protocol, top1 in (("linear", 0.5 + 0.1 * seed), ("finetuned", 0.7 + offset))
    ]
    assert [(summary.protocol, summary.labels, summary.variant, summary.count) for summary in summaries(rows)] == [
        ("finetuned", 40, "a", 2),
        ("finetuned", 40, "b", 2),
        ("finetuned", 100, "c", 2),
        ("linear", 40, EVERY, 2),
        ("linear", 100, "c", 2),
    ]
    only_one = [row for row in rows if row["variant"] == "a"]
    assert {summary.variant for summary in summaries(only_one)} == {"a"}


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("", ""),
        ("finetune.labels=40,finetune.method.teacher={norm: eman, momentum: 0.9}", "labels=40,teacher={norm: eman, momentum: 0.9}"),
        ("pretrain.method.teacher.norm=bn,finetune.method.teacher.norm=eman",) * 2,
        ("seed=1,data.root=/a.b/c=d", "seed=1,root=/a.b/c=d"),
    ],
)
def test_a_variant_is_told_as_shortly_as_it_can_be_told_from_others(variant: str, told: str) -> None:
    assert short(variant) == told
