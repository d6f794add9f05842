"""What a run asks of the machine."""

import platform
import subprocess
import sys

import pytest
import torch

from modicum import hardware
from modicum.errors import InputError
from modicum.hardware import Hardware, choose_hardware
from modicum.settings import Experiment

TURNS = 5
SCRIPT = f"""
import resource
import sys
import torch
from modicum.hardware import choose_hardware
from modicum.settings import Experiment

if "chosen" in sys.argv:
    choose_hardware(Experiment())

def step():
    tensors = [torch.ones(10 * 2**20) for _ in range(3)]  # of 40 MiB, above what the C library keeps by itself

for _ in range({TURNS}):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TURNS}):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20)
"""


def cleared(*arguments: str) -> float:
    """MiB of fresh pages that the kernel has cleared for the tensors of TURNS steps."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone this is known")
def test_a_step_gets_the_memory_that_the_one_before_has_freed() -> None:
    assert cleared() > TURNS * 3 * 40 * 0.9  # or the tensors are too small to tell
    assert cleared("chosen") < 3 * 40


@pytest.mark.parametrize(("kind", "within"), [("cpu", 3), ("cuda", 1)])
def test_beside_a_gpu_the_host_works_with_one_thread(kind: str, within: int) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Hardware(torch.device(kind), "fp32", 3).host_work():
            assert torch.get_num_threads() == within
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_ranks_do_not_share_a_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hardware, "_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="2 ranks need a GPU each, and device = cuda:1 is one"):
        choose_hardware(Experiment(device="cuda:1"))
