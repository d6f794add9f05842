"""The loop: resume to the last bit, masked steps, what is recorded."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modicum import loop
from modicum.data.stream import Batch
from modicum.errors import InputError, Interrupted, Preempted
from modicum.hardware import Hardware
from modicum.loop import Training
from modicum.method import Loss, Method
from modicum.optim import SCHEDULES, Pace, parameter_groups
from modicum.randomness import generator
from modicum.record import Metrics

STEPS = 23


class Line(Method):
    """Fits a line through dropout, so that every source of randomness and state takes part."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, batch: Batch) -> Loss:
        x: Tensor = batch["x"]  # type: ignore[assignment]
        error = (self.student(x) - x.sum(dim=1, keepdim=True)).square().mean()
        return Loss(error, {"error": error})


def training(folder: Path, at: Any = None) -> Training:
    folder.mkdir(exist_ok=True)
    method = Line()

    def batch(step: int) -> dict[str, Tensor]:
        if at is not None:
            at(step)
        return {"x": torch.randn(16, 4, generator=generator(0, step))}

    optimizer = torch.optim.SGD(parameter_groups([(method, 1.0)], 0.0), lr=0.1, momentum=0.9)
    hardware = Hardware(torch.device("cpu"), "fp32", 1)
    return Training(
        "line",
        method,
        batch,  # type: ignore[arg-type]
        optimizer,
        SCHEDULES["cosine"],
        STEPS,
        16,
        folder,
        hardware,
        seed=0,
        log_every=5,
    )


@pytest.fixture
def assert_same_state(assert_same: Callable[[Any, Any], None]) -> Callable[[Path, Path], None]:
    def compare(one: Path, other: Path) -> None:
        assert_same(*(torch.load(folder / "state.pt", weights_only=True) for folder in (one, other)))
        assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()

    return compare


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
@pytest.mark.parametrize("stop_at", [0, 7, 14])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, stop_at: int, number: int, kind: type[Exception], assert_same_state: Callable[[Path, Path], None]
) -> None:
    training(tmp_path / "whole").run()
    with pytest.raises(kind, match=f"step {stop_at + 1} of {STEPS}"):
        training(tmp_path / "stopped", lambda step: os.kill(os.getpid(), number) if step == stop_at else None).run()
    training(tmp_path / "stopped").run()
    assert_same_state(tmp_path / "whole", tmp_path / "stopped")


def test_a_crash_between_two_saves_loses_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_state: Callable[[Path, Path], None]
) -> None:
    training(tmp_path / "whole").run()
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)  # saves after every step

    def crash(step: int) -> None:
        if step == 12:
            raise RuntimeError("the power is cut")

    with pytest.raises(RuntimeError, match="power"):
        training(tmp_path / "crashed", crash).run()
    training(tmp_path / "crashed").run()
    assert_same_state(tmp_path / "whole", tmp_path / "crashed")


def test_a_resumed_run_keeps_its_precision_and_threads(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        training(tmp_path, lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None).run()
    again = training(tmp_path)
    again.hardware = Hardware(torch.device("cpu"), "bf16", 2)
    again.run()
    assert (again.hardware.precision, again.hardware.threads) == ("fp32", 1)


@pytest.mark.parametrize("fast", [True, False])
def test_a_precision_that_the_processor_lacks_is_warned_of(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "has_fast_bf16", lambda device: fast)
    run = training(tmp_path)
    run.hardware = Hardware(torch.device("cpu"), "bf16", 1)
    run.run()
    assert ("takes many times as long as fp32" in capsys.readouterr().err) != fast


def test_metrics_hold_means_over_the_log_interval(tmp_path: Path) -> None:
    training(tmp_path).run()
    rows = Metrics.read(tmp_path / "metrics.csv")
    assert sorted({step for step, _, _ in rows}) == [5, 10, 15, 20, 23]
    assert {name for _, name, _ in rows} == {"loss", "loss/error", "lr"}


def test_a_part_stands_still_until_it_starts_and_keeps_a_rate_of_its_own(tmp_path: Path) -> None:
    run = training(tmp_path)
    first, last = run.method.student[0], run.method.student[3]  # type: ignore[index]
    groups = parameter_groups([(run.method, 1.0)], 0.1, {first: Pace(starts=0.5), last: Pace(scheduled=False)})
    run.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    healthy, weights, rates = run.batch, [first.weight.detach().clone()], []

    def watched(step: int) -> Any:
        weights.append(first.weight.detach().clone())
        rates.append({group["lr"] for group in run.optimizer.param_groups if any(p is last.weight for p in group["params"])})
        return healthy(step)

    run.batch = watched
    run.run()
    half = STEPS // 2 + 1  # 12 of 23: the first step that lies past the half
    assert all(torch.equal(weights[0], weight) for weight in weights[: half + 2])
    assert not torch.equal(weights[0], weights[half + 2])
    assert rates == [{0.1}] * STEPS


def test_a_step_without_finite_gradient_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = training(tmp_path)
    healthy = run.batch

    def with_one_overflow(step: int) -> Any:
        return {"x": healthy(step)["x"] * (1e30 if step == 11 else 1)}

    run.batch = with_one_overflow
    for module in run.method.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False  # it would keep the overflow
    run.run()
    assert "20% of the last steps up to 15" in capsys.readouterr().err
    assert all(torch.isfinite(parameter).all() for parameter in run.method.parameters())


def test_a_ruined_state_does_not_replace_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    run = training(tmp_path)
    run.log_every = STEPS

    def ruin(step: int) -> dict[str, Any]:
        if step == 5:
            next(run.method.parameters()).data.fill_(math.inf)
        return {"x": torch.ones(16, 4)}

    run.batch = ruin  # type: ignore[assignment]
    with pytest.raises(InputError, match="The last finite state stands in"):
        run.run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["method"].values())


@pytest.mark.parametrize("stopped", [False, True])
def test_a_state_whose_norms_alone_are_ruined_is_not_saved_nor_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 1e9 if stopped else -1)
    if stopped:
        with pytest.raises(Interrupted):
            training(tmp_path, lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 10 else None).run()
    run = training(tmp_path)
    run.log_every = STEPS
    healthy = run.batch

    def overflowing(step: int) -> Any:
        if step == 11 and stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": healthy(step)["x"] * (1e30 if step == 11 else 1)}

    run.batch = overflowing
    with pytest.raises(InputError, match="The state of line is no longer finite at step 12"):
        run.run()
    assert all(parameter.isfinite().all() for parameter in run.method.parameters())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 11
    assert all(value.isfinite().all() for value in state["method"].values())


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_diverged_stops_with_advice(tmp_path: Path, saved: bool) -> None:
    run = training(tmp_path)
    run.batch = lambda step: {"x": torch.full((16, 4), float("nan"))}  # type: ignore[dict-item]
    if saved:
        with pytest.raises(Interrupted):
            training(tmp_path, lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None).run()
    with pytest.raises(InputError, match="Lower the learning rate") as caught:
        run.run()
    assert ("state.pt" in str(caught.value)) == saved  # where there is none, none is promised
    assert ("--force, which deletes that state" in str(caught.value)) == saved


def other_method(path: Path) -> None:
    torch.save({"step": 3, "method": {"student.weight": torch.zeros(2)}, "optimizer": {}, "totals": {}, "hardware": {}}, path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(bytes(range(256))), "cannot be read"),
        (lambda path: path.write_text("hello, this is text"), "cannot be read"),
        (other_method, "does not fit this method"),
        (lambda path: torch.save([1, 2], path), "does not fit this method"),
        (lambda path: torch.save(torch.load(path, weights_only=True) | {"optimizer": {}}, path), "does not fit this method"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    training(tmp_path).run()
    damage(tmp_path / "state.pt")
    with pytest.raises(InputError, match=rf"state\.pt {sentence}: [^\n]+; delete it to start this stage anew\.$"):
        training(tmp_path).run()
