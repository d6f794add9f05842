"""Compiled training: in place, resumed to the last bit, and left out with a reason where it cannot be."""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from modicum.compilation import LONG, PLACE, compile_backbones, earns_compilation
from modicum.data.stream import Batch
from modicum.errors import Interrupted
from modicum.hardware import Hardware
from modicum.loop import Monitor, Training
from modicum.method import Loss, Method, Progress
from modicum.networks import Backbone
from modicum.optim import SCHEDULES, parameter_groups
from modicum.randomness import generator
from modicum.settings import TeacherSettings
from modicum.teacher import Teacher, in_groups

STEPS = 6
COMPILED = Hardware(torch.device("cpu"), "fp32", 1, compile=True)


class Small(Backbone):
    """Enough of a backbone to be compiled in seconds; the norm's statistics are a state that a step for nothing must not move."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())


class View:
    """A sample whose one view is `x`; its permutation reverses it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        return self.x if order is None else self.x[order]

    def permutation(self) -> Tensor:
        return torch.arange(len(self.x)).flip(0)


class Line(Method):
    """Learns a sum, and to say what its average says."""

    def __init__(self, norm: Literal["bn", "shuffle_bn"]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = nn.Sequential(Small(), nn.Linear(8, 1))
        self.teacher = Teacher(self.student, TeacherSettings(norm=norm, momentum=0.9, groups=4))

    def forward(self, batch: Batch) -> Loss:
        x: Tensor = batch["x"]  # type: ignore[assignment]
        said = in_groups(self.student, x, self.teacher.groups)
        taught = self.teacher(View(x), 0)  # type: ignore[arg-type]
        return Loss((said - x.sum(dim=1, keepdim=True)).square().mean() + (said - taught).square().mean())

    def after_step(self, progress: Progress) -> None:
        self.teacher.update(self.student)


def training(folder: Path, hardware: Hardware, stop_at: int = -1, norm: Literal["bn", "shuffle_bn"] = "bn") -> Training:
    folder.mkdir(exist_ok=True)
    method = Line(norm)

    def batch(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return {"x": torch.randn(16, 4, generator=generator(0, step))}

    return Training(
        "line",
        method,
        batch,  # type: ignore[arg-type]
        torch.optim.SGD(parameter_groups([(method, 1.0)], 0.0), lr=0.1, momentum=0.9),
        SCHEDULES["cosine"],
        STEPS,
        16,
        folder,
        hardware,
        seed=0,
        log_every=1,
        monitors=[Monitor(2, lambda _: look(method.student))],
    )


@torch.no_grad()
def look(student: nn.Module) -> dict[str, float]:
    """As monitors do: in evaluation mode, at a size of its own, which must not be compiled."""
    seen = float(student.eval()(torch.ones(3, 4)).mean())
    student.train()
    return {"seen": seen}


@pytest.fixture(autouse=True)
def no_code_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, "")  # so that what the run sets is taken back
    monkeypatch.delenv(PLACE)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "shuffle_bn"])
def test_a_compiled_run_resumes_to_the_same_bits_and_lies_near_the_other(
    norm: Literal["bn", "shuffle_bn"], tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    def state(name: str) -> Any:
        return torch.load(tmp_path / name / "state.pt", weights_only=True)

    training(tmp_path / "plain", Hardware(torch.device("cpu"), "fp32", 1), norm=norm).run()
    training(tmp_path / "whole", COMPILED, norm=norm).run()
    with pytest.raises(Interrupted):
        training(tmp_path / "stopped", COMPILED, stop_at=3, norm=norm).run()
    again = training(tmp_path / "stopped", Hardware(torch.device("cpu"), "fp32", 1), norm=norm)
    again.run()
    assert again.hardware.compile  # from the state
    assert [module._compiled_call_impl is not None for module in again.method.modules() if isinstance(module, Small)] == [True, True]
    assert any((tmp_path / "whole" / "compiled").rglob("*.py"))
    assert_same(state("whole"), state("stopped"))
    assert state("plain")["method"].keys() == state("whole")["method"].keys()
    for name, value in state("plain")["method"].items():
        assert torch.allclose(state("whole")["method"][name], value, atol=1e-4), name
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "stopped")]
    assert metrics[0] == metrics[1]


def test_what_cannot_be_compiled_runs_as_it_is_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], assert_same: Callable[..., None]
) -> None:
    def compiler_is_missing(self: nn.Module, **_: object) -> None:
        def refuse(*_: object) -> None:
            raise RuntimeError("No working C++ compiler found\nin 20 lines")

        self._compiled_call_impl = refuse

    monkeypatch.setattr(nn.Module, "compile", compiler_is_missing)
    run = training(tmp_path / "tried", COMPILED)
    run.run()
    assert "line: not compiled, which changes nothing but speed (No working C++ compiler found)\n" in capsys.readouterr().err
    assert not run.hardware.compile
    training(tmp_path / "plain", Hardware(torch.device("cpu"), "fp32", 1)).run()
    assert_same(*(torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("tried", "plain")))


def test_left_auto_only_long_runs_on_several_threads_of_a_cpu_are_compiled() -> None:
    two, gpu = (Hardware(torch.device(kind), "bf16", threads=2) for kind in ("cpu", "cuda"))
    one = replace(two, threads=1)
    cases = (two, LONG), (two, LONG - 1), (one, LONG), (gpu, LONG)
    assert [earns_compilation(*case) for case in cases] == [True, False, False, False]


@pytest.mark.parametrize(
    ("before", "within"),
    [
        (None, "stage/compiled"),
        (f"{tempfile.gettempdir()}/torchinductor_me", "stage/compiled"),
        ("/scratch/torchinductor_me", "/scratch/torchinductor_me"),
        ("/scratch/compiled", "/scratch/compiled"),
    ],
)
def test_code_lies_in_the_stage_unless_somebody_has_named_a_place(before: str | None, within: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if before:
        monkeypatch.setenv(PLACE, before)
    seen: list[str] = []
    compile_backbones(nn.Sequential(), lambda: seen.append(os.environ[PLACE]), Path("stage/compiled"))
    assert seen == [within]
    assert os.environ.get(PLACE) == before  # the next stage's code lies in its own folder
