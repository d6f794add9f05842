"""What is watched while stage one learns: figures against plain loops, a course left as it was, a collapse that is told once."""

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.config import flatten, load_experiment
from modicum.data.images import Images
from modicum.data.sources import load_images
from modicum.errors import Interrupted
from modicum.exchange import initial_backbone
from modicum.hardware import Hardware
from modicum.method import find_method, method_names
from modicum.pretrain import monitor
from modicum.pretrain.collapse import CAUSES, Collapse, is_low
from modicum.pretrain.monitor import EmbeddingMonitor
from modicum.pretrain.prototypes import Prototypes
from modicum.pretrain.queue import Queue, queue_ages
from modicum.pretrain.run import run
from modicum.pretrain.spread import BINS, alignment, cosines_of_pairs, deviation, effective_rank, histogram, uniformity
from modicum.record import Metrics
from modicum.resolve import resolve, stage_facts, view_arguments
from modicum.run_folder import RunFolder
from modicum.settings import DataSettings
from modicum.views.policies import build_policy

CPU = Hardware(torch.device("cpu"), "fp32", 1)
WATCHED = {"embedding_std", "embedding_rank", "feature_rank", "alignment", "uniformity"}
# 9 steps, read at steps 3, 6 and 9.
SHORT = "data.image_size=8", "pretrain.batch_size=32", "pretrain.epochs=0.2", "pretrain.monitor_epochs=0.07", "pretrain.warmup_epochs=0"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("number", "dimensions"), [(7, 3), (5, 5), (4, 9)])
def test_figures_equal_plain_loops(number: int, dimensions: int) -> None:
    first, second = draw(number, dimensions), draw(number, dimensions, seed=1)
    one, two = ([row / np.linalg.norm(row) for row in z.double().numpy()] for z in (first, second))
    assert deviation(first) == pytest.approx(
        np.mean([np.std([row[d] for row in one], ddof=1) for d in range(dimensions)]) * dimensions**0.5
    )
    singular = np.linalg.svd(first.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert effective_rank(first) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    positives, negatives = cosines_of_pairs(first, second)
    assert positives.tolist() == pytest.approx([one[i] @ two[i] for i in range(number)], abs=1e-6)
    pairs = [(i, j) for i in range(number) for j in range(number) if i != j]
    assert negatives.tolist() == pytest.approx([one[i] @ two[j] for i, j in pairs], abs=1e-6)
    assert alignment(positives) == pytest.approx(np.mean([((one[i] - two[i]) ** 2).sum() for i in range(number)]), abs=1e-6)
    assert uniformity(negatives) == pytest.approx(
        np.log(np.mean([np.exp(-2 * ((one[i] - two[j]) ** 2).sum()) for i, j in pairs])), abs=1e-6
    )


def test_one_point_and_an_even_spread_are_the_ends_of_the_scale() -> None:
    point = draw(1, 16).expand(32, 16)
    positives, negatives = cosines_of_pairs(point, point)
    assert (deviation(point), alignment(positives), uniformity(negatives)) == pytest.approx((0, 0, 0), abs=1e-5)
    assert effective_rank(point) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(8, 4)) == pytest.approx(1, abs=1e-3)
    even = draw(4096, 16)
    assert deviation(even) == pytest.approx(1, abs=0.02)
    assert effective_rank(even) == pytest.approx(16, abs=0.1)
    assert effective_rank(torch.eye(6, 20)) == pytest.approx(6, abs=1e-3)


def test_a_histogram_counts_every_pair() -> None:
    shares = histogram(torch.tensor([-1.0, 0.01, 0.02, 1.0]))
    assert len(shares) == BINS
    assert [shares[0], shares[BINS // 2], shares[-1]] == [0.25, 0.5, 0.25]
    rounded = F.normalize(draw(50, 7), dim=1)  # a cosine of 1 and a bit is one of 1
    assert all(histogram(cosines).sum() == pytest.approx(1) for cosines in cosines_of_pairs(rounded, rounded))


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images(DataSettings(name="digits", image_size=8))


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WATCHED": 40, "BANK": 60, "QUERIES": 20, "BATCH": 32}.items():
        monkeypatch.setattr(monitor, name, value)


def session(digits: Images, folder: Path, *overrides: str) -> Any:
    experiment, _ = resolve(load_experiment("digits", [*SHORT, *overrides]), digits)
    run_folder = RunFolder(folder)
    run_folder.stage("pretrain").mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(experiment=experiment, images=digits, hardware=CPU, folder=run_folder)


NARROW = {"hidden_size": 32, "embedding_size": 16}  # where the method has such a setting


@pytest.mark.parametrize("name", [*method_names("pretrain"), "a transformer"])
def test_every_method_is_read_and_left_as_it_was(digits: Images, tmp_path: Path, name: str) -> None:
    transformer = name == "a transformer"
    name = "dino" if transformer else name
    more = ["data.image_size=16", "backbone.name=vit_tiny_patch16_224"] if transformer else []
    images = load_images(DataSettings(name="digits", image_size=16)) if transformer else digits
    experiment = session(images, tmp_path, f"pretrain.method={name}", *more).experiment
    settings = experiment.pretrain
    narrow = {key: NARROW.get(key, value) for key, value in settings.method.items()}
    backbone = initial_backbone(None, experiment)
    method = find_method("pretrain", name).from_settings(backbone, stage_facts("pretrain", settings.model_dump(), images), 0, narrow)
    policies = [build_policy(policy, **view_arguments(experiment.data)) for policy in settings.views]
    method.train()
    state, random = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    modes = [module.training for module in method.modules()]

    values = flatten(experiment.model_dump())
    assert method.collapse_causes
    assert set(method.collapse_causes) | set(CAUSES) <= set(values)
    Metrics(tmp_path / "metrics.csv", 0)
    collapse = Collapse(tmp_path, method.collapse_causes, values)
    watch = EmbeddingMonitor(images, policies, method.student, collapse, tmp_path, CPU, seed=0)  # type: ignore[arg-type]
    figures = watch.read(3)
    assert figures.keys() == WATCHED
    assert all(np.isfinite(value) for value in figures.values())
    assert watch.read(6) == figures  # the same images, views and draws
    assert not any(isinstance(module, Prototypes) for module in watch.head.modules())

    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in method.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in method.state_dict().items())


def test_a_run_records_what_is_watched_and_comes_to_the_same_bits_without(
    digits: Images, tmp_path: Path, assert_same: Callable[[Any, Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    often, once = (session(digits, tmp_path / str(epochs), f"pretrain.monitor_epochs={epochs}") for epochs in (0.07, 1))
    run(often)
    run(once)
    folders = [each.folder.stage("pretrain") for each in (often, once)]
    assert_same(*(torch.load(folder / "state.pt", weights_only=True) for folder in folders))
    rows = Metrics.read(folders[0] / "metrics.csv")
    for name in {"knn", *WATCHED}:
        assert [step for step, found, _ in rows if found == name] == [3, 6, 9]
    # Of 512 keys 288 came from the 9 steps, 32 each; the random rest counts from the first.
    assert {name: value for _, name, value in rows if name.startswith("queue")} == {"queue_age": 7.1875, "queue_age_max": 10}
    table = pd.read_csv(folders[0] / "similarities.csv")
    assert list(table.columns) == ["step", "low", "high", "positives", "negatives"]
    assert table["step"].value_counts().to_dict() == {3: BINS, 6: BINS, 9: BINS}
    assert table.groupby("step")[["positives", "negatives"]].sum().to_numpy() == pytest.approx(1)
    assert "collapsed" not in capsys.readouterr().err
    assert not (folders[0] / "collapse.json").exists()


# To one point in 24 of 26 steps: what holds embeddings apart is as good as off.
COLLAPSING = (
    "backbone.name=resnet10_tiny",
    "pretrain.method={name: vicreg, embedding_size: 16, variance_weight: 1.0e-9, covariance_weight: 1.0e-9}",
    "pretrain.optimizer.lr=0.05",
    "pretrain.schedule=constant",
    "pretrain.epochs=0.6",
    "pretrain.log_every=1",
)
RECORDS = "metrics.csv", "similarities.csv", "collapse.json"


def test_a_collapse_is_told_once_with_what_causes_it_and_a_resumed_run_tells_the_same(
    digits: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(session(digits, tmp_path / "whole", *COLLAPSING))
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("the embeddings have collapsed") == 1
    assert "pretrain.method.variance_weight too low (now 1e-09)" in told
    assert "pretrain.optimizer.lr too high (now 0.05)" in told
    whole = tmp_path / "whole" / "pretrain"
    noted = json.loads((whole / "collapse.json").read_text())
    assert noted["message"] in told.replace("warning ", "")

    resumed = session(digits, tmp_path / "resumed", *COLLAPSING)
    watching = monitor.EmbeddingMonitor.read

    def interrupted(self: EmbeddingMonitor, step: int) -> dict[str, float]:
        if step == noted["step"] - 3:
            os.kill(os.getpid(), signal.SIGINT)
        return watching(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(monitor.EmbeddingMonitor, "read", interrupted)
        with pytest.raises(Interrupted):
            run(resumed)
    assert not (tmp_path / "resumed" / "pretrain" / "collapse.json").exists()
    run(resumed)
    for name in RECORDS:
        assert (tmp_path / "resumed" / "pretrain" / name).read_bytes() == (whole / name).read_bytes(), name


def test_low_readings_are_a_collapse_only_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, flat, high = ({"embedding_std": std, "embedding_rank": rank} for std, rank in ((0.9, 1.1), (0.01, 9.0), (0.9, 9.0)))
    metrics = Metrics(tmp_path / "metrics.csv", 0)
    settings = {"pretrain.method.name": "byol", "pretrain.optimizer.lr": 0.2, "pretrain.warmup_epochs": 0.5}
    for step, figures in enumerate([low, flat, high, low, flat, low, low], start=1):
        Collapse(tmp_path, {}, settings).look(step, figures, most=64)
        metrics.write(step, figures)
        assert (tmp_path / "collapse.json").exists() == (step >= 6)
    assert json.loads((tmp_path / "collapse.json").read_text())["step"] == 6
    assert capsys.readouterr().err.count("collapsed") == 1


def test_few_dimensions_are_no_collapse() -> None:
    reading = {"embedding_std": 0.9, "embedding_rank": 2.9}
    assert [is_low(reading, most) for most in (4, 16, 32, 512)] == [False, False, True, True]


def test_embeddings_that_are_not_finite_are_left_to_the_loop(digits: Images, tmp_path: Path) -> None:
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    torch.nn.init.constant_(student[1].weight, float("nan"))
    policies = [build_policy({"name": "none"}, image_size=8, channels=1, mirror=False, mean=(0.5,), std=(0.5,))] * 2
    assert EmbeddingMonitor(digits, policies, student, Collapse(tmp_path, {}, {}), tmp_path, CPU, seed=0).read(1) == {}
    assert not (tmp_path / "similarities.csv").exists()


@pytest.mark.parametrize("batch", [2, 3, 9])
def test_the_age_of_a_key_is_the_steps_since_it_was_made(batch: int) -> None:
    queue, expected, pointer = Queue(7, 3, seed=0), [1] * 7, 0
    for _ in range(5):
        queue.enqueue(draw(batch, 3))
        expected = [age + 1 for age in expected]
        for _ in range(min(batch, 7)):
            expected[pointer], pointer = 1, (pointer + 1) % 7
        assert queue.ages().tolist() == expected
    again = Queue(7, 3, seed=1)
    again.load_state_dict(queue.state_dict())
    figures = {"queue_age": pytest.approx(np.mean(expected)), "queue_age_max": max(expected)}
    assert queue_ages(torch.nn.ModuleList([again])) == figures
    assert queue_ages(torch.nn.Linear(1, 1)) == {}
