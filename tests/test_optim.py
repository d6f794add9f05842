"""Schedules at the points their papers name, and which parameters are decayed."""

import math

import pytest
import torch
from torch import nn

from modicum.optim import SCHEDULES, Pace, build_optimizer, learning_rate, parameter_groups, rising_to_one, schedule_with_warmup
from modicum.settings import OptimizerSettings


@pytest.mark.parametrize(
    ("name", "progress", "expected"),
    [
        ("cosine", 0, 1), ("cosine", 0.5, 0.5), ("cosine", 1, 0),
        ("cosine_7_16", 0, 1), ("cosine_7_16", 1, math.cos(7 * math.pi / 16)),
        ("step", 0.59, 1), ("step", 0.6, 0.1), ("step", 0.8, 0.01),
        ("constant", 0.7, 1),
    ],
)  # fmt: skip
def test_schedules(name: str, progress: float, expected: float) -> None:
    assert SCHEDULES[name](progress) == pytest.approx(expected, abs=1e-12)


def test_warmup_rises_to_the_peak_and_the_schedule_follows_in_full() -> None:
    schedule = schedule_with_warmup("cosine", 0.2)
    assert [schedule(at) for at in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_biases_and_norms_are_not_decayed_and_frozen_parameters_left_out() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    groups = parameter_groups([(model, 1.0)], 0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 5 - 1)]


def test_a_learning_rate_factor_of_zero_freezes_a_module() -> None:
    model = network()
    groups = parameter_groups([(model[0], 0.0), (model[3], 1.0)], 0.1)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model[3].parameters()}


def test_a_part_with_a_pace_of_its_own_has_groups_of_its_own() -> None:
    model = network()
    groups = parameter_groups([(model, 2.0)], 0.1, {model[3]: Pace(scheduled=False), model[1]: Pace(starts=0.5)})
    rates = [[learning_rate(group, 0.3, SCHEDULES["cosine"], at) for at in (0.0, 0.5, 1.0)] for group in groups]
    usual, constant, late = [0.6, 0.3, 0.0], [0.6, 0.6, 0.6], [0.0, 0.3, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1, 2]  # convolution, its bias; linear, its bias; the norm layer
    assert rates == [pytest.approx(expected) for expected in (usual, usual, constant, constant, late)]


def test_the_momentum_rises_to_one() -> None:
    assert [rising_to_one(0.99, at) for at in (0.0, 0.5, 1.0)] == pytest.approx([0.99, 0.995, 1.0], abs=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(8, 1, 3, 3)
    optimizer = build_optimizer(
        OptimizerSettings(name=name, lr=0.05, weight_decay=1e-4, momentum=0.9), parameter_groups([(model, 1.0)], 1e-4)
    )
    losses = []
    for _ in range(30):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lars_moves_weights_by_a_share_of_their_norm_and_biases_as_sgd_does(decay: float) -> None:
    """One step from the formula of arXiv:1708.03888: lr * 0.001 * |w| / (|g| + wd |w|) * (g + wd w)."""
    layer = nn.Linear(3, 2).double()
    w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    g, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    layer.weight.grad, layer.bias.grad = g.clone(), h.clone()
    settings = OptimizerSettings(name="lars", lr=2.0, weight_decay=decay, momentum=0.9)
    build_optimizer(settings, parameter_groups([(layer, 1.0)], decay)).step()
    trust = 0.001 * w.norm() / (g.norm() + decay * w.norm())
    torch.testing.assert_close(layer.weight.detach(), w - 2.0 * trust * (g + decay * w))
    torch.testing.assert_close(layer.bias.detach(), b - 2.0 * h)
