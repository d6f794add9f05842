"""`--nproc N`: N ranks on this machine, started as torchrun starts them, that end as one process does."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import IO

from modicum.errors import InputError, Interrupted, Preempted

GRACE_SECONDS = 10.0  # for the other ranks to end after the first that failed, and again after SIGTERM
EXPECTED = {InputError.exit_status, Interrupted.exit_status, Preempted.exit_status}


def announce(ranks: int) -> None:
    """Tells this process, which decides every `auto`, and its children how many ranks there will be."""
    if "RANK" in os.environ:
        raise InputError("--nproc starts its ranks by itself: leave it out under torchrun.")
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}


def launch(command: Sequence[str], ranks: int) -> int:
    """Runs `command` on that many ranks and returns its exit status, which torchrun turns into 1.

    Rank 0 speaks for all. What another says is told only where it failed, and in a way of its own.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where the ranks meet
    common = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store of its own
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # torchrun's, for the same last bits
    }
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    with ExitStack() as held:
        told: list[IO[bytes] | None] = [None, *(held.enter_context(tempfile.TemporaryFile()) for _ in range(1, ranks))]
        for number in (signal.SIGINT, signal.SIGTERM):
            held.callback(signal.signal, number, signal.signal(number, pass_on))
        for rank in range(ranks):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: the terminal's Ctrl-C would reach the ranks a second time, which stops them unsaved.
            processes.append(subprocess.Popen(command, env=environment, stderr=told[rank], start_new_session=True))
            held.callback(processes[rank].kill)  # one that has ended does not notice
        first = _wait(processes)
        return _ending([process.returncode for process in processes], first, told, received)


def _ending(statuses: Sequence[int], first: int | None, told: Sequence[IO[bytes] | None], received: Sequence[int]) -> int:
    """The one exit status, with the words of the rank that failed first where rank 0 has not said the same."""
    if received and any(statuses) and set(statuses) <= {0, *EXPECTED, *(-number for number in received)}:  # ended, or not yet listening
        return (Interrupted if received[0] == signal.SIGINT else Preempted).exit_status
    if first is None:
        return 0
    status, words = statuses[first], told[first]
    if words and not (status in EXPECTED and statuses[0] == status):
        words.seek(0)
        sys.stderr.write(words.read().decode(errors="replace"))
    if status in EXPECTED:
        return status
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    print(f"modicum: Rank {first} of {len(statuses)} {how}; the same command goes on from the last saved state.", file=sys.stderr)
    return 1


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended; the first that failed takes the others with it. Returns its rank."""
    first, patience = None, [signal.SIGKILL, signal.SIGTERM]
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if first is None:
            first = _failed(processes)
            deadline = time.monotonic() + GRACE_SECONDS if first is not None else deadline
        if time.monotonic() > deadline and patience:
            number = patience.pop()
            for process in processes:
                process.send_signal(number)
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)
    return _failed(processes) if first is None else first


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, process in enumerate(processes) if process.poll()), None)
