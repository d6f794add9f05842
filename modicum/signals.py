"""Ctrl-C and SIGTERM as requests to stop at the next safe moment."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from modicum.errors import Interrupted, Preempted


def preempt(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM outside the training loop, which saves first."""
    raise Preempted("Preempted by SIGTERM; the same command goes on from the last saved state.")


class StopSignal:
    """While the block runs, a signal only sets `requested`: the loop polls it after each step, saves and raises it.

    A second Ctrl-C raises KeyboardInterrupt at once. A request that nobody answered is raised when the block ends.
    Outside the main thread, where Python handles no signals, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested: type[Interrupted] | None = None
        self._interrupts = 0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        if self.requested and kind is None:
            raise self.requested("Stopped; the state is saved and the same command goes on from there.")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.requested = Preempted
            return
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.requested = self.requested or Interrupted
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step, with the state saved. Ctrl-C again stops at once and loses what is not saved.\n")
