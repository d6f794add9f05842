"""Compiled code for the backbones in training: made once, where a run is long enough to earn it, and kept in the run's folder."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from modicum.hardware import Hardware
from modicum.networks import Backbone

LONG = 10_000  # steps; a minute of compilation is 6 % (-3 to 22 were measured) of as many steps of a tenth of a second
PLACE = "TORCHINDUCTOR_CACHE_DIR"


def earns_compilation(hardware: Hardware, steps: int) -> bool:
    """What `compile: auto` comes to."""
    return steps >= LONG and hardware.gains_by_compiling


def compile_backbones(method: nn.Module, step: Callable[[], object], folder: Path) -> str:
    """Compiles the student's backbone and the teacher's in place, which leaves the names in the state of `method` as they are, and calls
    `step` to see it work. A teacher whose norm is folded computes with a copy, which stays as it is.

    Returns how long that took. Raises RuntimeError, with all as it was before, where this machine or network does not allow it: for
    want of a C++ compiler, for example. Code lies in `folder` unless TORCHINDUCTOR_CACHE_DIR names another place for it.
    """
    backbones = [module for module in method.modules() if isinstance(module, Backbone)]
    began = time.monotonic()
    for backbone in backbones:
        backbone.compile(dynamic=False)  # views have few sizes; one code for all of them would be slower
    try:
        with _code_in(folder):
            step()
    except RuntimeError:
        for backbone in backbones:
            backbone._compiled_call_impl = None  # what `compile` sets; torch has no word for taking it back
        raise
    return f"{time.monotonic() - began:.0f} s"


@contextmanager
def _code_in(folder: Path) -> Iterator[None]:
    """Within, compiled code lies in `folder`, or where the user wants it; torch sets its own place as it is imported, which is no wish."""
    before = os.environ.get(PLACE)
    if before is None or Path(before).match(f"{tempfile.gettempdir()}/torchinductor_*"):
        os.environ[PLACE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(PLACE, None)
        if before is not None:
            os.environ[PLACE] = before
