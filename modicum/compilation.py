"""Compiled code for the student's backbone: made once, where a run is long enough to earn it, and kept in the run's folder."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from modicum.networks import Backbone

LONG = 10_000  # steps; a minute of compilation is 6 % (0 to 13 were measured) of as many steps of a tenth of a second


def earns_compilation(device: torch.device, steps: int) -> bool:
    """What `compile: auto` comes to. On two cores it gained nothing: 0.350 s a step (docs/settings.md) either way, after 32 s."""
    return device.type == "cuda" and steps >= LONG


def compile_backbones(student: nn.Module, step: Callable[[], object], folder: Path) -> str:
    """Compiles the backbones in `student` in place, which leaves the names in its state as they are, and calls `step` to see it work.

    Returns how long that took. Raises RuntimeError, with all as it was before, where this machine or network does not allow it: for
    want of a C++ compiler, for example. Code lies in `folder` unless TORCHINDUCTOR_CACHE_DIR names another place for it.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    backbones = [module for module in student.modules() if isinstance(module, Backbone)]
    began = time.monotonic()
    for backbone in backbones:
        backbone.compile(dynamic=False)  # views have few sizes; one code for all of them would be slower
    try:
        step()
    except RuntimeError:
        for backbone in backbones:
            backbone._compiled_call_impl = None  # what `compile` sets; torch has no word for taking it back
        raise
    return f"{time.monotonic() - began:.0f} s"
