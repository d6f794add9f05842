"""`--nproc N`: ranks of one machine that end as one process does."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import modicum as package
from modicum import launch
from modicum.errors import InputError

CHECKOUT = Path(package.__file__).parent.parent
LAUNCHER = """
import sys
sys.path.insert(0, {checkout!r})
from modicum import launch
launch.GRACE_SECONDS = 2.0
sys.exit(launch.launch([sys.executable, "-c", {rank!r}], 2))
"""


def start(rank: str) -> subprocess.Popen[str]:
    """A launcher in a process of its own, of two ranks that each run the program `rank`."""
    program = LAUNCHER.format(
        checkout=str(CHECKOUT), rank="import os, signal, sys, time\nrank = os.environ['RANK']\n" + textwrap.dedent(rank)
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> SimpleNamespace:
    output, error = process.communicate(timeout=600)
    return SimpleNamespace(status=process.returncode, output=output, error=error)


def test_ranks_meet_and_are_told_who_they_are() -> None:
    done = ended(
        start("""
        import torch.distributed as dist
        dist.init_process_group("gloo")
        everyone = [None, None]
        dist.all_gather_object(everyone, [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")])
        if rank == "0":
            print(everyone)
        dist.destroy_process_group()
        """)
    )
    assert (done.status, done.error) == (0, "")
    assert done.output == "[['0', '0', '2', '2'], ['1', '1', '2', '2']]\n"


@pytest.mark.parametrize("status", [2, 75, 130])
def test_an_end_on_purpose_is_told_once(status: int) -> None:
    done = ended(start(f"print('modicum: One sentence.', file=sys.stderr); time.sleep(0.3 * (rank == '0')); sys.exit({status})"))
    assert (done.status, done.error) == (status, "modicum: One sentence.\n")


def test_a_rank_that_dies_takes_the_others_with_it_and_its_words_are_shown() -> None:
    done = ended(
        start("""
        if rank == "1":
            raise ZeroDivisionError("a bug")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
        time.sleep(60)
        """)
    )
    assert done.status == 1
    assert "ZeroDivisionError: a bug" in done.error
    assert "Rank 1 of 2 ended with status 1; the same command goes on" in done.error


def test_a_killed_rank_is_named() -> None:
    done = ended(start("os.kill(os.getpid(), signal.SIGKILL) if rank == '0' else sys.exit(0)"))
    assert (done.status, done.error.splitlines()[-1]) == (
        1,
        "modicum: Rank 0 of 2 was killed by SIGKILL; the same command goes on from the last saved state.",
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_rank_and_decides_the_status(number: signal.Signals, status: int) -> None:
    """Rank 1 hears of the stop from rank 0, as ranks in a training loop do, and ends by another status."""
    process = start("""
    def stop(number, frame):
        os.write(1, b"stopped\\n")  # whole, where print may mix with the other rank's
        sys.exit(75 if rank == "1" or number == signal.SIGTERM else 130)
    signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
    os.write(1, b"ready\\n")
    time.sleep(60)
    """)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(number)
    done = ended(process)
    assert (done.status, done.output.splitlines()) == (status, ["stopped", "stopped"])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, house: Any) -> list[tuple[list[str], int]]:
    """What the command line hands to the launcher."""
    monkeypatch.setenv("WORLD_SIZE", "1")  # to be put back
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    calls: list[tuple[list[str], int]] = []

    def record(command: list[str], ranks: int) -> int:
        calls.append((command, ranks))
        return 75

    monkeypatch.setattr(launch, "launch", record)
    return calls


def test_the_command_is_handed_on(modicum: Callable[..., int], launched: list[tuple[list[str], int]], house: Any) -> None:
    Path("weights").write_text("weights")
    assert modicum("run", "digits", "--nproc", "2", "--from", "finetune", "--force", "seed=1", "--run", "here") == 75
    assert modicum("finetune", "digits", "--nproc=3", "--init", "weights", "--debug") == 75
    program = [sys.executable, "-m", "modicum.cli"]
    assert launched == [
        ([*program, "run", "digits", "seed=1", "--run", "here", "--from", "finetune", "--force"], 2),
        ([*program, "finetune", "digits", "--run", "runs/digits", "--init", "weights", "--debug"], 3),
    ]
    assert house.calls == []


def test_bad_input_and_dry_runs_start_no_ranks(
    modicum: Callable[..., int], launched: list[tuple[list[str], int]], house: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert modicum("run", "digits", "--nproc", "2", "pretrain.epoch=3") == 2
    assert capfd.readouterr().err == "modicum: digits: unknown key 'pretrain.epoch': did you mean 'epochs'?\n"
    assert modicum("pretrain", "digits", "--nproc", "2", "--dry-run") == 0
    assert modicum("pretrain", "digits") == 0
    assert modicum("pretrain", "digits", "--nproc", "2") == 0  # done
    assert modicum("pretrain", "digits", "--nproc", "2", "seed=1") == 2
    assert "belongs to other settings" in capfd.readouterr().err
    assert launched == []


def test_under_torchrun_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="leave it out under torchrun"):
        launch.announce(2)
