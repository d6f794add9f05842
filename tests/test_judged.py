"""What was judged once is not judged again, and whatever the figures depend on asks for new ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from modicum.evaluate.judged import Found, Judged
from modicum.run_folder import RunFolder
from modicum.settings import EvaluateSettings

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)
SPLITS = pd.DataFrame({"id": ["a", "b", "c", "d"], "label": [0, 1, 0, 1], "split": ["labelled", "labelled", "test", "test"]})


class Asking:
    """Judges, and counts how often."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Found:
        self.asked += 1
        return [{"protocol": "knn", "top1": self.asked / 3, "k": 5}], {2: [20, 200]}


def judged(folder: Path, *siblings: Path, **changed: Any) -> Judged:
    (folder / "evaluate").mkdir(parents=True, exist_ok=True)
    facts = {"splits": SPLITS, "seed": 0, "precision": "fp32", "evaluate": EvaluateSettings()} | changed
    session: Any = SimpleNamespace(
        folder=RunFolder(folder),
        request=SimpleNamespace(siblings=siblings),
        experiment=SimpleNamespace(evaluate=facts["evaluate"], seed=facts["seed"]),
        hardware=SimpleNamespace(device=torch.device("cpu"), precision=facts["precision"]),
        splits=facts["splits"],
    )
    return Judged(session)


def test_a_sibling_and_a_second_try_find_the_same_rows(tmp_path: Path) -> None:
    judge = Asking()
    first = judged(tmp_path / "one").find("pixels", FEATURES, judge)
    assert first == ([{"protocol": "knn", "top1": 1 / 3, "k": 5}], {2: [20, 200]})
    assert judged(tmp_path / "one").find("pixels", FEATURES, judge) == first
    assert judged(tmp_path / "two", tmp_path / "none", tmp_path / "one").find("pixels", FEATURES, judge) == first
    assert judged(tmp_path / "three", tmp_path / "two").find("pixels", FEATURES, judge) == first  # the sibling of a sibling
    assert judge.asked == 1


def test_whatever_the_rows_depend_on_asks_anew(tmp_path: Path) -> None:
    judge = Asking()
    one = tmp_path / "one"
    judged(one).find("pixels", FEATURES, judge)
    judged(one).find("random", FEATURES, judge)
    judged(one).find("pixels", FEATURES + 1e-6, judge)
    judged(one).find("pixels", FEATURES.reshape(3, 4), judge)
    judged(one, seed=1).find("pixels", FEATURES, judge)
    judged(one, precision="bf16").find("pixels", FEATURES, judge)
    judged(one, evaluate=EvaluateSettings(bootstrap=10)).find("pixels", FEATURES, judge)
    judged(one, splits=SPLITS.assign(label=[1, 0, 0, 1])).find("pixels", FEATURES, judge)
    judged(one, splits=SPLITS.assign(split=["labelled", "unlabelled", "test", "test"])).find("pixels", FEATURES, judge)
    assert judge.asked == 9
    judged(one).find("random", FEATURES, judge)  # all of them are kept
    judged(one, seed=1).find("pixels", FEATURES, judge)
    assert judge.asked == 9


@pytest.mark.parametrize("damaged", [b'{"a": {"rows": [', b"", b"[]", b"\xff\xfe"])
def test_what_is_damaged_is_judged_again(tmp_path: Path, damaged: bytes) -> None:
    judge = Asking()
    one, sibling = tmp_path / "one", tmp_path / "sibling"
    for folder in (one, sibling):
        (folder / "evaluate").mkdir(parents=True)
        (folder / "evaluate" / "judged.json").write_bytes(damaged)
    first = judged(one, sibling).find("pixels", FEATURES, judge)
    assert judged(one, sibling).find("pixels", FEATURES, judge) == first
    assert judge.asked == 1
