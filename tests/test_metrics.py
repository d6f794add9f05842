"""Accuracies, intervals and confusions against what they mean."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import top_k_accuracy_score

from modicum.evaluate.metrics import class_accuracies, confusion_matrix, difference_interval, interval, most_confused, top_correct


@pytest.mark.parametrize("count", [1, 2, 5])
def test_top_accuracy_agrees_with_scikit_learn(count):
    random = np.random.default_rng(count)
    scores, labels = random.normal(size=(300, 9)), random.integers(0, 9, 300)
    expected = top_k_accuracy_score(labels, scores, k=count, labels=range(9))
    assert top_correct(scores, labels, count).mean() == pytest.approx(expected)


def test_equal_scores_rank_as_argmax_does_and_a_class_never_named_is_never_right():
    scores = np.array([[1.0, 1.0, -np.inf, -np.inf]] * 3)
    assert top_correct(scores, np.array([0, 1, 2]), 1).tolist() == [True, False, False]
    assert top_correct(scores, np.array([0, 1, 2]), 4).tolist() == [True, True, False]


@pytest.mark.parametrize(("count", "right"), [(450, 430), (60, 31), (2000, 100)])
def test_interval_is_that_of_a_bootstrap_written_out(count, right):
    correct = np.arange(count) < right
    random = np.random.default_rng(1)
    means = [correct[random.integers(0, count, count)].mean() for _ in range(4000)]
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(interval(correct, 40_000, 0), expected, atol=0.06 * np.sqrt(1 / count) + 1 / count)


def test_difference_interval_is_that_of_a_paired_bootstrap_written_out():
    random = np.random.default_rng(0)
    first, second = random.random(400) < 0.9, random.random(400) < 0.8
    drawn = random.integers(0, 400, (4000, 400))
    expected = np.quantile((first[drawn].astype(float) - second[drawn]).mean(axis=1), [0.025, 0.975])
    np.testing.assert_allclose(difference_interval(first, second, 40_000, 0), expected, atol=0.005)


def test_interval_is_seeded_and_closed_where_all_are_right():
    correct = np.random.default_rng(0).random(100) < 0.7
    assert interval(correct, 500, 3) == interval(correct, 500, 3)
    assert interval(np.ones(10, dtype=bool), 100, 0) == (1.0, 1.0)
    assert difference_interval(correct, correct, 100, 0) == (0.0, 0.0)


def test_confusion_counts_and_class_accuracies_with_an_absent_class():
    labels, predicted = np.array([0, 0, 2, 2, 2, 0]), np.array([0, 1, 2, 0, 2, 1])
    confusion = confusion_matrix(labels, predicted, 4)
    np.testing.assert_array_equal(confusion, sklearn_confusion(labels, predicted, labels=range(4)))
    assert class_accuracies(confusion) == [pytest.approx(1 / 3), None, pytest.approx(2 / 3), None]
    assert most_confused(confusion, 5) == [(0, 1, 2), (2, 0, 1)]
    assert most_confused(confusion, 1) == [(0, 1, 2)]
