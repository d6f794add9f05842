"""Calls in processes of their own, several at a time, that stop as one process does: with the state saved."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Hashable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from modicum.errors import ProcessLost
from modicum.record import say
from modicum.signals import preempt

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def as_they_end(
    function: Callable[..., Result], calls: Mapping[Key, tuple[Any, ...]], jobs: int
) -> Generator[tuple[Key, Result], None, None]:
    """Key and result of each call of `function`, `jobs` of them at a time; of one at a time in this process, in order.

    The processes share the cores and keep their words to themselves. The first exception of a call ends the others as SIGTERM does, and
    is raised; closing the generator ends them too. Raises ProcessLost where the system took a process away.
    """
    if jobs == 1:
        for key, arguments in calls.items():
            yield key, function(*arguments)
        return
    _share_cores(jobs)
    context = multiprocessing.get_context("spawn")
    waiting, running = list(calls.items()), dict[Connection, Key]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                key, arguments = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                context.Process(target=_answer, args=(sender, function, arguments)).start()
                sender.close()  # ours, so that the process's end is seen
                running[receiver] = key
            ended = wait(list(running))
            for receiver in [each for each in running if each in ended]:
                yield running.pop(receiver), _result(receiver)
    except BaseException:
        if running:
            say("Stopping the other runs after this step, with their states saved.")
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        for process in multiprocessing.active_children():
            process.join()


def _share_cores(jobs: int) -> None:
    """Tells processes to be started how many threads they have; the user's word counts."""
    if "OMP_NUM_THREADS" not in os.environ:
        from modicum.hardware import usable_cores  # imports torch

        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // jobs))  # read by every library when it is loaded


def _result(receiver: Connection) -> Any:
    with receiver:
        try:
            result, error = receiver.recv()
        except EOFError:
            raise ProcessLost(
                "A process was lost, most likely for want of memory: fewer at a time need less. The same command goes on from the last "
                "saved states."
            ) from None
    if error is not None:
        raise error
    return result


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In a new process: deaf to the terminal, whose Ctrl-C is for the parent; mute; ends with its parent, however that ends."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGTERM, preempt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer: tuple[Any, BaseException | None] = function(*arguments), None
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))  # where it was raised, which is lost on the way
        answer = None, error
    sender.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
