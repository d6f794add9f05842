"""What a run tells: the table of metrics in a file, the progress on the console. Of torchrun's ranks only the first tells anything."""

import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from modicum.files import write_atomically

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal to draw a bar on


def is_rank_zero() -> bool:
    """Whether this process is the one that writes and tells: the first of torchrun's, or the only one. Known without torch."""
    return os.environ.get("RANK", "0") == "0"


console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_rank_zero())
keep_bars = True  # on the screen when they are full; a quiet run (console_log.py) wipes them


class StateColumn(ProgressColumn):
    """Rate, time left and note; cut where the terminal ends, so that no bar takes a second line."""

    def __init__(self, unit: str, overall: bool = False) -> None:
        super().__init__()
        self.unit, self.overall = unit, overall

    def words(self, task: Task) -> str:
        speed = task.completed / (task.elapsed or 1) if self.overall else task.speed
        rate = _rate(speed, self.unit) if speed else ""
        left = task.remaining / speed if speed and task.remaining is not None else None
        seconds = task.finished_time if task.finished else left
        clock = "" if seconds is None else f"{_clock(seconds)}{'' if task.finished else ' left'}"
        return ", ".join(filter(None, (rate, clock, task.fields["note"])))

    def render(self, task: Task) -> Text:
        return Text(self.words(task), no_wrap=True, overflow="ellipsis")


def _rate(speed: float, unit: str) -> str:
    """Of `speed` units a second."""
    number, per = (speed, "s") if speed >= 0.1 else (60 * speed, "min")
    return f"{number:,.{0 if number >= 10 else 1}f} {unit}/{per}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def progress(
    description: str, total: float, unit: str = "images", completed: int = 0, overall: bool = False
) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left, or a line of them now and then without a terminal. Yields `advance(count, note="loss 0.51")`.

    The rate is that of the last half minute, or `overall`, where a unit may take longer than that.
    """
    state, drawn = StateColumn(unit, overall), _is_drawn()
    told = time.monotonic()
    with _bar(TaskProgressColumn(), state, drawn=drawn, kept=keep_bars) as bar:
        bar.add_task(description, total=total, completed=completed, note="")
        (task,) = bar.tasks

        def advance(count: float = 1, note: str | None = None) -> None:
            nonlocal told
            bar.update(task.id, advance=count, note=task.fields["note"] if note is None else note)
            if not drawn and is_rank_zero() and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                line = f"{description}: {task.completed:,.0f} of {total:,.0f} {unit}, {state.words(task)}"
                print(line, file=sys.stderr, flush=True)  # not by the console: a bar's stand-in is in no log and in every quiet run

        yield advance


@contextmanager
def working(description: str) -> Iterator[None]:
    """For work of which nobody knows how much is left: a bar that moves and the time so far, gone when it is done."""
    with _bar(TimeElapsedColumn(), drawn=_is_drawn(), kept=False) as bar:
        bar.add_task(description, total=None)
        yield


def _is_drawn() -> bool:
    return sys.stderr.isatty() and not console.is_dumb_terminal


def _bar(*columns: ProgressColumn, drawn: bool, kept: bool) -> Progress:
    shown = TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), *columns
    return Progress(*shown, console=console, refresh_per_second=4, transient=not kept, disable=not drawn)


def say(message: str) -> None:
    """One line for the person at the terminal."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    console.print(Text.assemble(("warning", "yellow"), " ", message))  # no markup: messages carry file names


def standard_output() -> Console:
    """For results; wide enough for a table where nobody's terminal limits it."""
    output = Console(highlight=False, soft_wrap=True)
    if not output.is_terminal:
        output.width = max(output.width, 120)
    return output


class Metrics:
    """`metrics.csv`: one row a reading, in long form (step, name, value), so that any method may record what it likes.

    Rows after the step that a run resumes from are dropped, so that a resumed table equals an uninterrupted one.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        rows = [row for row in self.read(path) if row[0] <= resume_step] if path.is_file() else []
        if is_rank_zero():
            table = io.StringIO(newline="")
            csv.writer(table).writerows([("step", "name", "value"), *rows])
            write_atomically(path, table.getvalue())

    @staticmethod
    def read(path: Path) -> list[tuple[int, str, float]]:
        with path.open(newline="") as file:
            return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file) if row["value"]]

    def write(self, step: int, values: dict[str, float]) -> None:
        if is_rank_zero():
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows((step, name, repr(value)) for name, value in values.items())
