"""What a run tells: the table of metrics in a file, the progress on the console."""

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True, highlight=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed and speed >= 10 else f"{speed:.1f} {self.unit}/s" if speed else "")


@contextmanager
def progress(description: str, total: float, unit: str = "images", completed: float = 0) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left. Yields `advance(count, note="loss 0.51")`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total, completed=completed, note="")

        def advance(count: float = 1, note: str | None = None) -> None:
            bar.update(task, advance=count, **({} if note is None else {"note": note}))

        yield advance


def say(message: str) -> None:
    """One line for the person at the terminal."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    console.print(Text.assemble(("warning", "yellow"), " ", message))  # no markup: messages carry file names


class Metrics:
    """`metrics.csv`: one row a reading, in long form (step, name, value), so that any method may record what it likes.

    Rows after the step that a run resumes from are dropped, so that a resumed table equals an uninterrupted one.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        rows = [row for row in self.read(path) if row[0] <= resume_step] if path.is_file() else []
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "name", "value"), *rows])
        temporary.replace(path)
        self.last = {name: value for _, name, value in rows}

    @staticmethod
    def read(path: Path) -> list[tuple[int, str, float]]:
        with path.open(newline="") as file:
            return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file) if row["value"]]

    def write(self, step: int, values: dict[str, float]) -> None:
        self.last |= values
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows((step, name, repr(value)) for name, value in values.items())
