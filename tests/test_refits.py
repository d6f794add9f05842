"""`evaluate.cross_validate`: stage two again without a part of the labels, and what that part says of it."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modicum.data.images import Images
from modicum.errors import Preempted
from modicum.finetune.audit import Audit
from modicum.finetune.run import run, train
from modicum.finetune.variants import variants

SMALL = ["finetune.init=random", "finetune.baselines=[]", "finetune.labels=30", "evaluate.cross_validate=3"]


@pytest.mark.parametrize("setting", ["true", "false"])
def test_every_label_is_missing_from_one_refit_whose_image_is_an_unlabelled_one(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, setting: str
) -> None:
    whole, *refits = variants(session_of(digits, tmp_path, f"finetune.labelled_in_unlabelled={setting}"))
    held_out = [np.setdiff1d(whole.labelled, refit.labelled) for refit in refits]
    assert len(refits) == 3
    assert np.array_equal(np.sort(np.concatenate(held_out)), whole.labelled)
    for refit, held in zip(refits, held_out, strict=True):
        assert set(held) <= set(refit.unlabelled)
        assert set(refit.unlabelled) - set(held) == set(whole.unlabelled) - set(held)
        assert (refit.method, refit.init) == (whole.method, whole.init)
    assert len({refit.folder for refit in (whole, *refits)}) == len({refit.title for refit in (whole, *refits)}) == 4


def test_without_the_setting_there_is_no_refit(session_of: Callable[..., Any], digits: Images, tmp_path: Path) -> None:
    assert len(variants(session_of(digits, tmp_path, "evaluate.cross_validate=0"))) == 1


def test_the_labels_held_out_reach_no_weight(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, assert_same: Callable[[Any, Any], None]
) -> None:
    """With other labels in their place the refit is the same to the last bit; with another label to learn from it is not."""

    def weights(name: str, changed: np.ndarray) -> dict[str, torch.Tensor]:
        manifest = digits.manifest.copy()
        manifest.loc[changed, "label"] = (manifest["label"][changed] + 1) % 10
        session = session_of(digits, tmp_path / name)  # the split of the true labels
        session.images = replace(digits, manifest=manifest)
        train(session, variants(session)[1])
        return load_file(tmp_path / name / "finetune" / "refits" / "1" / "classifier" / "model.safetensors")

    whole, refit, *_ = variants(session_of(digits, tmp_path))
    held = np.setdiff1d(whole.labelled, refit.labelled)
    reference = weights("true", held[:0])
    assert_same(reference, weights("held", held))
    assert any(not torch.equal(tensor, reference[name]) for name, tensor in weights("told", refit.labelled).items())


def test_a_stage_preempted_in_a_refit_goes_on_to_the_same_bits(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Callable[[Any, Any], None]
) -> None:
    def states(name: str) -> dict[str, Any]:
        root = tmp_path / name / "finetune"
        return {str(path.relative_to(root)): torch.load(path, weights_only=True) for path in sorted(root.rglob("state.pt"))}

    run(session_of(digits, tmp_path / "whole"))
    observe, steps = Audit.observe, []

    def preempt(audit: Audit) -> Any:
        steps.append(1)
        if len(steps) == 2 * 3 + 2:  # the second of the second refit's three steps
            signal.raise_signal(signal.SIGTERM)
        return observe(audit)

    monkeypatch.setattr(Audit, "observe", preempt)
    session = session_of(digits, tmp_path / "preempted")
    with pytest.raises(Preempted):
        run(session)
    assert not (tmp_path / "preempted" / "finetune" / "refits" / "2" / "classifier").exists()
    run(session)
    assert len(steps) == 4 * 3
    assert_same(states("whole"), states("preempted"))
