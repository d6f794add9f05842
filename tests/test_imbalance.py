"""Classes that do not occur equally often: how labelled images are drawn, what guesses are aligned to, and a long tail end to end."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modicum.config import load_experiment
from modicum.data.batches import balanced_positions
from modicum.data.images import Images
from modicum.data.splits import make_splits
from modicum.data.stream import Stream
from modicum.errors import InputError
from modicum.finetune.alignment import MOMENTUM, PRIOR_MOMENTUM, DistributionAlignment, Prior
from modicum.finetune.audit import effective_classes
from modicum.finetune.run import propagation_of, train
from modicum.finetune.variants import variants
from modicum.hardware import Hardware
from modicum.method import Facts, find_method
from modicum.networks import create_backbone
from modicum.record import Metrics
from modicum.resolve import resolve
from modicum.run_folder import RunFolder
from modicum.settings import BackboneSettings

SHARES = (0.6, 0.3, 0.1)
FACTS = Facts(100, 3, 8, 10, 4, class_shares=SHARES)


@pytest.mark.parametrize("size", [1, 4, 7, 30])
def test_every_class_comes_equally_often_and_so_does_each_of_its_images(size: int) -> None:
    classes = [torch.arange(0, 20), torch.arange(20, 23), torch.arange(23, 24)]
    whole = balanced_positions(classes, 0, 180, 0, "order")
    parts = torch.cat([balanced_positions(classes, start, min(size, 180 - start), 0, "order") for start in range(0, 180, size)])
    assert torch.equal(whole, parts)  # the place says it all: a resumed run needs its step alone
    times = whole.bincount(minlength=24)
    assert [int(times[entries].sum()) for entries in classes] == [60, 60, 60]
    assert [times[entries].unique().tolist() for entries in classes] == [[3], [20], [60]]
    assert not torch.equal(whole, balanced_positions(classes, 0, 180, 1, "order"))


def test_a_balanced_stream_deals_the_labels_of_every_class_alike() -> None:
    labels = torch.tensor([0] * 12 + [2] * 3 + [3])
    stream = Stream(torch.zeros(16, 1, 8, 8), torch.arange(16), labels, [], 6, torch.device("cpu"), (0, "labelled"), balanced=True)
    for number in range(3):
        assert stream.sample(number).labels.bincount().tolist() == [2, 0, 2, 2]


def guesses(n: int, seed: int) -> torch.Tensor:
    return (3 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(dim=1)


@pytest.mark.parametrize(
    ("prior", "wanted"), [("uniform", (1 / 3,) * 3), ("labelled", SHARES), ([0.2, 0.2, 0.6], (0.2, 0.2, 0.6)), ("estimated", SHARES)]
)
def test_alignment_scales_guesses_to_the_prior_and_remembers_their_mean(prior: Prior, wanted: tuple[float, ...]) -> None:
    """Against the formula of arXiv:1911.09785: q * prior / running mean, normalised; an estimated prior follows what comes of it."""
    align, mean, target = DistributionAlignment(prior, FACTS).double(), np.full(3, 1 / 3), np.array(wanted)
    for seed in range(4):
        given = guesses(8, seed)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * given.numpy().mean(axis=0)
        expected = given.numpy() * target / mean
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(align(given).numpy(), expected, atol=1e-7)
        if prior == "estimated":
            target = PRIOR_MOMENTUM * target + (1 - PRIOR_MOMENTUM) * expected.mean(axis=0)


@pytest.mark.parametrize(
    ("name", "alignment", "wanted"),
    [
        ("fixmatch", "none", None),
        ("fixmatch", "uniform", (1 / 3,) * 3),
        ("fixmatch", "labelled", SHARES),
        ("fixmatch", [0.2, 0.2, 0.6], (0.2, 0.2, 0.6)),
        ("fixmatch", "estimated", None),  # not known before the run
        ("adamatch", "predicted", SHARES),  # as often as on the labelled images
        ("softmatch", "uniform", None),  # it aligns no label that is learnt
        ("entropy_min", None, None),
    ],
)
def test_propagated_labels_follow_the_shares_that_the_method_aligns_to(name: str, alignment: Any, wanted: tuple[float, ...] | None) -> None:
    settings = {} if alignment is None else {"distribution_alignment": alignment}
    backbone = create_backbone(BackboneSettings(name="resnet10d_tiny"), 1, 8, seed=0)
    method = find_method("finetune", name).from_settings(backbone, replace(FACTS, steps=100), 0, settings)
    found = propagation_of(method).prior  # type: ignore[arg-type]
    assert (found is None) == (wanted is None)
    np.testing.assert_allclose(found or (), wanted or ())


def test_without_alignment_guesses_stay_as_they_are() -> None:
    given = guesses(8, 0)
    assert DistributionAlignment("none", FACTS)(given) is given


def test_an_estimated_prior_finds_how_often_the_classes_occur() -> None:
    """Labels are balanced, unlabelled images are not, and the guesses are mostly sure: the estimate leaves the one for the other."""
    align = DistributionAlignment("estimated", Facts(100, 3, 8, 10, 4, class_shares=(1 / 3,) * 3))
    draws = torch.Generator().manual_seed(0)
    for _ in range(1000):
        classes = torch.multinomial(torch.tensor([0.8, 0.15, 0.05]), 64, replacement=True, generator=draws)
        align((6 * torch.nn.functional.one_hot(classes, 3) + torch.randn(64, 3, generator=draws)).softmax(dim=1))
    torch.testing.assert_close(align.prior, torch.tensor([0.8, 0.15, 0.05]), atol=0.05, rtol=0)


def test_as_many_equal_classes() -> None:
    assert effective_classes(np.full(4, 0.25)) == pytest.approx(4)
    assert effective_classes(np.array([1.0, 0, 0])) == pytest.approx(1)
    assert 1 < effective_classes(np.array([0.9, 0.1])) < 2


@pytest.fixture(scope="module")
def long_tail(digits: Images) -> Images:
    """Digits of which each class has two thirds of the training images of the one before, so that the last has three in a hundred."""
    train_rows = digits.rows("train")
    labels, kept = digits.labels[train_rows], []
    for number in range(10):
        rows = train_rows[labels == number]
        kept.append(rows[: max(3, round(len(rows) * (2 / 3) ** number))])
    rows = np.sort(np.concatenate([*kept, digits.rows("test")]))
    return Images("long-tailed digits", digits.pixels[rows], digits.manifest.iloc[rows].reset_index(drop=True), digits.class_names, False)


@pytest.mark.parametrize("given", ["[0.5, 0.5]", "[0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]"])
def test_shares_that_do_not_fit_the_classes_are_refused(digits: Images, given: str) -> None:
    with pytest.raises(InputError, match=r"finetune\.method\.distribution_alignment lists \d+ shares that sum to .*10 classes"):
        resolve(load_experiment("digits", [f"finetune.method={{name: fixmatch, distribution_alignment: {given}}}"]), digits)


def tail_session(images: Images, folder: Path, *overrides: str) -> Any:
    settings = [
        "pretrain.method.queue_size=auto", "finetune.init=random", "finetune.warm_start=none", "finetune.backbone_lr_scale=1",
        "finetune.steps=40", "finetune.warmup_steps=0", "finetune.batch_size=10", "finetune.mu=4", "finetune.baselines=[]",
        "finetune.labels=60", "finetune.balance=proportional",
    ]  # fmt: skip
    experiment, _ = resolve(load_experiment("digits", [*settings, *overrides]), images)
    splits = make_splits(images, experiment.finetune)
    hardware = Hardware(torch.device("cpu"), "fp32", 1)
    run_folder, asked = RunFolder(folder), SimpleNamespace(siblings=())
    return SimpleNamespace(experiment=experiment, images=images, splits=splits, folder=run_folder, hardware=hardware, request=asked)


def last_epoch(folder: Path) -> dict[str, float]:
    return {name: value for _, name, value in Metrics.read(folder / "finetune" / "audit.csv")}


@pytest.mark.parametrize("prior", ["labelled", "estimated"])
def test_a_long_tail_is_learnt_from_balanced_batches_and_aligned_guesses(long_tail: Images, tmp_path: Path, prior: str) -> None:
    method = f"finetune.method={{name: fixmatch, threshold: 0.5, distribution_alignment: {prior}}}"
    session = tail_session(long_tail, tmp_path, method, "finetune.sampling=balanced")
    assert session.splits["split"].eq("labelled").sum() == 60
    [variant] = variants(session)
    train(session, variant)
    kept = torch.load(tmp_path / "finetune" / "state.pt", weights_only=True)["method"]["align.prior"]
    assert kept.dtype == torch.float32
    found = last_epoch(tmp_path)
    priors = np.array([found[f"epoch/prior/{name}"] for name in long_tail.class_names])
    assert priors[0] > 8 * priors[-1]  # the labels have the long tail
    shares = np.array([found[f"epoch/share/{name}"] for name in long_tail.class_names])
    assert np.abs(shares - priors).sum() < np.abs(shares - 0.1).sum()
    assert found["epoch/accuracy"] > 0.3


def test_guesses_that_collapse_onto_few_classes_are_told(long_tail: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One class is asked for and nothing else."""
    shares = [0.91, *[0.01] * 9]
    method = f"finetune.method={{name: fixmatch, threshold: 0.3, distribution_alignment: {shares}}}"
    session = tail_session(long_tail, tmp_path, method, "finetune.steps=60", "finetune.optimizer.lr=0.0005")
    train(session, variants(session)[0])
    told = " ".join(capfd.readouterr().err.split())
    assert told.count("have collapsed onto few classes") == 1
    assert "name '0'" in told
