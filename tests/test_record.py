"""What a run tells: bars and lines of progress, and which of torchrun's ranks tells anything."""

import io
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from modicum import record
from modicum.console_log import ConsoleLog
from modicum.record import Metrics, progress, say, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 80 columns; no fixture, since pytest puts its own sys.stderr back before a test begins."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(record, "console", Console(file=terminal, width=80, force_terminal=True, color_system=None, soft_wrap=True))
    return terminal


def one_bar(**options: Any) -> None:
    with progress("features (baseline_all_labels)", 134_700, **options) as advance:
        advance(100_000)
        advance(34_700, note="loss 0.512, and a note that is far too long for the terminal")


def test_a_bar_stays_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    one_bar()
    full = terminal.getvalue().split("\x1b[2K")[-1].splitlines()[0]
    assert full.startswith("features (baseline_all_labels) ")
    assert "100%" in full
    assert len(full) == 80


def test_work_without_a_known_end_shows_its_time_and_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with working("labels spread over neighbours"):
        pass
    say("after")
    written = terminal.getvalue()
    assert "labels spread over neighbours" in written
    assert "0:00:00" in written
    assert written.endswith("\r\x1b[1A\x1b[2Kafter\n")  # the line of the bar is taken again


def test_work_without_a_known_end_is_not_told_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with working("labels spread over neighbours"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("speed", "told"),
    [(1234.5, "1,234 runs/s"), (9.94, "9.9 runs/s"), (0.1, "0.1 runs/s"), (0.02, "1.2 runs/min"), (0.0001, "0.0 runs/min")],
)
def test_a_rate_is_told_in_numbers_that_can_be_read(speed: float, told: str) -> None:
    assert record._rate(speed, "runs") == told


def test_a_quiet_run_wipes_its_bars_and_keeps_its_words_for_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = open_terminal(monkeypatch)
    log = ConsoleLog(quiet=True)
    with log.copying(), log.writing_to(tmp_path / "console.log"):
        say("begins")
        one_bar()
    say("after")
    written = terminal.getvalue()
    assert "begins" not in written
    assert written.endswith("\n\x1b[?25h\r\x1b[1A\x1b[2Kafter\n")  # the line of the bar is taken again
    assert (tmp_path / "console.log").read_text().splitlines()[1:] == ["begins"]


def test_without_a_terminal_a_long_run_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Progress, "__init__", partialmethod(Progress.__init__, get_time=lambda: now[0]))
    with progress("pretrain", 1000) as advance:
        for _ in range(10):
            advance(100, note="loss 0.5")
            now[0] += 10
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images")[0] for line in lines] == [f"pretrain: {done} of 1,000" for done in (400, 700, "1,000")]
    assert lines[0] == "pretrain: 400 of 1,000 images, 10 images/s, 1:00 left, loss 0.5"


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.csv", 0).write(1, {"loss": 0.5})
    monkeypatch.setenv("RANK", "1")
    Metrics(tmp_path / "metrics.csv", 0).write(1, {"loss": 0.7})
    assert Metrics.read(tmp_path / "metrics.csv") == [(1, "loss", 0.5)]


def test_rows_after_the_step_that_a_run_resumes_from_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.csv", 0)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": step / 3})
    Metrics(tmp_path / "metrics.csv", 2)
    assert Metrics.read(tmp_path / "metrics.csv") == [(1, "loss", 1 / 3), (2, "loss", 2 / 3)]
