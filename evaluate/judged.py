"""Rows of features, judged at most once: a run cut short keeps those it had, and the runs of a sweep share those of pixels and the like."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modicum.evaluate.rows import Row
from modicum.files import write_atomically
from modicum.session import Session

FILE = "judged.json"
Found = tuple[list[Row], dict[int, list[int]]]  # rows, and the k left out by size of the bank


class Judged:
    """What this run, or a sibling that had the same images, splits and settings, has found of the very same features."""

    def __init__(self, session: Session) -> None:
        self.own = session.folder.stage("evaluate") / FILE
        self.places = [self.own, *(path / "evaluate" / FILE for path in session.request.siblings)]
        settings, hardware = session.experiment.evaluate.model_dump(mode="json"), session.hardware
        told = [settings, session.experiment.seed, str(hardware.device), hardware.precision]
        self.question = hashlib.sha256(json.dumps(told).encode())
        self.question.update(pd.util.hash_pandas_object(session.splits).to_numpy().data)

    def find(self, name: str, features: np.ndarray, judge: Callable[[], Found]) -> Found:
        """The rows of `features` (N, D), which go by `name`: from a file where one has them, else by `judge`, and kept."""
        asked = self.question.copy()
        asked.update(f"{name} {features.dtype} {features.shape}".encode())
        asked.update(np.ascontiguousarray(features).data)
        fingerprint = asked.hexdigest()
        for place in self.places:
            kept = _read(place).get(fingerprint)
            if kept is not None:
                break
        else:
            rows, left_out = judge()
            kept = {"rows": rows, "left_out": list(left_out.items())}
        write_atomically(self.own, json.dumps(_read(self.own) | {fingerprint: kept}) + "\n")
        return kept["rows"], dict(kept["left_out"])


def _read(path: Path) -> dict[str, Any]:
    """What `path` keeps; nothing where it is missing or damaged, since all of it can be judged again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
