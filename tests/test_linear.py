"""The linear probe against scikit-learn's logistic regression, and how it chooses its regularisation."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from modicum.data.stratify import stratified_folds
from modicum.evaluate import linear
from modicum.settings import LinearSettings

SETTINGS = LinearSettings()


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:700], order[700:]
    return linear.standardise((pixels / 16).astype(np.float32), train), labels, train, test


def objective(features, labels, weight, bias, strength):
    """scikit-learn's: C * sum of cross-entropies + |W|^2 / 2."""
    losses = -log_softmax(features.astype(np.float64) @ weight + bias, axis=1)[np.arange(len(labels)), labels]
    return strength * losses.sum() + 0.5 * np.square(weight).sum()


def solved(features, labels, strengths, dtype=torch.float64):
    used = torch.ones(1, len(labels), dtype=torch.bool)
    found = linear.solve(torch.from_numpy(features).to(dtype), torch.from_numpy(labels), 10, strengths, used, 300, linear.FINE)
    return [(weight[:, 0].double().numpy(), bias[0].double().numpy()) for weight, bias in found]


@pytest.mark.parametrize("rows", [30, 700], ids=["fewer images than features", "more"])
def test_objective_and_accuracy_agree_with_scikit_learn(digits, rows):
    features, labels, train, test = digits
    train = train[:rows]
    strengths = [0.01, 1.0, 10.0]
    for strength, (weight, bias) in zip(strengths, solved(features[train], labels[train], strengths), strict=True):
        peer = LogisticRegression(C=strength, max_iter=5000, tol=1e-6).fit(features[train].astype(np.float64), labels[train])
        reached = objective(features[train], labels[train], weight, bias, strength)
        theirs = np.zeros((features.shape[1], 10)), np.full(10, -50.0)  # a class that scikit-learn did not see
        theirs[0][:, peer.classes_], theirs[1][peer.classes_] = peer.coef_.T, peer.intercept_
        best = objective(features[train], labels[train], *theirs, strength)
        assert reached <= best * (1 + 1e-3)
        accuracy = ((features[test] @ weight + bias).argmax(axis=1) == labels[test]).mean()
        assert abs(accuracy - peer.score(features[test], labels[test])) <= 0.01


def test_single_precision_reaches_the_same(digits):
    features, labels, train, _ = digits
    [double] = solved(features[train], labels[train], [1.0])
    [single] = solved(features[train], labels[train], [1.0], torch.float32)
    args = features[train], labels[train]
    assert objective(*args, *single, 1.0) <= objective(*args, *double, 1.0) * (1 + 1e-3)


def test_problems_solved_together_equal_those_solved_alone(digits):
    features, labels, train, _ = digits
    rows = train[:120]
    inputs, targets = torch.from_numpy(features[rows]).double(), torch.from_numpy(labels[rows])
    used = torch.from_numpy(stratified_folds(labels[rows], 3, 0) != np.arange(3)[:, None])
    [(together, _)] = linear.solve(inputs, targets, 10, [0.1], used, 500, 1e-7)
    for problem in range(3):
        mask = used[problem]
        [(alone, _)] = linear.solve(inputs[mask], targets[mask], 10, [0.1], mask[mask][None], 500, 1e-7)
        torch.testing.assert_close(together[:, problem], alone[:, 0], atol=2e-4, rtol=0)


def take(labels, a_class):
    return np.concatenate([np.flatnonzero(labels == label)[:a_class] for label in range(10)])


def test_choice_by_validation_takes_the_best_there_and_refits_on_all(digits):
    features, labels, train, _ = digits
    rows = train[:300]
    validation = np.arange(300) >= 200
    probe = linear.fit_probe(features[rows], labels[rows], 10, SETTINGS, 0, validation)
    accuracies = []
    for weight, bias in solved(features[rows[:200]], labels[rows[:200]], SETTINGS.strengths):
        accuracies.append(((features[rows[200:]] @ weight + bias).argmax(axis=1) == labels[rows[200:]]).mean())
    assert accuracies[SETTINGS.strengths.index(probe.strength)] >= max(accuracies) - 0.01  # one image: ranked from rough solutions
    [(weight, _)] = solved(features[rows], labels[rows], [probe.strength])
    np.testing.assert_allclose(probe.weight.numpy(), weight, atol=2e-3)  # refitted on all of them


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


def test_standardise_uses_training_images_alone_and_silences_constant_columns():
    features = np.array([[1, 5, 0.1], [3, 5, 0.1], [100, 9, 0.1]], dtype=np.float32)
    result = linear.standardise(features, np.array([0, 1]))
    np.testing.assert_allclose(result, [[-1, 0, 0], [1, 0, 0], [98, 0, 0]], atol=1e-5)
