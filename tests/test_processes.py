"""Several calls at a time in processes of their own: they stop as one does, whatever ends them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from modicum.errors import InputError, Preempted, ProcessLost
from modicum.pipelines.processes import as_they_end
from modicum.signals import preempt

__all__ = ["preempt"]  # for the script below

FOREVER = 60.0  # seconds; a test that waits so long has failed


def wait_for(path: Path) -> None:
    begun = time.monotonic()
    while not path.exists():
        assert time.monotonic() - begun < FOREVER, f"{path} never came"
        time.sleep(0.01)


def meet(own: Path, other: Path) -> tuple[int, str | None]:
    """Ends only if both run at the same time."""
    own.touch()
    wait_for(other)
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def sleep(begun: Path, saved: Path) -> None:
    begun.touch()
    try:
        time.sleep(FOREVER)
    except Preempted:
        saved.touch()
        raise


def fail(when: Path) -> None:
    wait_for(when)
    raise InputError("row 3 is empty")


def die(when: Path) -> None:
    wait_for(when)
    os.kill(os.getpid(), signal.SIGKILL)


def test_calls_run_at_the_same_time_in_processes_that_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    a, b = tmp_path / "a", tmp_path / "b"
    found = dict(as_they_end(meet, {"a": (a, b), "b": (b, a)}, jobs=2))
    assert set(found) == {"a", "b"}
    assert len({process for process, _ in found.values()} | {os.getpid()}) == 3
    assert {threads for _, threads in found.values()} == {"3"}  # the user's word counts


def test_one_at_a_time_needs_no_process(tmp_path: Path) -> None:
    assert list(as_they_end(divmod, {"a": (7, 2), "b": (9, 4)}, jobs=1)) == [("a", (3, 1)), ("b", (2, 1))]
    assert list(as_they_end(divmod, {}, jobs=2)) == []


def test_a_failure_stops_the_others_with_their_states_saved(tmp_path: Path) -> None:
    begun, saved = tmp_path / "begun", tmp_path / "saved"
    with pytest.raises(InputError, match="row 3 is empty"):
        list(as_they_end(_either, {"bad": (fail, begun), "good": (sleep, begun, saved), "later": (sleep, begun, tmp_path / "no")}, jobs=2))
    assert saved.exists()


def _either(call: object, *arguments: Path) -> None:
    call(*arguments)  # type: ignore[operator]


def test_whoever_has_seen_enough_stops_the_others(tmp_path: Path) -> None:
    begun, saved = tmp_path / "begun", tmp_path / "saved"
    with closing(as_they_end(_either, {"short": (wait_for, begun), "long": (sleep, begun, saved)}, jobs=2)) as results:
        assert next(results) == ("short", None)
    assert saved.exists()


def test_a_process_that_the_system_took_is_told(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with pytest.raises(ProcessLost, match="want of memory"):
        list(as_they_end(_either, {"lost": (die, begun), "good": (sleep, begun, tmp_path / "saved")}, jobs=2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, signal; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_processes as t\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGTERM, t.preempt)\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a script's background ignores
        "    here = Path(sys.argv[2])\n"
        "    list(t.as_they_end(t.sleep, {n: (here / f'begun {n}', here / f'saved {n}') for n in range(2)}, jobs=2))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    root = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, str(script), str(root), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root.parent)},
        stderr=subprocess.DEVNULL,
    )
    for n in range(2):
        wait_for(tmp_path / f"begun {n}")
    process.send_signal(number)
    assert process.wait(timeout=FOREVER) != 0
    for n in range(2):
        wait_for(tmp_path / f"saved {n}")
