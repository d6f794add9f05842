"""Stage two's losses against slow float64 references written from the papers' formulas, closed forms and numerical gradients."""

import math

import numpy as np
import pytest
import torch

from modicum.finetune.adversarial import adversarial_direction
from modicum.finetune.losses import (
    annealed_labels,
    attenuated,
    consistency,
    distillation,
    embedding_cross_entropy,
    entropy,
    fairness,
    linear_ramp,
    prior_distance,
    pseudo_label,
    pseudo_label_graph,
    ramp_up,
    sharpen,
    shrunk_label,
    soft_label,
    squared_error,
)
from modicum.finetune.memory import Memory
from modicum.finetune.mixup import Mixing
from modicum.finetune.thresholds import flexible, self_adaptive, shrunk_classes, signal_annealing, truncated_gaussian
from modicum.method import find_method, settings_model

SIZES = [(1, 2), (5, 3), (16, 10)]


def logits(n: int, c: int, seed: int) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_pseudo_label_averages_over_all_images_used_or_not(n: int, c: int) -> None:
    strong, guesses = logits(n, c, 1), torch.arange(n) % c
    used = (torch.arange(n) % 2 == 0).double()
    total = sum(-math.log(softmax(strong[i].numpy())[guesses[i]]) for i in range(n) if used[i])
    assert pseudo_label(strong, guesses, used).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: pseudo_label(x, guesses, used), strong.requires_grad_())


@pytest.mark.parametrize(("n", "c"), SIZES)
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_consistency_is_the_formula(n: int, c: int, kind: str) -> None:
    student, teacher = logits(n, c, 1), logits(n, c, 2).softmax(dim=1)
    total = 0.0
    for i in range(n):
        p, t = softmax(student[i].numpy()), teacher[i].numpy()
        total += np.mean((p - t) ** 2) if kind == "mse" else np.sum(t * np.log(t / p))
    assert consistency(student, teacher, kind).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: consistency(x, teacher, kind), student.requires_grad_())


@pytest.mark.parametrize(("n", "c"), SIZES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_cross_entropy_of_tempered_predictions(n: int, c: int, temperature: float) -> None:
    student, teacher = logits(n, c, 1), logits(n, c, 2)
    total = 0.0
    for i in range(n):
        p, t = softmax(student[i].numpy() / temperature), softmax(teacher[i].numpy() / temperature)
        total -= sum(t[k] * math.log(p[k]) for k in range(c))
    assert distillation(student, teacher, temperature).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: distillation(x, teacher, temperature), student.requires_grad_())


def test_distillation_of_a_teacher_that_knows_nothing_is_least_for_a_student_that_does_not_either() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    assert distillation(nothing, nothing, 0.1).item() == pytest.approx(math.log(4), abs=1e-12)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_consistency_of_equal_predictions_is_zero_and_of_unlike_ones_is_not(kind: str) -> None:
    student = logits(6, 4, 1)
    assert consistency(student, student.softmax(dim=1), kind).item() == pytest.approx(0, abs=1e-12)
    assert consistency(student, logits(6, 4, 2).softmax(dim=1), kind).item() > 1e-3


def test_mse_saturates_where_predictions_disagree_most_and_kl_does_not() -> None:
    target = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    gradients = {}
    for kind in ("mse", "kl"):
        wrong = torch.tensor([[-10.0, 10.0]], dtype=torch.float64, requires_grad=True)
        consistency(wrong, target, kind).backward()
        gradients[kind] = wrong.grad.abs().max().item()
    assert gradients["mse"] < 1e-6
    assert gradients["kl"] > 0.9


def test_ramp_up_is_the_published_curve() -> None:
    assert ramp_up(0.0, 0.4) == pytest.approx(math.exp(-5))
    assert ramp_up(0.2, 0.4) == pytest.approx(math.exp(-5 * 0.25))
    assert ramp_up(0.4, 0.4) == ramp_up(0.9, 0.4) == 1.0
    assert ramp_up(0.0, 0.0) == 1.0


def test_linear_ramp_waits_rises_and_stays() -> None:
    assert [linear_ramp(at, 0.1, 0.6) for at in (0.0, 0.1, 0.35, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert linear_ramp(0.0, 0.0, 0.0) == 1.0
    assert [linear_ramp(at, 0.5, 0.5) for at in (0.0, 0.4, 0.5, 0.6)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_entropy_is_the_formula(n: int, c: int) -> None:
    given = logits(n, c, 1)
    total = sum(-sum(p * math.log(p) for p in softmax(row)) for row in given.numpy())
    assert entropy(given).item() == pytest.approx(total / n, abs=1e-9)
    assert entropy(torch.zeros(n, c)).item() == pytest.approx(math.log(c), abs=1e-6)
    torch.autograd.gradcheck(entropy, given.requires_grad_())


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_soft_label_averages_over_all_images_used_or_not(n: int, c: int) -> None:
    strong, targets, used = logits(n, c, 1), logits(n, c, 2).softmax(dim=1), (torch.arange(n) % 2 == 0).double()
    total = sum(-sum(targets[i, j].item() * math.log(softmax(strong[i].numpy())[j]) for j in range(c)) for i in range(n) if used[i])
    assert soft_label(strong, targets, used).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: soft_label(x, targets, used), strong.requires_grad_())


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_labels_that_are_learnt_wait(n: int, c: int) -> None:
    given, labels, ceiling = 2 * logits(n, c, 1), torch.arange(n) % c, 0.4
    waiting = [p for p in (softmax(given[i].numpy())[labels[i]] for i in range(n)) if p <= ceiling]
    expected = sum(-math.log(p) for p in waiting) / max(1, len(waiting))
    assert annealed_labels(given, labels, ceiling).item() == pytest.approx(expected, abs=1e-9)
    torch.autograd.gradcheck(lambda x: annealed_labels(x, labels, ceiling), given.requires_grad_())
    sure = torch.full((n, c), -20.0)
    sure[range(n), labels] = 20
    assert annealed_labels(sure, labels, 0.9).item() == 0


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_fairness_is_the_formula(n: int, c: int) -> None:
    strong, used = logits(n, c, 1), (torch.arange(n) % 3 != 1).double()
    classes, histogram = logits(2, c, 2).softmax(dim=1)
    rows = [softmax(strong[i].numpy()) for i in range(n) if used[i]]
    mean = np.mean(rows, axis=0)
    counted = np.bincount([row.argmax() for row in rows], minlength=c) / len(rows)
    target = (classes / histogram).numpy()
    own = np.array([mean[j] / counted[j] if counted[j] else 0 for j in range(c)])
    expected = sum(target[j] / target.sum() * math.log(own[j] / own.sum()) for j in range(c) if counted[j])
    assert fairness(strong, used, classes, histogram).item() == pytest.approx(expected, abs=1e-9)
    torch.autograd.gradcheck(lambda x: fairness(x, used, classes, histogram), strong.requires_grad_())


def test_fairness_of_equal_means_is_minus_their_entropy_and_of_nothing_zero() -> None:
    even = torch.full((3,), 1 / 3)
    assert fairness(100 * torch.eye(3), torch.ones(3), even, even).item() == pytest.approx(-math.log(3))
    assert fairness(100 * torch.eye(3), torch.zeros(3), even, even).item() == 0


def test_sharpening_is_the_power_normalised() -> None:
    given = logits(5, 4, 1).softmax(dim=1)
    powers = given.numpy() ** (1 / 0.4)
    np.testing.assert_allclose(sharpen(given, 0.4).numpy(), powers / powers.sum(axis=1, keepdims=True), atol=1e-9)
    np.testing.assert_allclose(sharpen(given, 1.0).numpy(), given.numpy(), atol=1e-9)
    np.testing.assert_allclose(sharpen(torch.tensor([[0.6, 0.4]]), 0.01).numpy(), [[1, 0]], atol=1e-9)


def test_flexible_thresholds_rise_with_what_is_learnt() -> None:
    """Against arXiv:2110.08263: beta = sigma / max(max sigma, unused), threshold * beta / (2 - beta)."""
    learnt = np.array([10.0, 5.0, 0.0])
    for unused in (2.0, 40.0):
        beta = [count / max(10.0, unused) for count in learnt]
        expected = [0.95 * b / (2 - b) for b in beta]
        np.testing.assert_allclose(flexible(torch.tensor(learnt), torch.tensor(unused), 0.95).numpy(), expected, atol=1e-9)
    assert flexible(torch.tensor([7.0, 7.0]), torch.tensor(0.0), 0.95).tolist() == pytest.approx([0.95, 0.95])


def test_self_adaptive_thresholds_are_highest_for_the_class_predicted_most() -> None:
    thresholds = self_adaptive(torch.tensor(0.8), torch.tensor([0.5, 0.25, 0.25]))
    assert thresholds.tolist() == pytest.approx([0.8, 0.4, 0.4])


def test_the_truncated_gaussian_is_one_from_the_mean_on() -> None:
    confidence = torch.tensor([0.5, 0.7, 0.8, 0.9], dtype=torch.float64)
    weights = truncated_gaussian(confidence, torch.tensor(0.8), torch.tensor(0.04), 2.0)
    expected = [math.exp(-((0.5 - 0.8) ** 2) / (2 * 0.04 / 4)), math.exp(-((0.7 - 0.8) ** 2) / (2 * 0.04 / 4)), 1, 1]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_signal_annealing_rises_from_chance_to_one() -> None:
    for schedule in ("linear", "log", "exp"):
        assert signal_annealing(1.0, 10, schedule) == pytest.approx(1, abs=0.01)  # type: ignore[arg-type]
        assert signal_annealing(0.0, 10, schedule) == pytest.approx(0.1, abs=0.01)  # type: ignore[arg-type]
    assert signal_annealing(0.5, 10, "linear") == pytest.approx(0.55)
    assert signal_annealing(0.5, 10, "log") == pytest.approx((1 - math.exp(-2.5)) * 0.9 + 0.1)
    assert signal_annealing(0.5, 10, "exp") == pytest.approx(math.exp(-2.5) * 0.9 + 0.1)
    assert signal_annealing(0.0, 10, "none") == 1


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_squared_error_averages_over_all_images_used_or_not(n: int, c: int) -> None:
    given, targets, used = logits(n, c, 1), logits(n, c, 2).softmax(dim=1), (torch.arange(n) % 2 == 0).double()
    total = sum(np.mean((softmax(given[i].numpy()) - targets[i].numpy()) ** 2) for i in range(n) if used[i])
    assert squared_error(given, targets, used).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: squared_error(x, targets, used), given.requires_grad_())


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_prior_distance_is_the_formula(n: int, c: int) -> None:
    given, prior = logits(n, c, 1), logits(1, c, 2).softmax(dim=1)[0]
    mean = np.mean([softmax(row) for row in given.numpy()], axis=0)
    expected = sum(p * math.log(p / m) for p, m in zip(prior.tolist(), mean, strict=True))
    assert prior_distance(given, prior).item() == pytest.approx(expected, abs=1e-9)
    assert prior_distance(torch.zeros(n, c), torch.full((c,), 1 / c)).item() == pytest.approx(0, abs=1e-6)
    torch.autograd.gradcheck(lambda x: prior_distance(x, prior), given.requires_grad_())


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_embedding_cross_entropy_is_the_formula(n: int, m: int) -> None:
    similarities, targets = logits(n, m, 1), logits(n, m, 2).softmax(dim=1)
    total = sum(-sum(targets[i, j].item() * math.log(softmax(similarities[i].numpy() / 0.2)[j]) for j in range(m)) for i in range(n))
    assert embedding_cross_entropy(similarities, targets, 0.2).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: embedding_cross_entropy(x, targets, 0.2), similarities.requires_grad_())


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_the_graph_joins_what_is_guessed_alike(n: int, c: int) -> None:
    given = (3 * logits(n, c, 1)).softmax(dim=1)
    expected = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            agreement = float(given[i] @ given[j])
            expected[i, j] = 1 if i == j else agreement if agreement >= 0.3 else 0
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(pseudo_label_graph(given, 0.3).numpy(), expected, atol=1e-9)
    sure = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert pseudo_label_graph(sure, 0.8).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]


def test_mixing_blends_images_and_targets_by_the_same_shares() -> None:
    images, targets = torch.rand(6, 1, 2, 2, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    mix = Mixing(6, 0.75, torch.device("cpu"), 0, 3, keep=True)
    blended, labels = mix(images), mix(targets)
    for i in range(6):
        share, partner = mix.shares[i].item(), mix.partners[i].item()
        assert 0.5 <= share <= 1
        np.testing.assert_allclose(blended[i], share * images[i] + (1 - share) * images[partner], atol=1e-9)
        np.testing.assert_allclose(labels[i], share * targets[i] + (1 - share) * targets[partner], atol=1e-9)
    assert torch.equal(Mixing(6, 0.75, torch.device("cpu"), 0, 3, keep=True)(images), blended)
    assert not torch.equal(Mixing(6, 0.75, torch.device("cpu"), 0, 4, keep=True)(images), blended)
    assert Mixing(500, 4.0, torch.device("cpu"), 0).shares.min() < 0.5


def test_the_memory_keeps_the_last_and_smooths_by_the_most_alike() -> None:
    memory = Memory(5, 2, 3).double()
    unit = torch.nn.functional.normalize(logits(12, 2, 1))
    classes = logits(12, 3, 2).softmax(dim=1)
    for start in (0, 4, 8):
        memory.enqueue(unit[start : start + 4], classes[start : start + 4])
    kept = {tuple(row) for row in memory.embeddings.tolist()}
    assert kept == {tuple(row) for row in unit[7:].tolist()}
    query, own = torch.nn.functional.normalize(logits(3, 2, 3)), logits(3, 3, 4).softmax(dim=1)
    for i in range(3):
        weights = softmax(np.array([float(query[i] @ row) for row in unit[7:]]) / 0.2)
        expected = 0.9 * own[i].numpy() + 0.1 * sum(w * classes[7 + j].numpy() for j, w in enumerate(weights))
        np.testing.assert_allclose(memory.smooth(query, own, 0.2, 0.9)[i].numpy(), expected, atol=1e-9)


def test_the_adversarial_direction_moves_the_prediction_most() -> None:
    """For a linear network the worst direction is known: the first eigenvector of W^T (diag p - p p^T) W."""
    weight = logits(3, 4, 1)
    images = logits(5, 4, 2).view(5, 1, 2, 2)

    def network(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight.T

    found = adversarial_direction(images, logits(5, 4, 3).view(5, 1, 2, 2), network, 1e-3, 100).flatten(1)
    for i in range(5):
        p = torch.tensor(softmax((weight @ images[i].flatten()).numpy()))
        fisher = weight.T @ (p.diag() - torch.outer(p, p)) @ weight
        assert abs(float(found[i] @ torch.linalg.eigh(fisher).eigenvectors[:, -1])) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_default_trial_step_is_found_in_single_precision(autocast: bool) -> None:
    """After one round the direction is the Fisher matrix times the first one; what the trial step adds to it is small."""
    weight, images, start = logits(3, 64, 1), 0.1 * logits(8, 64, 2), logits(8, 64, 3)
    xi = float(settings_model(find_method("finetune", "vat")).model_fields["xi"].default)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = adversarial_direction(images.float(), start.float(), lambda x: x @ weight.float().T, xi, 1).double()
    for i in range(8):
        p = torch.tensor(softmax((weight @ images[i]).numpy()))
        exact = weight.T @ (p.diag() - torch.outer(p, p)) @ weight @ start[i]
        assert float(found[i] @ exact / exact.norm()) > 0.98


@pytest.mark.parametrize(("n", "c"), SIZES)
@pytest.mark.parametrize("threshold", [0.6, 0.95, 1.0])
def test_shrunk_classes_leave_out_the_likeliest_rivals_one_by_one(n: int, c: int, threshold: float) -> None:
    """Against the search of arXiv:2308.06777: after the first class, rivals go in falling order until it reaches the threshold."""
    given = logits(n, c, 1).softmax(dim=1)
    for row, kept in zip(given.tolist(), shrunk_classes(given, threshold).tolist(), strict=True):
        first, *rivals = sorted(range(c), key=lambda k: -row[k])
        while rivals and row[first] / (row[first] + sum(row[k] for k in rivals)) < threshold:
            rivals.pop(0)
        assert kept == [float(k == first or k in rivals) for k in range(c)]


def test_shrunk_classes_of_a_sure_guess_are_all_and_of_a_hopeless_one_the_first_alone() -> None:
    sure, torn, hopeless = [0.96, 0.03, 0.01], [0.5, 0.49, 0.01], [0.4, 0.3, 0.3]
    assert shrunk_classes(torch.tensor([sure, torn, hopeless]), 0.95).tolist() == [[1, 1, 1], [1, 0, 1], [1, 0, 0]]


def test_of_two_first_classes_the_one_kept_is_the_guess() -> None:
    """Equal logits are common in bf16; were the other one kept, the loss would be infinite."""
    tied = torch.zeros(4, 40)
    tied[:, [7, 11, 30]] = 5
    given = tied.softmax(dim=1)
    assert shrunk_classes(given, 0.5)[range(4), given.argmax(dim=1)].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_shrunk_label_is_a_cross_entropy_among_the_classes_kept(n: int, c: int) -> None:
    given, guesses = logits(n, c, 1), torch.arange(n) % c
    kept = (logits(n, c, 2) > 0).double()
    kept[range(n), guesses] = 1
    weights = torch.linspace(0, 1, n, dtype=torch.float64)
    total = 0.0
    for i in range(n):
        among = [k for k in range(c) if kept[i, k]]
        probabilities = softmax(given[i, among].numpy())
        total -= weights[i].item() * math.log(probabilities[among.index(int(guesses[i]))])
    assert shrunk_label(given, guesses, kept, weights).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: shrunk_label(x, guesses, kept, weights), given.requires_grad_())


@pytest.mark.parametrize("n", [1, 5, 16])
def test_attenuated_is_the_formula_and_least_where_confidence_is_the_penalty_over_the_loss(n: int) -> None:
    scores, losses = 3 * logits(n, 1, 1)[:, 0], logits(n, 1, 2)[:, 0].exp()
    chances = [1 / (1 + math.exp(-score)) for score in scores.tolist()]
    total = sum(c * loss - 0.5 * math.log(c) for c, loss in zip(chances, losses.tolist(), strict=True))
    assert attenuated(scores, losses, 0.5).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda x: attenuated(x, losses, 0.5), scores.requires_grad_())
    best = torch.tensor([math.log(0.25 / 0.75)], dtype=torch.float64, requires_grad=True)  # confidence 0.25
    attenuated(best, torch.tensor([2.0], dtype=torch.float64), 0.5).backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-12)
