"""What stage two's methods keep between steps, against plain loops over images, on a network of one layer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Facts, Progress, find_method, settings_model

CLASSES, IMAGES = 3, 6


class Flat(nn.Module):
    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, self.num_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1)).tanh()


def build(name: str, **settings: Any) -> Any:
    kind = find_method("finetune", name)
    facts = Facts(IMAGES, CLASSES, 2, 10, 4, num_labelled=4, num_unlabelled=IMAGES, class_shares=(0.5, 0.25, 0.25))
    resolved = settings_model(kind)(**settings).model_dump()
    resolved |= {key: value for key, (value, _) in kind.decide(resolved, facts).items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = kind.from_settings(Flat(), facts, 0, resolved)  # type: ignore[arg-type]
    assert isinstance(method, SemiSupervised)
    method.progress = Progress(5, 10)
    return method


def sample(rows: list[int], views: int, seed: int) -> Any:
    made = torch.randn(views, len(rows), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    places = torch.tensor(rows)
    return SimpleNamespace(view=lambda number: made[number], labels=places % CLASSES, rows=places, positions=places)


def probabilities(n: int, seed: int) -> torch.Tensor:
    return (3 * torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed))).softmax(dim=1)


def test_temporal_ensembling_is_the_paper_image_by_image() -> None:
    """Z <- a Z + (1 - a) z, compared as Z / (1 - a^t), t how often the image was seen before."""
    method = build("temporal_ensembling")
    ensemble, seen = np.zeros((IMAGES, CLASSES)), np.zeros(IMAGES)
    for number, rows in enumerate(([0, 1, 2], [2, 3, 4], [0, 2, 5], [2, 0, 1])):
        with torch.no_grad():
            method.student.head.weight.add_(torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(number)))
        batch = {"labelled": sample([0, 1], 1, 50 + number), "unlabelled": sample(rows, 1, number)}
        loss = method(batch)
        with torch.no_grad():
            now = method.student(batch["unlabelled"].view(0)).softmax(dim=1).numpy()
        total = 0.0
        for place, row in enumerate(rows):
            if seen[row]:
                total += np.mean((now[place] - ensemble[row] / (1 - 0.6 ** seen[row])) ** 2) / len(rows)
            ensemble[row] = 0.6 * ensemble[row] + 0.4 * now[place]
            seen[row] += 1
        assert loss.parts["consistency"].item() == pytest.approx(total, abs=1e-6)
    np.testing.assert_allclose(method.ensemble.numpy(), ensemble, atol=1e-6)
    assert method.seen.tolist() == seen.tolist()


def test_flexmatch_counts_each_image_by_its_last_confident_guess() -> None:
    method = build("flexmatch", threshold=0.7)
    last: dict[int, int] = {}
    for number in range(6):
        rows = [(number + shift) % IMAGES for shift in range(4)]
        targets = probabilities(4, number)
        counts = [sum(guess == c for guess in last.values()) for c in range(CLASSES)]
        highest = max(*counts, IMAGES - len(last))
        expected = []
        for place, row in enumerate(rows):
            confidence, guess = targets[place].max().item(), int(targets[place].argmax())
            beta = counts[guess] / highest
            expected.append(float(confidence >= 0.7 * beta / (2 - beta)))
            if confidence >= 0.7:
                last[row] = guess
        _, used = method.judge(targets, sample(rows, 2, 0), torch.zeros(2, CLASSES))
        assert used.tolist() == expected
    assert method.last.tolist() == [last.get(row, CLASSES) for row in range(IMAGES)]


def test_freematch_follows_the_running_confidence_of_each_class() -> None:
    method = build("freematch", momentum=0.8)
    level, classes, histogram = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES), np.full(CLASSES, 1 / CLASSES)
    for number in range(5):
        targets = probabilities(8, number)
        guess = targets.argmax(dim=1).numpy()
        level = 0.8 * level + 0.2 * targets.amax(dim=1).mean().item()
        classes = 0.8 * classes + 0.2 * targets.numpy().mean(axis=0)
        histogram = 0.8 * histogram + 0.2 * np.bincount(guess, minlength=CLASSES) / 8
        expected = [float(targets[i].max().item() >= level * classes[guess[i]] / classes.max()) for i in range(8)]
        _, used = method.judge(targets, sample([0], 2, 0), torch.zeros(2, CLASSES))
        assert used.tolist() == expected
    np.testing.assert_allclose(method.histogram.mean.numpy(), histogram, atol=1e-6)


def test_softmatch_weighs_by_the_running_gaussian() -> None:
    method = build("softmatch", momentum=0.8, distribution_alignment="none")
    mean, variance = 1 / CLASSES, 1.0
    for number in range(5):
        targets = probabilities(8, number)
        confidence = targets.amax(dim=1).numpy().astype(np.float64)
        mean, variance = 0.8 * mean + 0.2 * confidence.mean(), 0.8 * variance + 0.2 * confidence.var(ddof=1)
        expected = [1.0 if c >= mean else np.exp(-((c - mean) ** 2) / (2 * variance / 4)) for c in confidence]
        learnt, used = method.judge(targets, sample([0], 2, 0), torch.zeros(2, CLASSES))
        np.testing.assert_allclose(used.numpy(), expected, atol=1e-5)
        assert torch.equal(learnt, targets)


def test_adamatch_measures_by_the_labelled_images() -> None:
    method = build("adamatch", momentum=0.8)
    known, guessed = np.full(CLASSES, 1 / CLASSES), np.full(CLASSES, 1 / CLASSES)
    for number in range(4):
        logits, targets = probabilities(4, 100 + number).log(), probabilities(8, number)
        weak = logits[:2].softmax(dim=1).numpy()
        known = 0.8 * known + 0.2 * weak.mean(axis=0)
        guessed = 0.8 * guessed + 0.2 * targets.numpy().mean(axis=0)
        aligned = targets.numpy() * known / guessed
        aligned /= aligned.sum(axis=1, keepdims=True)
        learnt, used = method.judge(targets, sample([0], 2, 0), logits)
        np.testing.assert_allclose(learnt.numpy(), aligned, atol=1e-5)
        assert used.tolist() == [float(row.max() >= 0.9 * weak.max(axis=1).mean()) for row in aligned]
    rising = []
    for done in (0, 2.5, 5, 10):
        method.progress = Progress(done, 10)  # type: ignore[arg-type]
        rising.append(method.weights()["unlabelled"])
    assert rising == pytest.approx([0, 0.5, 1, 1])


def test_pseudo_label_mixup_learns_what_was_predicted_the_time_before() -> None:
    method = build("pseudo_label_mixup")
    first = {"labelled": sample([0, 1], 1, 1), "unlabelled": sample([2, 3], 1, 2)}
    method(first)
    before = method.soft[[2, 3]].clone()
    assert torch.allclose(before, method.guesses.probabilities)  # nothing came before, so the prediction at hand
    with torch.no_grad():
        method.student.head.weight.add_(1.0 * torch.arange(15).view(3, 5) / 15)
    method({"labelled": sample([0, 1], 1, 3), "unlabelled": sample([3, 4], 1, 4)})
    assert torch.equal(method.guesses.probabilities[0], before[1])
    assert not torch.allclose(method.soft[3], before[1])
    assert method.soft[5].tolist() == [0, 0, 0]


def test_simmatch_asks_the_labelled_images() -> None:
    """Likeness of strong views to the bank is compared with that of weak ones, scaled by the class guessed for each."""
    method = build("simmatch", smoothing=0.6)
    for number in range(2):
        batch = {"labelled": sample([0, 1, 2, 3], 1, number), "unlabelled": sample([0, 4], 2, 10 + number)}
        bank, mean = method.bank.clone().numpy(), method.align.mean.clone()
        loss = method(batch)
        with torch.no_grad():
            features = method.student.backbone(batch["unlabelled"].view(0))
            raw = method.student.head(features).softmax(dim=1)
            weak, strong = (
                nn.functional.normalize(method.projector(method.student.backbone(batch["unlabelled"].view(view)))).numpy()
                for view in (0, 1)
            )
        own = raw.numpy() / (0.95 * mean + 0.05 * raw.mean(dim=0)).numpy()
        own /= own.sum(axis=1, keepdims=True)
        total = 0.0
        for i in range(2):
            likeness = np.exp(bank @ weak[i] / 0.1)
            likeness /= likeness.sum()
            guess = 0.6 * own[i]
            for j in range(4):
                guess[j % CLASSES] += 0.4 * likeness[j]
            np.testing.assert_allclose(method.guesses.probabilities[i].numpy(), guess, atol=1e-5)
            target = np.array([likeness[j] * own[i][j % CLASSES] for j in range(4)])
            student = np.exp(bank @ strong[i] / 0.1)
            total -= np.sum(target / target.sum() * np.log(student / student.sum())) / 2
        assert loss.parts["likeness"].item() == pytest.approx(total, rel=1e-4)
