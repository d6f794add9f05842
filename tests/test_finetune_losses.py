"""Stage two's losses against slow float64 references written from the papers' formulas, closed forms and numerical gradients."""

import math

import numpy as np
import pytest
import torch

from modicum.finetune.alignment import MOMENTUM, DistributionAlignment
from modicum.finetune.losses import consistency, linear_ramp, pseudo_label, ramp_up

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


def test_alignment_scales_guesses_to_the_prior_and_remembers_their_mean() -> None:
    """Against the formula of arXiv:1911.09785: q * prior / running mean, normalised."""
    align, mean = DistributionAlignment(3).double(), np.full(3, 1 / 3)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for seed in range(4):
        guesses = (3 * logits(8, 3, seed)).softmax(dim=1)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * guesses.numpy().mean(axis=0)
        expected = guesses.numpy() * prior.numpy() / mean
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(align(guesses, prior).numpy(), expected, atol=1e-9)
