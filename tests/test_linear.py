"""The linear probe against scikit-learn's logistic regression, and how it chooses its regularisation."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from modicum import softmax_regression
from modicum.data.stratify import stratified_folds
from modicum.evaluate import linear
from modicum.settings import LinearSettings
from modicum.softmax_regression import FINE, ROUGH, SoftmaxRegression
from modicum.whitening import standardise

SETTINGS = LinearSettings()


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:700], order[700:]
    return standardise((pixels / 16).astype(np.float32), train), labels, train, test


def objective(features, labels, weight, bias, strength):
    """scikit-learn's: C * sum of cross-entropies + |W|^2 / 2."""
    losses = -log_softmax(features.astype(np.float64) @ weight + bias, axis=1)[np.arange(len(labels)), labels]
    return strength * losses.sum() + 0.5 * np.square(weight).sum()


def solved(features, labels, strengths, used=None, tolerance=FINE[torch.float64], dtype=torch.float64, **options):
    """Weights (D, C) and intercepts (C,), float64, one pair a strength."""
    regression = SoftmaxRegression(torch.from_numpy(features).to(dtype), torch.from_numpy(labels), 10)
    used = torch.ones(len(strengths), len(labels), dtype=torch.bool) if used is None else used
    solutions = regression.solve(torch.tensor(strengths), used, tolerance, 2000, **options)
    return [tuple(part.double().numpy() for part in regression.linear_map(solution)) for solution in solutions]


def by_scikit_learn(features, labels, strength):
    return LogisticRegression(C=strength, max_iter=5000, tol=1e-7).fit(features.astype(np.float64), labels)


@pytest.mark.parametrize("rows", [30, 700], ids=["fewer images than features", "more"])
def test_objective_and_predictions_agree_with_scikit_learn(digits, rows):
    features, labels, train, test = digits
    train = train[:rows]
    strengths = [0.01, 1.0, 10.0]
    for strength, (weight, bias) in zip(strengths, solved(features[train], labels[train], strengths), strict=True):
        peer = by_scikit_learn(features[train], labels[train], strength)
        reached = objective(features[train], labels[train], weight, bias, strength)
        theirs = np.zeros((features.shape[1], 10)), np.full(10, -50.0)  # a class that scikit-learn did not see
        theirs[0][:, peer.classes_], theirs[1][peer.classes_] = peer.coef_.T, peer.intercept_
        assert reached <= objective(features[train], labels[train], *theirs, strength) * (1 + 1e-6)
        same = (features[test] @ weight + bias).argmax(axis=1) == peer.predict(features[test].astype(np.float64))
        assert same.mean() >= 0.998


@pytest.mark.parametrize("tolerance", [ROUGH[torch.float32], FINE[torch.float32]])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_what_is_left_of_the_objective_is_of_the_order_of_the_tolerance(digits, strength, tolerance):
    features, labels, train, _ = digits
    args = features[train], labels[train]
    [best] = solved(*args, [strength], tolerance=1e-11)
    [double] = solved(*args, [strength], tolerance=tolerance)
    [single] = solved(*args, [strength], tolerance=tolerance, dtype=torch.float32)
    for found in (double, single):  # the tolerance is for what L-BFGS expects to gain, which is less than what there is
        assert objective(*args, *found, strength) <= objective(*args, *best, strength) * (1 + 40 * tolerance)


def test_bf16_products_rank_strengths_as_float64_does(digits):
    features, labels, train, test = digits
    args = features[train], labels[train], SETTINGS.strengths

    def accuracies(found):
        return np.array([((features[test] @ weight + bias).argmax(axis=1) == labels[test]).mean() for weight, bias in found])

    exact = accuracies(solved(*args))
    rounded = accuracies(solved(*args, tolerance=ROUGH[torch.float32], dtype=torch.float32, precision=torch.bfloat16))
    np.testing.assert_allclose(rounded, exact, atol=0.015)
    assert exact[rounded.argmax()] >= exact.max() - 0.003


def test_problems_solved_together_equal_those_solved_alone(digits):
    features, labels, train, _ = digits
    rows = train[:120]
    args = features[rows], labels[rows]
    used = torch.from_numpy(stratified_folds(labels[rows], 3, 0) != np.arange(3)[:, None])
    together = solved(*args, [0.1, 0.1, 1.0], used, 1e-12)
    for strength, mask, (weight, bias) in zip([0.1, 0.1, 1.0], used.numpy(), together, strict=True):
        [(alone, its_bias)] = solved(features[rows[mask]], labels[rows[mask]], [strength], tolerance=1e-12)
        np.testing.assert_allclose(weight, alone, atol=1e-4)
        np.testing.assert_allclose(bias - bias.mean(), its_bias - its_bias.mean(), atol=1e-4)


def test_a_start_at_the_solution_stays_there(digits):
    features, labels, train, _ = digits
    regression = SoftmaxRegression(torch.from_numpy(features[train]).double(), torch.from_numpy(labels[train]), 10)
    everything = torch.ones(1, len(train), dtype=torch.bool)
    found = regression.solve(torch.tensor([0.1]), everything, 1e-10, 2000)
    assert torch.equal(regression.solve(torch.tensor([0.1]), everything, 1e-9, 2000, start=found), found)


def test_shares_of_the_classes_stand_for_labels_where_they_are_certain(digits):
    features, labels, train, _ = digits
    inputs, everything = torch.from_numpy(features[train]).double(), torch.ones(1, len(train), dtype=torch.bool)
    targets = torch.from_numpy(labels[train])
    by_label, by_share = (
        SoftmaxRegression(inputs, given, 10).solve(torch.tensor([0.1]), everything, 1e-10, 2000)
        for given in (targets, torch.nn.functional.one_hot(targets, 10).double())
    )
    torch.testing.assert_close(by_share, by_label, atol=1e-5, rtol=1e-4)


def take(labels, a_class):
    return np.concatenate([np.flatnonzero(labels == label)[:a_class] for label in range(10)])


def test_choice_by_validation_takes_the_best_there_and_refits_on_all(digits):
    features, labels, train, _ = digits
    rows = train[:300]
    validation = np.arange(300) >= 200
    probe = linear.fit_probe(features[rows], labels[rows], 10, SETTINGS, 0, validation)
    fits = [by_scikit_learn(features[rows[:200]], labels[rows[:200]], strength) for strength in SETTINGS.strengths]
    accuracies = [fit.score(features[rows[200:]].astype(np.float64), labels[rows[200:]]) for fit in fits]
    assert probe.strength == SETTINGS.strengths[int(np.argmax(accuracies))]
    [(weight, _)] = solved(features[rows], labels[rows], [probe.strength])
    np.testing.assert_allclose(probe.weight.numpy(), weight, atol=1e-3)  # refitted on all of them


def test_choice_of_a_large_problem_takes_scikit_learns_strength_and_accuracy(digits, monkeypatch):
    features, labels, train, test = digits
    monkeypatch.setattr(softmax_regression, "SMALL", 0)  # single precision, ranked from rough solutions
    validation = np.arange(len(train)) >= 500
    probe = linear.fit_probe(features[train], labels[train], 10, SETTINGS, 0, validation)
    fits = [by_scikit_learn(features[train[:500]], labels[train[:500]], strength) for strength in SETTINGS.strengths]
    accuracies = [fit.score(features[train[500:]].astype(np.float64), labels[train[500:]]) for fit in fits]
    assert accuracies[SETTINGS.strengths.index(probe.strength)] >= max(accuracies) - 0.005  # one image of 200
    peer = by_scikit_learn(features[train], labels[train], probe.strength)
    accuracy = (probe.scores(features[test]).argmax(axis=1) == labels[test]).mean()
    assert abs(accuracy - peer.score(features[test].astype(np.float64), labels[test])) <= 0.002


@pytest.mark.parametrize(
    ("a_class", "words"), [(1, "the middle one"), (2, "by 2-fold"), (4, "by 4-fold"), (8, "by 5-fold"), (25, "on a tenth")]
)
def test_choice_without_validation_follows_the_number_of_labels(digits, a_class, words):
    features, labels, _, _ = digits
    rows = take(labels, a_class)
    probe = linear.fit_probe(features[rows], labels[rows], 10, LinearSettings(strengths=[1.0, 0.01, 0.1]), 0)
    assert probe.chosen.startswith(words)
    if a_class == 1:
        assert probe.strength == 0.1


def test_strengths_that_do_equally_well_give_the_strongest_regularisation():
    labels = np.repeat([0, 1], 30)
    features = (np.where(labels, 3.0, -3.0)[:, None] + np.zeros((1, 2))).astype(np.float32)
    assert linear.fit_probe(features, labels, 2, SETTINGS, 0).strength == min(SETTINGS.strengths)


def test_cross_validated_scores_never_come_from_a_probe_that_saw_the_image(digits):
    features, labels, train, _ = digits
    random = np.random.default_rng(0)
    rows = train[:100]
    noise = random.integers(0, 2, 100)
    own = np.eye(100, dtype=np.float32)  # a feature of its own for each image: learnt by heart, worth nothing elsewhere
    scores, folds = linear.cross_validated(own, noise, 2, SETTINGS, 0)
    assert folds == 5
    assert (scores.argmax(axis=1) == noise).mean() < 0.75
    scores, _ = linear.cross_validated(features[rows], labels[rows], 10, SETTINGS, 0)
    assert (scores.argmax(axis=1) == labels[rows]).mean() > 0.75


def test_cross_validation_without_a_second_label_of_any_class_has_no_fold():
    scores, folds = linear.cross_validated(np.eye(3, dtype=np.float32), np.arange(3), 3, SETTINGS, 0)
    assert folds == 0
    assert np.isnan(scores).all()
