"""The pseudo-label audit: its figures against plain loops, what it says without the truth, and that it survives a resume."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from modicum.data.images import UNKNOWN, Images
from modicum.evaluate.report.curves import learning_charts
from modicum.finetune.audit import BINS, Audit, calibration_error, figures_of
from modicum.finetune.semi_supervised import Guesses
from modicum.method import Progress
from modicum.record import Metrics

NAMES = ("cat", "dog", "owl")
PRIOR = np.full(3, 1 / 3)


def twelve(known: bool = True) -> Images:
    labels = np.arange(12) % 3 if known else np.array([0, 1, 2] + [UNKNOWN] * 9)
    paths = [f"{row}.png" for row in range(12)]
    manifest = pd.DataFrame({"id": paths, "path": paths, "label": labels, "split": "train"})
    return Images("twelve", torch.zeros(12, 1, 8, 8, dtype=torch.uint8), manifest, NAMES, False)


def audit_in(folder: Path, images: Images) -> tuple[Audit, Any]:
    method: Any = SimpleNamespace(guesses=None, progress=Progress(0, 8))
    return Audit(images, np.arange(3), method, folder, torch.device("cpu")), method


def step(audit: Audit, method: Any, number: int, rows: list[int], classes: list[int], used: float = 1.0) -> None:
    """One step of a run that guesses `classes` for `rows`, and what the loop then asks, two steps an interval, four an epoch."""
    method.progress = Progress(number, 8)
    probabilities = torch.full((len(rows), 3), 0.1)
    probabilities[range(len(rows)), classes] = 0.8
    method.guesses = Guesses(torch.tensor(rows), probabilities, torch.full((len(rows),), used))
    audit.observe()
    for monitor in audit.monitors(2, 4):
        if (number + 1) % monitor.every == 0:
            monitor.read(number + 1)


def read(folder: Path) -> dict[tuple[int, str], float]:
    return {(at, name): value for at, name, value in Metrics.read(folder / "audit.csv")}


def test_figures_are_counted_over_images() -> None:
    random = np.random.default_rng(0)
    guess, truth = random.integers(0, 3, 50), random.integers(-1, 3, 50)
    confidence, used = random.random(50), random.integers(0, 2, 50)
    figures = figures_of(guess, confidence, used, truth, PRIOR, NAMES)
    known = [i for i in range(50) if truth[i] >= 0]
    assert figures["share_used"] == pytest.approx(sum(used) / 50)
    assert figures["accuracy"] == pytest.approx(sum(guess[i] == truth[i] for i in known) / len(known))
    counted = [i for i in known if used[i]]
    assert figures["accuracy_used"] == pytest.approx(sum(guess[i] == truth[i] for i in counted) / len(counted))
    for number, name in enumerate(NAMES):
        of_class = [i for i in known if truth[i] == number]
        assert figures[f"accuracy/{name}"] == pytest.approx(sum(guess[i] == number for i in of_class) / len(of_class))
        assert figures[f"share/{name}"] == pytest.approx(sum(guess == number) / 50)
    gaps = sum(abs(sum(guess == number) / 50 - 1 / 3) for number in range(3))
    assert figures["distance_to_prior"] == pytest.approx(gaps / 2)


def test_calibration_error_is_the_formula() -> None:
    random = np.random.default_rng(0)
    confidence = random.random(200)
    right = random.random(200) < confidence**2
    total = 0.0
    for number in range(BINS):
        inside = [i for i in range(200) if number / BINS <= confidence[i] < (number + 1) / BINS]
        if inside:
            total += len(inside) / 200 * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
    assert calibration_error(confidence, right) == pytest.approx(total)
    assert calibration_error(np.ones(4), np.array([True, True, False, False])) == pytest.approx(0.5)


def test_intervals_and_epochs_count_each_image_once_and_flips(tmp_path: Path) -> None:
    audit, method = audit_in(tmp_path, twelve())
    for number in range(4):
        step(audit, method, number, [3, 4, 5], [0, 1, 0])  # the truth: 0, 1, 2
    for number in range(4, 8):
        step(audit, method, number, [3, 4, 6], [0, 2, 0])
    found = read(tmp_path)
    assert found[2, "interval/images"] == found[4, "epoch/images"] == 3
    assert found[4, "epoch/accuracy"] == pytest.approx(2 / 3)
    assert (4, "epoch/flips") not in found
    assert found[8, "epoch/flips"] == pytest.approx(1 / 2)  # of images 3 and 4; image 6 had no guess before
    assert found[8, "epoch/accuracy/dog"] == 0


def test_agreement_is_the_share_that_student_and_average_name_alike(tmp_path: Path) -> None:
    audit, method = audit_in(tmp_path, twelve())
    said = {"student": torch.eye(3), "eman": torch.eye(3)[[0, 2, 2]]}
    method.average_kind, method.classifier = "eman", lambda kind: kind
    monitor = audit.agreement(2, lambda kind: said[kind])  # type: ignore[index]
    assert monitor.read(2) == {}
    assert not (tmp_path / "audit.csv").exists()  # a method that guesses nothing has none
    step(audit, method, 1, [3, 4, 5], [0, 1, 0])
    monitor.read(2)
    assert read(tmp_path)[2, "agreement"] == pytest.approx(2 / 3)


def test_given_labels_do_not_count_as_right_guesses(tmp_path: Path) -> None:
    audit, method = audit_in(tmp_path, twelve())
    for number in range(4):
        step(audit, method, number, [0, 1, 2, 3], [0, 1, 2, 2])  # 0 to 2 carry labels
    assert read(tmp_path)[4, "epoch/accuracy"] == 0


def test_without_the_truth_it_tells_what_can_be_known_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    audit, method = audit_in(tmp_path, twelve(known=False))
    for number in range(4):
        step(audit, method, number, [3, 4, 5], [0, 1, 0])
    names = {name for _, name in read(tmp_path)}
    assert {"epoch/share_used", "epoch/share/cat", "epoch/prior/cat"} <= names
    assert not any("accuracy" in name or "calibration" in name for name in names)
    assert "no true label is known" in capfd.readouterr().err
    (tmp_path / "finetune").mkdir()
    (tmp_path / "audit.csv").rename(tmp_path / "finetune" / "audit.csv")
    charts = {chart.title: chart.note for chart in learning_charts(tmp_path, {}, pretrained=False)}
    assert "cannot be said" in charts["Pseudo-labels by epoch, %"]
    assert "Pseudo-labels: how steady, how well calibrated, %" in charts
    assert "Pseudo-labels right in the last epoch, by true class, %" not in charts


def test_an_epoch_in_which_nothing_counts_is_said_with_what_to_change(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    audit, method = audit_in(tmp_path, twelve())
    for number in range(8):
        step(audit, method, number, [3, 4, 5], [0, 1, 2], used=0.0)
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("steps 1 to 4: no guess on an unlabelled image counted (the surest: 0.80)") == 1
    assert "finetune.method.threshold" in told
    assert "steps 5" not in told
    for number in range(8, 12):
        step(audit, method, number, [3, 4, 5], [1, 1, 1])
    assert "collapsed" not in capfd.readouterr().err  # three guesses are too few to say so
    for number in range(12, 20):
        step(audit, method, number, list(range(3, 12)), [1] * 9)
    assert "collapsed" not in capfd.readouterr().err  # two epochs may be of easy classes, which count first
    for number in range(20, 28):
        step(audit, method, number, list(range(3, 12)), [1] * 9)
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("steps 21 to 24, and 2 epochs before: the guesses that count have collapsed") == told.count("collapsed") == 1
    assert "over 1.0 equal classes, the labels as over 3.0; 100% name 'dog'" in told
    for number in range(16, 20):
        step(audit, method, number, list(range(3, 12)), [1] * 9)
    assert "collapsed" not in capfd.readouterr().err  # once a run


def test_a_resumed_audit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed after step 6, with a state of step 5: the rows after it are written again, flips and all."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    guessed = [[(number + row) % 3 for row in range(3)] for number in range(8)]
    audit, method = audit_in(whole, twelve())
    for number in range(8):
        step(audit, method, number, [3, 4, 5], guessed[number])
    audit, method = audit_in(cut, twelve())
    for number in range(6):
        step(audit, method, number, [3, 4, 5], guessed[number])
        if number == 4:
            state = {name: value.clone() for name, value in audit.ledger.state_dict().items()}
    audit, method = audit_in(cut, twelve())
    audit.ledger.load_state_dict(state)
    for number in range(5, 8):
        step(audit, method, number, [3, 4, 5], guessed[number])
    assert (whole / "audit.csv").read_text() == (cut / "audit.csv").read_text()
