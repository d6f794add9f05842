"""Stage one's losses against slow float64 references written from the papers' formulas, closed forms and numerical gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modicum.pretrain.losses import (
    across_views,
    anisotropy,
    cosines,
    covariance,
    cross_correlation,
    in_batch_info_nce,
    info_nce,
    lacking_deviation,
    negative_cosine,
    nt_xent,
    off_diagonal_squares,
    regression,
    sinkhorn,
    whiten,
)
from modicum.pretrain.queue import Queue

SIZES = [(2, 3, 5), (7, 4, 16), (16, 8, 33)]


def unit(rows: int, columns: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_info_nce_is_the_formula(n: int, d: int, k: int) -> None:
    q, key, queue = unit(n, d, 1), unit(n, d, 2), unit(k, d, 3)
    rows, keys, others = q.numpy(), key.numpy(), queue.numpy()
    total = 0.0
    for i in range(n):
        positive = math.exp(rows[i] @ keys[i] / 0.2)
        negatives = sum(math.exp(rows[i] @ others[j] / 0.2) for j in range(k))
        total -= math.log(positive / (positive + negatives))
    assert info_nce(q, key, queue, 0.2).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda q: info_nce(q, key, queue, 0.2), q.requires_grad_())


def test_info_nce_of_indistinguishable_keys_is_the_log_of_their_number() -> None:
    q = unit(4, 8, 1)
    assert info_nce(q[:1], q[:1], q[:1].repeat(9, 1), 0.07).item() == pytest.approx(math.log(10))


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_in_batch_info_nce_is_the_formula(n: int, d: int, k: int) -> None:
    q, keys = unit(n, d, 1), unit(n + k, d, 2)
    rows, others = q.numpy(), keys.numpy()
    total = 0.0
    for i in range(n):
        below = sum(math.exp(rows[i] @ others[j] / 0.2) for j in range(n + k))
        total -= 2 * 0.2 * math.log(math.exp(rows[i] @ others[k + i] / 0.2) / below)
    assert in_batch_info_nce(q, keys, k, 0.2).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda q: in_batch_info_nce(q, keys, k, 0.2), q.requires_grad_())
    alike = q[:1].detach().repeat(8, 1)
    assert in_batch_info_nce(alike, alike, 0, 0.5).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_nt_xent_is_the_formula(n: int, d: int, k: int) -> None:
    first, second = unit(n, d, 1), unit(n, d, 2)
    z = np.concatenate([first.numpy(), second.numpy()])
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        below = sum(math.exp(z[i] @ z[j] / 0.5) for j in range(2 * n) if j != i)
        total -= math.log(math.exp(z[i] @ z[partner] / 0.5) / below)
    assert nt_xent(first, second, first, second, 0, 0.5).item() == pytest.approx(total / (2 * n), abs=1e-9)
    torch.autograd.gradcheck(lambda a: nt_xent(a, second, a, second, 0, 0.5), first.requires_grad_())


def test_nt_xent_of_two_halves_is_that_of_the_whole() -> None:
    first, second = unit(8, 4, 1), unit(8, 4, 2)
    halves = [nt_xent(first[part], second[part], first, second, part.start, 0.5) for part in (slice(0, 4), slice(4, 8))]
    assert (sum(halves) / 2).item() == pytest.approx(nt_xent(first, second, first, second, 0, 0.5).item(), abs=1e-12)


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_regression_is_the_squared_distance_of_unit_vectors(n: int, d: int, k: int) -> None:
    p, z = 3 * unit(n, d, 1), 0.2 * unit(n, d, 2)
    rows, targets = p.numpy(), z.numpy()
    total = sum(np.sum((rows[i] / np.linalg.norm(rows[i]) - targets[i] / np.linalg.norm(targets[i])) ** 2) for i in range(n))
    assert regression(p, z).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda p: regression(p, z), p.requires_grad_())
    assert regression(z, 5 * z).item() == pytest.approx(0, abs=1e-12)
    assert regression(z, -z).item() == pytest.approx(4)


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_negative_cosine_is_the_formula(n: int, d: int, k: int) -> None:
    p, z = 3 * unit(n, d, 1), 0.2 * unit(n, d, 2)
    rows, targets = p.numpy(), z.numpy()
    total = sum(-(rows[i] @ targets[i]) / (math.sqrt(rows[i] @ rows[i]) * math.sqrt(targets[i] @ targets[i])) for i in range(n))
    assert negative_cosine(p, z).item() == pytest.approx(total / n, abs=1e-9)
    torch.autograd.gradcheck(lambda p: negative_cosine(p, z), p.requires_grad_())
    assert negative_cosine(z, 5 * z).item() == pytest.approx(-1)


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_cross_correlation_is_the_formula(n: int, d: int, k: int) -> None:
    first, second = 3 * unit(n, d, 1) + 1, unit(n, d, 2) - 2
    a, b = (z.numpy() - z.numpy().mean(axis=0) for z in (first, second))
    for i in range(d):
        for j in range(d):
            above = sum(a[row, i] * b[row, j] for row in range(n))
            below = math.sqrt(sum(a[row, i] ** 2 for row in range(n))) * math.sqrt(sum(b[row, j] ** 2 for row in range(n)))
            assert cross_correlation(first, second)[i, j].item() == pytest.approx(above / below, abs=1e-9)
    torch.autograd.gradcheck(lambda z: cross_correlation(z, second), first.requires_grad_())
    torch.testing.assert_close(cross_correlation(second, -3 * second + 1).diagonal(), -torch.ones(d, dtype=torch.float64))


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_the_terms_of_vicreg_are_the_formula(n: int, d: int, k: int) -> None:
    z = unit(n, d, 1) + 3
    rows = z.numpy()
    mean = [sum(rows[:, i]) / n for i in range(d)]
    shared = [[sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / (n - 1) for j in range(d)] for i in range(d)]
    torch.testing.assert_close(covariance(z), torch.tensor(shared, dtype=torch.float64), rtol=0, atol=1e-9)
    beside = sum(shared[i][j] ** 2 for i in range(d) for j in range(d) if i != j)
    assert off_diagonal_squares(covariance(z)).item() == pytest.approx(beside, abs=1e-9)
    lacking = sum(max(0, 1 - math.sqrt(shared[i][i] + 1e-4)) for i in range(d)) / d
    assert lacking_deviation(z).item() == pytest.approx(lacking, abs=1e-9)
    torch.autograd.gradcheck(lambda z: off_diagonal_squares(covariance(z)) + lacking_deviation(z), z.requires_grad_())


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_anisotropy_is_the_formula(n: int, d: int, k: int) -> None:
    z = unit(n, d, 1) * torch.arange(1.0, d + 1) + 3
    shared = covariance(z)
    level = sum(shared[i, i].item() for i in range(d)) / d
    expected = sum((shared[i, j].item() / level - (i == j)) ** 2 for i in range(d) for j in range(d)) / d
    assert anisotropy(z).item() == pytest.approx(expected, rel=1e-9)
    assert anisotropy(7 * z - 2).item() == pytest.approx(expected, rel=1e-9)
    torch.autograd.gradcheck(anisotropy, z.requires_grad_())


def test_features_that_vary_alike_have_no_anisotropy_and_equal_ones_that_of_the_identity() -> None:
    even = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    assert anisotropy(even).item() == pytest.approx(0, abs=1e-12)
    assert anisotropy(torch.full((5, 3), 7.0)).item() == pytest.approx(1)


def test_equal_rows_lack_all_deviation_and_share_nothing() -> None:
    z = torch.full((5, 3), 7.0, dtype=torch.float64)
    assert lacking_deviation(z).item() == pytest.approx(1 - 0.01)
    assert off_diagonal_squares(covariance(z)).item() == 0
    assert lacking_deviation(100 * unit(64, 3, 1)).item() == 0


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_cosines_are_the_formula(n: int, d: int, k: int) -> None:
    z, directions = 3 * unit(n, d, 1), 0.2 * unit(k, d, 2)
    rows, others = z.numpy(), directions.numpy()
    for i in range(n):
        for j in range(k):
            cosine = rows[i] @ others[j] / (math.sqrt(rows[i] @ rows[i]) * math.sqrt(others[j] @ others[j]))
            assert cosines(z, directions)[i, j].item() == pytest.approx(cosine, abs=1e-9)
    torch.autograd.gradcheck(cosines, (z.requires_grad_(), directions.requires_grad_()))
    assert cosines(z, z).diagonal().tolist() == pytest.approx([1] * n)


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_sinkhorn_is_the_iteration(n: int, d: int, k: int) -> None:
    scores = unit(n, k, 1)
    q = [[math.exp(scores[i, j].item() / 0.05) for j in range(k)] for i in range(n)]
    for _ in range(3):
        used = [sum(q[i][j] for i in range(n)) for j in range(k)]
        q = [[q[i][j] / used[j] / k for j in range(k)] for i in range(n)]
        q = [[value / sum(row) / n for value in row] for row in q]
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), n * torch.tensor(q, dtype=torch.float64), rtol=0, atol=1e-9)


def test_codes_are_distributions_that_use_all_prototypes_alike() -> None:
    scores = unit(60, 5, 1)
    scores[:, 0] += 1  # without the equal use all images would choose this one
    codes = sinkhorn(scores, 0.5, 50)
    assert codes.sum(dim=1).tolist() == pytest.approx([1] * 60)
    assert codes.sum(dim=0).tolist() == pytest.approx([12] * 5)
    assert sinkhorn(torch.zeros(4, 2), 0.05, 3).tolist() == [[0.5, 0.5]] * 4
    sharp = sinkhorn(unit(60, 5, 2).float(), 0.001, 50)
    assert sharp.isfinite().all()
    assert sharp.sum(dim=1).tolist() == pytest.approx([1] * 60, rel=1e-4)


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_across_views_is_the_formula_and_no_view_predicts_itself(n: int, d: int, k: int) -> None:
    logits = [3 * unit(n, k, seed) for seed in range(4)]
    targets = [unit(n, k, seed).softmax(dim=1) for seed in (5, 6)]
    total = 0.0
    for t in range(2):
        for v in range(4):
            for i in range(n):
                below = sum(math.exp(logits[v][i, c]) for c in range(k))
                surprise = -sum(float(targets[t][i, c]) * math.log(math.exp(logits[v][i, c]) / below) for c in range(k))
                total += surprise if v != t else 0.0
    assert across_views(logits, targets).item() == pytest.approx(total / (n * 6), abs=1e-9)
    torch.autograd.gradcheck(lambda *views: across_views(list(views), targets), [view.requires_grad_() for view in logits])
    assert across_views([torch.zeros(3, k), torch.zeros(3, k)], [torch.eye(k)[:1]] * 2).item() == pytest.approx(math.log(k))


@pytest.mark.parametrize(("n", "d"), [(8, 3), (9, 4), (40, 8)])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_whitening_is_the_formula(n: int, d: int, shrinkage: float) -> None:
    z = unit(n, d, 1) @ torch.randn(d, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 3
    rows = z.numpy()
    mean = rows.mean(axis=0)
    shared = sum(np.outer(row - mean, row - mean) for row in rows) / (n - 1)
    turn = np.linalg.inv(np.linalg.cholesky((1 - shrinkage) * shared + shrinkage * np.eye(d)))
    expected = torch.tensor(np.array([turn @ (row - mean) for row in rows]))
    torch.testing.assert_close(whiten(z, shrinkage), expected, rtol=0, atol=1e-8)
    torch.autograd.gradcheck(lambda z: whiten(z, shrinkage), z.requires_grad_())


def test_what_is_whitened_has_covariance_one() -> None:
    z = whiten(unit(50, 6, 1) * torch.arange(1, 7) - 2, 0.0)
    torch.testing.assert_close(covariance(z), torch.eye(6, dtype=torch.float64))
    assert z.mean(dim=0).abs().max().item() < 1e-12


@pytest.mark.parametrize("batch", [1, 4, 5, 7, 25])
def test_queue_wraps_at_any_batch_size(batch: int) -> None:
    queue, expected, pointer = Queue(7, 3, seed=0), None, 0
    expected = queue.keys.clone()
    for step in range(6):
        keys = unit(batch, 3, 10 + step).float()
        queue.enqueue(keys)
        for row in keys[-7:]:
            expected[pointer] = row
            pointer = (pointer + 1) % 7
        assert torch.equal(queue.keys, expected)
        assert int(queue.pointer) == pointer
