"""Collapse: a network that gives all images nearly the same embedding, or one of a line, has learnt nothing, whatever its loss says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modicum.files import write_atomically
from modicum.record import Metrics, warn

STD, RANK = 0.1, 4.0  # a reading with less of either is low; of few dimensions an eighth is rank enough
READINGS = 3  # low ones in a row, so that a bad moment is no collapse
CAUSES = {"pretrain.optimizer.lr": "too high", "pretrain.warmup_epochs": "too short"}  # with any method
WATCHED = ("embedding_std", "embedding_rank")


class Collapse:
    """Warns where readings stay low, once a run, and leaves `collapse.json` for the report.

    `causes` names settings that usually have a part in it with the run's method, and what is wrong with them then; `settings` holds
    the values of all settings. Both have dotted names.
    """

    def __init__(self, folder: Path, causes: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        self.path, self.metrics = folder / "collapse.json", folder / "metrics.csv"
        self.causes, self.settings = CAUSES | dict(causes), settings

    def look(self, step: int, figures: Mapping[str, float], most: int) -> None:
        """Takes in the reading at `step`, whose rank is `most` at most. Earlier ones are in metrics.csv: a resumed run counts on."""
        if self.path.is_file() and json.loads(self.path.read_text(encoding="utf-8"))["step"] < step:
            return
        readings: dict[int, Mapping[str, float]] = {}
        for at, name, value in Metrics.read(self.metrics):
            if name in WATCHED and at < step:
                readings[at] = {**readings.get(at, {}), name: value}
        last = [*readings.values(), figures][-READINGS:]
        if len(last) < READINGS or not all(is_low(reading, most) for reading in last):
            return
        causes = ", ".join(f"{name} {what} (now {self.settings[name]})" for name, what in self.causes.items())
        message = (
            f"pretrain: the embeddings have collapsed: at {READINGS} readings in a row, the last at step {step}, they lay close to one "
            f"point or few directions (spread {figures['embedding_std']:.2f} of an even one, effective rank "
            f"{figures['embedding_rank']:.1f} of {most}). With {self.settings['pretrain.method.name']} it usually comes from one of these: "
            f"{causes}."
        )
        warn(message)
        write_atomically(self.path, json.dumps({"step": step, "message": message}, indent=2) + "\n")


def is_low(reading: Mapping[str, float], most: int) -> bool:
    return reading["embedding_std"] < STD or reading["embedding_rank"] < min(RANK, most / 8)
