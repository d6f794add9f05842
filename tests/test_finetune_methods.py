"""What stage two's methods keep between steps, against plain loops over images, on a network of one layer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from modicum.finetune.losses import pseudo_label
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.method import Facts, Progress, find_method, method_names, settings_model

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


def sample(rows: list[int], views: int, seed: int, previous: Any = None) -> Any:
    made = torch.randn(views, len(rows), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    places = torch.tensor(rows)
    return SimpleNamespace(
        view=lambda number: made[number], labels=places % CLASSES, rows=places, positions=places, previous=lambda: previous
    )


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


CONSISTENT = [name for name in method_names("finetune") if "consistency" in settings_model(find_method("finetune", name)).model_fields]


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("name", CONSISTENT)
def test_every_consistency_method_takes_either_distance(name: str, kind: str) -> None:
    """In the second step, since an ensemble is empty in the first."""
    teacher = {"teacher": {"norm": "bn", "momentum": 0.9}} if name == "mean_teacher" else {}
    method = build(name, consistency=kind, **teacher)
    for seed in (1, 3):
        part = method({"labelled": sample([0, 1], 2, seed), "unlabelled": sample([2, 3, 4], 2, seed + 1)}).parts["consistency"]
    (gradient,) = torch.autograd.grad(part, method.student.backbone.layer.weight)
    assert part > 0
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["pi_model", "mean_teacher"])
def test_of_two_views_the_weak_one_is_the_target(name: str) -> None:
    teacher = {"teacher": {"norm": "bn", "momentum": 0.9}} if name == "mean_teacher" else {}
    method = build(name, consistency="kl", **teacher)
    batch = {"labelled": sample([0, 1], 2, 1), "unlabelled": sample([2, 3, 4], 2, 2)}
    views = [batch["unlabelled"].view(number).requires_grad_() for number in (0, 1)]
    batch["unlabelled"].view = views.__getitem__
    gradients = torch.autograd.grad(method(batch).parts["consistency"], views, allow_unused=True)
    assert [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients] == [False, True]


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


def test_softmatch_takes_a_single_image_as_one_without_variance() -> None:
    method = build("softmatch", momentum=0.0, distribution_alignment="none")
    for number in range(2):
        _, used = method.judge(probabilities(1, number), sample([0], 2, 0), torch.zeros(2, CLASSES))
        assert used.tolist() == [1]
    assert method.variance.mean == 0


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
    method({"labelled": sample([0, 1, 2, 3], 1, 5), "unlabelled": sample([0, 4], 2, 6)})
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


def test_simmatch_asks_no_labelled_image_before_it_has_come() -> None:
    method = build("simmatch", smoothing=0.6, distribution_alignment="none")
    known, others = [0, 1, 2, 3], sample([0, 4], 2, 1)
    own = method.student(others.view(0)).softmax(dim=1).detach().numpy()
    assert method({"labelled": sample(known[1:3], 1, 0), "unlabelled": others}).parts["likeness"] == 0
    np.testing.assert_allclose(method.guesses.probabilities.numpy(), own, atol=1e-6)  # nobody can be asked yet
    np.testing.assert_allclose(method.bank.norm(dim=1).numpy(), [0, 1, 1, 0], atol=1e-6)
    assert method({"labelled": sample(known, 1, 2), "unlabelled": others}).parts["likeness"] > 0
    np.testing.assert_allclose(method.guesses.probabilities[:, 0].numpy(), 0.6 * own[:, 0], atol=1e-6)  # of classes 1 and 2 alone
    assert method.classes.tolist() == [0, 1, 2, 0]


def test_shrinkmatch_counts_an_unsure_guess_among_the_classes_left() -> None:
    method = build("shrinkmatch", threshold=0.7, momentum=0.8, distribution_alignment="none")
    share = 0.0
    for number in range(4):
        targets, strong = probabilities(8, number), 2 * torch.randn(8, 2 * CLASSES, generator=torch.Generator().manual_seed(number))
        share = 0.8 * share + 0.2 * np.mean([row.max().item() >= 0.7 for row in targets])
        total = 0.0
        for row, heads in zip(targets.tolist(), strong.tolist(), strict=True):
            first, *rivals = sorted(range(CLASSES), key=lambda k: -row[k])
            if row[first] >= 0.7:
                continue
            while rivals and row[first] / (row[first] + sum(row[k] for k in rivals)) < 0.7:
                rivals.pop(0)
            left = np.exp([heads[CLASSES + k] for k in [first, *rivals]])  # the second head's
            total -= bool(rivals) * share * row[first] * np.log(left[0] / left.sum()) / 8
        guesses = Guesses(torch.arange(8), *method.judge(targets, sample([0], 2, 0), torch.zeros(2, CLASSES)))
        parts = method.teach(strong, guesses)
        assert parts["shrunk"].item() == pytest.approx(total, rel=1e-5)
        assert parts["unlabelled"] == pseudo_label(strong[:, :CLASSES], targets.argmax(dim=1), guesses.used)


def test_conmatch_believes_strong_views_as_far_as_its_estimator_does() -> None:
    method = build("conmatch", threshold=0.4, penalty=0.3)
    batch = {"labelled": sample([0, 1, 2], 1, 1), "unlabelled": sample([1, 3, 4, 5], 3, 2)}
    parts = method(batch).parts
    with torch.no_grad():
        views = [batch["labelled"].view(0), *(batch["unlabelled"].view(number) for number in range(3))]
        features = [method.student.backbone(view) for view in views]
        logits = [method.student.head(part) for part in features]
        known, weak, first, second = (part.softmax(dim=1).double().numpy() for part in logits)
        trust = [method.estimator(*pair).sigmoid().double().numpy() for pair in zip(features, logits, strict=True)]
    learnt, consistency, doubt = 0.0, 0.0, 0.0
    for i in range(4):
        guess, sure = weak[i].argmax(), weak[i].max() >= 0.4
        for own, other, own_trust in ((first[i], second[i], trust[2][i]), (second[i], first[i], trust[3][i])):
            learnt -= sure * np.log(own[guess]) / 4
            consistency -= own_trust * np.log(other[own.argmax()]) / 4
            doubt += (-own_trust * np.log(own[guess]) - 0.3 * np.log(own_trust)) / 4
    for i in range(3):
        doubt -= np.log(trust[0][i] if known[i].argmax() == i % CLASSES else 1 - trust[0][i]) / 3
    assert parts["unlabelled"].item() == pytest.approx(learnt, rel=1e-5)
    assert parts["consistency"].item() == pytest.approx(consistency, rel=1e-5)
    assert parts["confidence"].item() == pytest.approx(doubt, rel=1e-5)


def test_conmatch_learns_confidence_in_its_estimator_alone() -> None:
    method = build("conmatch")
    parts = method({"labelled": sample([0, 1, 2], 1, 1), "unlabelled": sample([1, 3, 4, 5], 3, 2)}).parts
    for name, owner, other in (("confidence", method.estimator, method.student), ("consistency", method.student, method.estimator)):
        gradients = torch.autograd.grad(parts[name], list(owner.parameters()), retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        nothing = torch.autograd.grad(parts[name], list(other.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in nothing)


def test_the_teacher_of_meta_pseudo_labels_hears_what_the_student_gained() -> None:
    """The gain of one step is to first order the paper's h = rate * (labelled gradient after) . (pseudo-label gradient before)."""
    rate, method = 1e-3, build("meta_pseudo_labels").double()
    optimizer = torch.optim.SGD(method.parameters(), lr=rate)
    known, others = sample([0, 1, 2], 1, 1), sample([1, 3, 4, 5], 2, 2)
    known.view, others.view = (lambda number, view=part.view: view(number).double() for part in (known, others))
    known.previous, others.previous = (lambda part=part: part for part in (known, others))
    batch, own = {"labelled": known, "unlabelled": others}, list(method.student.parameters())

    def labelled_loss() -> torch.Tensor:
        return cross_entropy(method.student(known.view(0)), known.labels)

    method.progress = Progress(0, 10)
    loss = method(batch)
    assert loss.parts["feedback"] == 0
    taught, before = method.drawn[others.positions].clone(), labelled_loss().item()
    gradients = torch.autograd.grad(loss.parts["student"], own, retain_graph=True)
    loss.total.backward()
    optimizer.step()
    after = torch.autograd.grad(labelled_loss(), own)
    h = rate * sum(float((one * two).sum()) for one, two in zip(after, gradients, strict=True))
    gain = before - labelled_loss().item()
    assert gain == pytest.approx(h, rel=0.01)

    method.progress = Progress(1, 10)
    part = method(batch).parts["feedback"]
    said = method.teacher(others.view(1))
    assert part.item() == pytest.approx(0.99 * gain * cross_entropy(said, taught).item(), rel=1e-3)  # losses are single
    (gradient,) = torch.autograd.grad(part, method.teacher.head.bias)
    wanted = said.softmax(dim=1) - one_hot(taught, CLASSES)  # a gain makes what was taught likelier
    torch.testing.assert_close(gradient, 0.99 * gain * wanted.mean(dim=0), rtol=1e-3, atol=0)


def test_meta_pseudo_labels_draws_classes_by_their_probabilities() -> None:
    method = build("meta_pseudo_labels")
    rows = torch.tensor([[0.5, 0.3, 0.2]]).expand(20000, CLASSES)
    drawn = method.draw(rows)
    np.testing.assert_allclose(np.bincount(drawn, minlength=CLASSES) / 20000, rows[0], atol=0.02)
    assert torch.equal(method.draw(rows), drawn)
    method.progress = Progress(6, 10)
    assert not torch.equal(method.draw(rows), drawn)


def test_the_student_of_meta_pseudo_labels_learns_the_labels_last() -> None:
    method = build("meta_pseudo_labels", finetuning=0.2)
    known, others = sample([0, 1, 2], 1, 1), sample([1, 3, 4, 5], 2, 2)
    known.previous, others.previous = lambda: known, lambda: others
    for step, learnt in ((7, "student"), (8, "labelled")):
        method.progress = Progress(step, 10)
        loss = method({"labelled": known, "unlabelled": others})
        own = list(method.student.parameters())
        expected = torch.autograd.grad(loss.parts[learnt], own, retain_graph=True)
        for gradient, wanted in zip(torch.autograd.grad(loss.total, own), expected, strict=True):
            torch.testing.assert_close(gradient, wanted)


def test_a_warm_start_reaches_the_teacher_that_labels() -> None:
    method = build("meta_pseudo_labels")
    method.start_head(torch.ones(CLASSES, 5), torch.arange(CLASSES))
    for network in (method.student, method.average.network, method.teacher):
        assert network.head.bias.tolist() == [0, 1, 2]
