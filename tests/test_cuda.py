"""On a GPU: the views and losses of the CPU, and the same bits again. Skipped where there is none."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.method import Method
from modicum.views.policies import build_policy
from modicum.views.recipes import PAPERS
from tests.test_end_to_end import EAGER, environment, modicum, states
from tests.test_methods import STEPS, VIEW, batch_for, begun, build, every_variant, optimizer_for, step

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in fp32, where CUDA's default rounds their inputs to ten bits; what sums in another order each time raises."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(False)


def last_loss(method: Method, device: str) -> float:
    """Of the second of two steps, since what a method remembers of an image is empty before."""
    method, batch = method.to(device), batch_for(method, device)
    begun(method, batch)
    return float(step(method, optimizer_for(method), batch, STEPS // 2))


@every_variant
def test_a_step_on_cuda_has_the_loss_of_one_on_the_cpu(stage: str, name: str, settings: dict[str, Any]) -> None:
    if name == "noisy_student":
        settings = settings | {"dropout": 0, "drop_path": 0}  # whose random numbers are the device's own
    expected = last_loss(build(stage, name, settings), "cpu")
    assert last_loss(build(stage, name, settings), "cuda") == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", PAPERS)
def test_a_view_made_on_cuda_is_the_one_made_on_the_cpu(name: str) -> None:
    policy, make = build_policy({"name": name}, **VIEW), torch.Generator()
    images = torch.randint(0, 256, (64, 1, 16, 16), generator=make.manual_seed(0), dtype=torch.uint8)
    draws = policy.draw(make, len(images))
    far = (policy(images.cuda(), draws).cpu() - policy(images, draws)).abs()
    assert (far > 1e-3).float().mean() < 1e-3  # a pixel at the edge of a step, as of posterize, may fall to either side


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_killed_on_cuda_goes_on_to_the_same_bits(precision: str, tmp_path: Path, assert_same: Callable[[Any, Any], None]) -> None:
    command = ["pretrain", "digits", "device=cuda", f"precision={precision}", "pretrain.epochs=6"]
    modicum(*command, "--run", "whole", cwd=tmp_path)
    process = subprocess.Popen([sys.executable, "-c", EAGER, *command, "--run", "killed"], cwd=tmp_path, env=environment())
    state = tmp_path / "killed" / "pretrain" / "state.pt"
    while process.poll() is None and not (state.is_file() and torch.load(state, map_location="cpu", weights_only=True)["step"] >= 40):
        pass
    assert process.poll() is None, "finished before it was killed"
    process.kill()
    process.communicate()
    modicum(*command, "--run", "killed", cwd=tmp_path)
    assert_same(states(tmp_path / "whole"), states(tmp_path / "killed"))
