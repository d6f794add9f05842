"""Ctrl-C and SIGTERM: in the training loop a request, elsewhere the end, each with its exit status."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import modicum as package
from modicum.errors import Interrupted, Preempted
from modicum.signals import StopSignal

CHECKOUT = Path(package.__file__).parent.parent


def test_a_signal_is_a_request() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    for number, wanted in ((signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)):
        with pytest.raises(wanted, match="the state is saved"), StopSignal() as stop:
            assert stop.requested is None
            signal.raise_signal(number)
            assert stop.requested is wanted
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_the_second_interrupt_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_preemption_beats_an_interrupt() -> None:
    with pytest.raises(Preempted), StopSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_an_answered_request_keeps_its_message() -> None:
    with pytest.raises(Interrupted, match="after step 3"), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        raise stop.requested("Stopped after step 3.")


SLOW_COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that a script has put into the background hands down that it is ignored
sys.path.insert(0, {checkout!r})
from modicum import cli
def slow(*arguments, **options):
    print("working", flush=True)
    time.sleep(60)
cli.make_request = slow
cli.main(["run", "digits"])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_outside_the_loop(number: signal.Signals, status: int) -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", SLOW_COMMAND.format(checkout=str(CHECKOUT))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == status
        error = process.stderr.read()
    assert error.startswith("modicum: ")
    assert error.count("\n") == 1
    assert time.monotonic() - began < 30
