"""The benchmarks say what they measured: turns, medians, ratios and bars; and every case still runs."""

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.__main__
from benchmarks import neighbours, pairs, results
from benchmarks.__main__ import CASES, LONG, main
from benchmarks.pairs import Row
from modicum.hardware import Hardware
from modicum.loop import Training
from modicum.method import Loss, Method
from modicum.optim import SCHEDULES, build_optimizer, parameter_groups
from modicum.settings import OptimizerSettings

CHECKOUT = Path(results.__file__).parent.parent


class FakeClock:
    """Time that passes only where work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def work() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


def test_candidates_take_turns_and_the_first_round_warms_up() -> None:
    clock = FakeClock()
    seconds = pairs.take_turns({"ours": clock.work("a", 9, 1, 2), "peer": clock.work("b", 9, 5, 6)}, 2, clock)
    assert clock.log == ["a", "b"] * 3
    assert seconds == {"ours": [1, 2], "peer": [5, 6]}


def test_what_is_too_slow_to_repeat_is_run_once() -> None:
    clock = FakeClock()
    seconds = pairs.take_turns({"ours": clock.work("a", 1), "peer": clock.work("b", 5)}, 3, clock, warm_up=False, once=["peer"])
    assert clock.log == ["a", "b", "a", "a"]
    assert seconds == {"ours": [1, 1, 1], "peer": [5]}


def test_a_ratio_is_of_medians_and_says_how_many_times_as_good_ours_is() -> None:
    ours, peer = pairs.compared("case", "setting", {"ours": [1, 2, 9], "peer": [4, 8, 8]}, bars={"peer": 4.0})
    assert (ours.median, ours.best, ours.ratio, ours.held) == (2, 1, None, None)
    assert (peer.median, peer.best, peer.unit, peer.ratio, peer.held) == (8, 4, "s", 4.0, True)


def test_a_rate_counts_what_each_candidate_does_in_a_round() -> None:
    ours, peer = pairs.compared(
        "case", "s", {"ours": [2, 2], "peer": [1, 4]}, unit="images/s", amounts={"ours": 100, "peer": 5}, bars={"peer": 26}
    )
    assert (ours.median, peer.median, peer.best) == (50, 2, 5)
    assert (peer.ratio, peer.held) == (25, False)


class Counting(Method):
    """A method whose step costs a second on the fake clock, and ten the first time."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.student = torch.nn.Linear(1, 1)
        self.step = clock.work("step", 10, 1)

    def forward(self, batch: object) -> Loss:
        self.step()
        return Loss(self.student(torch.ones(1, 1)).sum())


def test_a_real_training_run_takes_turns_with_its_peers(tmp_path: Path) -> None:
    clock = FakeClock()
    method = Counting(clock)
    training = Training(
        title="counting",
        method=method,
        batch=lambda step: {},
        optimizer=build_optimizer(
            OptimizerSettings(name="sgd", lr=0.1, momentum=0.9, nesterov=False), parameter_groups([(method, 1.0)], 0.0)
        ),
        schedule=SCHEDULES["constant"],
        steps=1000,
        batch_size=1,
        folder=tmp_path,
        hardware=Hardware(torch.device("cpu"), "fp32", torch.get_num_threads()),
        seed=0,
    )
    seconds = pairs.train_in_turn(training, 3, {"peer": clock.work("peer", 5)}, 2, clock)
    assert clock.log == [*["step"] * 3, "peer"] * 3
    assert seconds == {"ours": [3, 3], "peer": [5, 5]}


ROWS = [
    Row("views", "weak, 28 px", "ours", 2000.0, 2100.0, "views/s"),
    Row("views", "weak, 28 px", "kornia", 250.0, 260.0, "views/s", 8.0, 6.0),
    Row("views", "weak, 28 px", "PIL", 500.0, 510.0, "views/s", 4.0, 20.0),
    Row("probe", "60,000 x 512", "ours", 1.5, 1.4, "s"),
    Row("probe", "60,000 x 512", "scikit-learn, same strengths", 36.0, 36.0, "s", 24.0, 20.0),
]


def test_results_are_kept_case_by_case(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.keep(path, "probe", ROWS[3:], "a machine")
    results.keep(path, "views", [Row("views", "old", "ours", 1.0, 1.0, "views/s")], "a machine")
    results.keep(path, "views", ROWS[:3], "a machine")
    assert results.read(path) == [*ROWS[3:], *ROWS[:3]]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["case", "setting", "candidate", "median", "best", "unit", "ratio", "bar", "held"]
    assert [line["held"] for line in lines] == ["", "yes", "", "yes", "no"]


def test_the_tables_stand_between_the_markers(tmp_path: Path) -> None:
    document, front, path = tmp_path / "README.md", tmp_path / "front.md", tmp_path / "results.csv"
    for page in (document, front):
        page.write_text(f"before\n{results.START}\nold\n{results.END}\nafter\n")
    results.keep(path, "views", ROWS[:3], "a machine")
    results.keep(path, "probe", ROWS[3:], "another")
    results.write_table(path, document, front)
    whole, short = document.read_text(), front.read_text()
    for text in (whole, short):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    assert "| weak, 28 px | 2,000 views/s | kornia 8.00 x (bar 6, held); PIL 4.00 x (bar 20, **not held**) |" in whole
    assert "a machine" in whole
    assert "| linear probe, 60,000 x 512, six strengths | 1.5 s | scikit-learn 24 | 1 |" in short
    assert "1. another\n\n" in short  # the machine of what is shown alone
    assert "weak" not in short  # not among the headlines


def test_a_result_names_hardware_versions_and_commit() -> None:
    told = results.environment()
    assert f"torch {version('torch')}" in told
    assert told.startswith(results.processor_name())
    assert re.search(r"\d+ cores; (cpu|cuda|mps).*(bf16|fp32).*; commit [0-9a-f]{9}", told)


def test_the_documents_say_what_the_kept_results_say(tmp_path: Path) -> None:
    copies = [Path(shutil.copy(page, tmp_path / f"{number}.md")) for number, page in enumerate((results.README, results.FRONT))]
    results.write_table(results.RESULTS, *copies)
    assert [copy.read_text() for copy in copies] == [results.README.read_text(), results.FRONT.read_text()]
    for key in results.HEADLINES:
        assert key in {(row.case, row.setting) for row in results.read(results.RESULTS)}


def test_a_wrong_neighbour_is_noticed_and_a_tie_is_not() -> None:
    bank = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]  # two rows alike
    queries = bank[:1]
    border = np.array([1.0])
    one, twice = np.array([[1] + [0] * (neighbours.K - 1)]), np.zeros((1, neighbours.K), dtype=np.int64)
    assert neighbours.exact_share(bank, queries, one, border) == 2 / neighbours.K
    assert neighbours.exact_share(bank, queries, twice, border) == 1 / neighbours.K
    assert neighbours.exact_share(bank, queries, twice + 2, border) == 0


@pytest.mark.skipif(not (neighbours.PROC / "clear_refs").exists(), reason="only Linux can tell")
def test_memory_that_is_gone_again_is_counted() -> None:
    grown = neighbours.peak_memory(lambda: np.ones(2**26, dtype=np.uint8)) / 2**20
    assert 62 < grown < 80  # the system counts pages a few hundred at a time


def test_settings_are_for_the_chain_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["views", "pretrain.epochs=1"])
    assert "name that case alone" in capsys.readouterr().err


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["coffee"])
    assert f"unknown case 'coffee': choose of {', '.join((*CASES, *LONG))}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "kept", "told"), [([], True, True), (["--results", "other.csv"], True, False), (["--quick"], False, False)]
)
def test_what_is_kept_is_told_in_the_documents(
    options: list[str], kept: bool, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks.__main__, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(benchmarks.__main__, "write_table", lambda: (tmp_path / "README.md").touch())
    monkeypatch.setattr(benchmarks.__main__, "rows_of", lambda case, quick, overrides: ROWS[3:])
    main(["probe", *options])
    assert bool(list(tmp_path.glob("*.csv"))) == kept
    assert (tmp_path / "README.md").exists() == told


def quick_run(cases: tuple[str, ...], path: Path) -> str:
    """Runs the cases as the command does, in seconds each; returns what it told."""
    command = [sys.executable, "-m", "benchmarks", *cases, "--quick", "--results", str(path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("quick") / "results.csv"
    return path, quick_run((*CASES, *LONG), path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_every_case_still_runs(case: str, everything: tuple[Path, str]) -> None:
    path, told = everything
    if f"{case} is skipped" in told:
        pytest.skip(told)
    rows = [row for row in results.read(path) if row.case == case]
    candidates = {row.candidate for row in rows}
    assert "ours" in candidates
    assert (len(candidates) > 1) == (case not in LONG)
    assert all(row.median > 0 and row.best > 0 for row in rows)


WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('lightly', 'kornia')))"  # in every process that Python starts


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("lightly") or find_spec("kornia")), reason="no extra is installed, so every run is one without")
def test_a_peer_that_is_not_installed_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = quick_run(("views", "neighbours"), tmp_path / "results.csv")
    assert "kornia is not installed" in told
    assert "lightly is not installed" in told
    rows = results.read(tmp_path / "results.csv")
    assert rows
    assert not [row for row in rows if row.candidate.startswith(("lightly", "kornia"))]
