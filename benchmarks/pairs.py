"""What every comparison shares: candidates that take turns, medians, ratios and bars.

Candidates alternate within one run, so that whatever else the machine does falls on all alike; a ratio is of two medians of one such
run. Single figures move with the machine and its neighbours, ratios much less.
"""

import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import torch

from modicum.loop import Monitor, Training
from modicum.record import warn

BARE = "bare network step"  # a candidate that is no peer: what a step comes to without all that is around its network
WARM_UP = 3  # rounds of a peer in a process of its own, in which its C library adapts to how large its tensors are
Clock = Callable[[], float]
Seconds = dict[str, list[float]]  # candidate, ours first -> seconds of each of its rounds
Work = Callable[[], object]


class Skipped(Exception):
    """A case that cannot run on this machine, and why."""


class _Enough(Exception):
    """Ends a training run whose rounds are measured."""


@dataclass(frozen=True)
class Row:
    """One candidate's figure. `ratio`: how many times as good ours is; `bar`: what it is meant to be at least."""

    case: str
    setting: str
    candidate: str
    median: float
    best: float
    unit: str
    ratio: float | None = None
    bar: float | None = None

    @property
    def held(self) -> bool | None:
        return None if self.bar is None or self.ratio is None else self.ratio >= self.bar


def rows_of(case: str, quick: bool, overrides: Sequence[str] = ()) -> list[Row]:
    """The rows of a case, measured in a process of its own: what one case leaves behind in memory would slow the next, or serve it.

    Raises Skipped where the case cannot run.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, case, quick, overrides).result()


def _measure(case: str, quick: bool, overrides: Sequence[str]) -> list[Row]:
    run = importlib.import_module(f"benchmarks.{case}").run
    return list(run(quick, overrides) if overrides else run(quick))


def device_clock(device: torch.device) -> Clock:
    """Wall time, read when the device has done what it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def steps_a_round(device: torch.device) -> tuple[int, int]:
    """How many training steps of ours, and of a peer that reads from a DataLoader.

    On a CPU a step of the peer's is as long as several of ours, and its workers make the next batch meanwhile. A GPU is faster than
    they are: in few steps it would only use up the batches that they had made in others' turns.
    """
    return (2, 1) if device.type == "cpu" else (100, 100)


def repeated(work: Work, times: int) -> Work:
    def round_of_it() -> None:
        for _ in range(times):
            work()

    return round_of_it


@contextmanager
def apart(build: Callable[..., Work], *arguments: Any) -> Iterator[Work]:
    """The work `build(*arguments)` of a peer, warm, in a process of its own: what ours asks of the C library is not the peer's
    (`keep_freed_memory`)."""
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_serve, args=(other_end, build, arguments))
    process.start()
    other_end.close()

    def work() -> None:
        connection.send("a round")
        connection.recv()

    with connection:
        connection.recv()  # until it stands ready
        yield work
    process.join()


def _serve(connection: Connection, build: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method(None, force=True)  # the platform's, for a DataLoader's workers, instead of this process's own
    work = build(*arguments)
    for _ in range(WARM_UP):
        work()
    connection.send("ready")
    with suppress(EOFError):  # at the other end's close
        while connection.recv():
            work()
            connection.send("done")


def take_turns(candidates: Mapping[str, Work], rounds: int, clock: Clock, *, warm_up: bool = True, once: Iterable[str] = ()) -> Seconds:
    """Seconds of each of `rounds` rounds of each candidate. `once` names those too slow for more than one round."""
    seconds: Seconds = {name: [] for name in candidates}
    if warm_up:
        for work in candidates.values():
            work()
    for number in range(rounds):
        for name, work in candidates.items():
            if number and name in once:
                continue
            start = clock()
            work()
            seconds[name].append(clock() - start)
    return seconds


def train_in_turn(training: Training, steps: int, others: Mapping[str, Work], rounds: int, clock: Clock) -> Seconds:
    """Seconds of `steps` steps of a real training run, `ours`, and of each other candidate, in turn.

    The others run inside a monitor of the training loop; from the end of one to the start of the next lie whole steps, with all
    that the loop does in them. A first round warms up. The run is planned at its full length, and left when enough is measured.
    """
    seconds: Seconds = {"ours": [], **{name: [] for name in others}}
    began = clock()

    def read(_: int) -> dict[str, float]:
        nonlocal began
        seconds["ours"].append(clock() - began)
        for name, work in others.items():
            start = clock()
            work()
            seconds[name].append(clock() - start)
        if len(seconds["ours"]) > rounds:
            raise _Enough
        began = clock()
        return {}

    training.monitors = [Monitor(steps, read)]
    training.log_every = steps  # a round holds one reading of the log, as it holds one of everything
    with suppress(_Enough):
        training.run()
    return {name: values[1:] for name, values in seconds.items()}


def compared(
    case: str,
    setting: str,
    seconds: Seconds,
    *,
    unit: str = "s",
    amounts: Mapping[str, float] | None = None,
    bars: Mapping[str, float] | None = None,
) -> list[Row]:
    """One row a candidate, the first being ours. With `amounts` (candidate -> how much it does a round) figures are rates in `unit`."""
    amounts, bars = amounts or {}, bars or {}
    each = {name: [value / amounts.get(name, 1) for value in values] for name, values in seconds.items()}
    ours, *_ = each
    rows = []
    for name, values in each.items():
        median, best = statistics.median(values), min(values)
        ratio = None if name == ours else median / statistics.median(each[ours])
        figures = (1 / median, 1 / best) if amounts else (median, best)
        rows.append(Row(case, setting, name, *figures, unit, ratio, bars.get(name)))
    return rows


def installed(peer: str) -> bool:
    """Whether a peer of the extra [bench] is there; says so where it is not, since its rows will be missing."""
    there = find_spec(peer) is not None
    if not there:
        warn(f"{peer} is not installed and is left out: `make bench` installs the peers.")
    return there
