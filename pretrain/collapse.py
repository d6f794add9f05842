"""Collapse: a network that gives all images nearly the same embedding has learnt nothing, whatever its loss says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modicum.files import write_atomically
from modicum.record import Metrics, warn

# Under either of them a reading is low.
LEVELS = {"embedding_std": 0.05, "embedding_rank": 2.0}
READINGS = 3  # low ones in a row, so that a bad moment is no collapse
CAUSES = {"pretrain.optimizer.lr": "too high", "pretrain.warmup_epochs": "too short"}  # with any method


def watch(folder: Path, step: int, figures: Mapping[str, float], causes: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Warns when the reading at `step` is the READINGS-th low one in a row, once a run, and leaves `collapse.json` for the report.

    The readings before it are those of the run's metrics.csv, so that a resumed run counts on. `causes` names the method's settings
    that usually have a part in it, and what is wrong with them then; `settings` holds their values, both by dotted names.
    """
    path = folder / "collapse.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["step"] < step:
        return
    readings: dict[int, dict[str, float]] = {}
    for at, name, value in Metrics.read(folder / "metrics.csv"):
        if name in LEVELS and at < step:
            readings.setdefault(at, {})[name] = value
    last = [*readings.values(), figures][-READINGS:]
    if len(last) < READINGS or not all(is_low(reading) for reading in last):
        return
    named = "; ".join(f"{key} = {settings[key]}, {what}" for key, what in (CAUSES | dict(causes)).items())
    message = (
        f"pretrain: the embeddings have collapsed: at {READINGS} readings in a row, the last at step {step}, images hardly differed "
        f"(spread {figures['embedding_std']:.3f} of an even one, effective rank {figures['embedding_rank']:.1f}). What usually causes it "
        f"with {settings['pretrain.method.name']}: {named}."
    )
    warn(message)
    write_atomically(path, json.dumps({"step": step, "message": message}, indent=2) + "\n")


def is_low(reading: Mapping[str, float]) -> bool:
    return any(reading[name] < level for name, level in LEVELS.items())
