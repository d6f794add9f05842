"""Weighted kNN against a loop written from the formula, and against scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from modicum.neighbours import normalise, scores, search, usable


def reference(bank, labels, queries, k, temperature, num_classes):
    """The formula, one query and one neighbour at a time, in float64."""
    table = np.full((len(queries), num_classes), -np.inf)
    for row, query in enumerate(queries):
        cosines = [query @ image / (np.linalg.norm(query) * np.linalg.norm(image)) for image in bank]
        nearest = sorted(range(len(bank)), key=lambda at: -cosines[at])[:k]
        for at in nearest:
            vote = math.exp(cosines[at] / temperature)
            table[row, labels[at]] = vote if np.isinf(table[row, labels[at]]) else table[row, labels[at]] + vote
    return table


@pytest.mark.parametrize(("size", "queries", "dimensions", "num_classes"), [(30, 7, 5, 3), (64, 20, 16, 11), (9, 3, 2, 4)])
def test_votes_agree_with_the_formula_for_every_k_of_one_search(size, queries, dimensions, num_classes):
    random = np.random.default_rng(size)
    bank, asked = random.normal(size=(size, dimensions)), random.normal(size=(queries, dimensions))
    labels = random.integers(0, num_classes, size)
    ks, _ = usable([5, 1, 9], size)
    similarities, found = search(normalise(bank), normalise(asked), ks[-1])
    for k, table in scores(similarities, labels[found], ks, 0.07, num_classes):
        expected = reference(bank, labels, asked, k, 0.07, num_classes)
        ratio = np.exp(-similarities[:, :1].astype(np.float64) / 0.07)  # votes are relative to the nearest neighbour's
        np.testing.assert_allclose(table, expected * ratio, rtol=2e-5)
        assert (table.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_predictions_agree_with_scikit_learn(k):
    random = np.random.default_rng(k)
    bank, asked = normalise(random.normal(size=(200, 8))), normalise(random.normal(size=(90, 8)))
    labels = random.integers(0, 5, 200)
    weighted = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07))
    similarities, found = search(bank, asked, k)
    [(_, table)] = scores(similarities, labels[found], [k], 0.07, 5)
    assert (table.argmax(axis=1) == weighted.fit(bank, labels).predict(asked)).all()


def test_classes_that_are_missing_in_the_bank_are_never_named():
    bank = normalise(np.eye(3) + 0.1)
    labels = np.array([7, 2, 7])
    similarities, found = search(bank, bank, 3)
    for k, table in scores(similarities, labels[found], [1, 3], 0.07, 9):
        assert table.shape == (3, 9)
        assert set(np.flatnonzero(np.isfinite(table).any(axis=0))) == {2, 7}
        if k == 1:
            assert (table.argmax(axis=1) == labels).all()


def test_a_small_temperature_neither_overflows_nor_forgets_the_nearest():
    similarities = np.array([[0.99, 0.2]], dtype=np.float32)
    [(_, table)] = scores(similarities, np.array([[1, 0]]), [2], 1e-4, 2)
    assert table.argmax() == 1
    assert table[0, 1] == 1.0


def test_a_k_above_the_bank_is_left_out():
    assert usable([20, 1, 5, 200, 5], 20) == ([1, 5, 20], [200])
    assert usable([10], 3) == ([], [10])


def test_chunks_of_queries_change_nothing(monkeypatch):
    random = np.random.default_rng(0)
    similarities = -np.sort(-random.random((50, 6)).astype(np.float32), axis=1)
    labels = random.integers(0, 4, (50, 6))
    whole = [table for _, table in scores(similarities, labels, [2, 6], 0.1, 4)]
    monkeypatch.setattr("modicum.neighbours.CHUNK", 7)
    for table, (_, part) in zip(whole, scores(similarities, labels, [2, 6], 0.1, 4), strict=True):
        np.testing.assert_array_equal(table, part)


def test_of_equally_similar_images_the_lower_rows_are_found():
    bank = normalise(np.repeat(np.eye(4, dtype=np.float32), 6, axis=0))  # six copies of each of four images
    similarities, found = search(bank, bank[[0, 7]], 4)
    assert found.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert (similarities == 1).all()
    _, more = search(bank, bank[[7]], 9)
    assert more.tolist() == [[6, 7, 8, 9, 10, 11, 0, 1, 2]]


def test_an_approximate_search_finds_most_of_what_the_exact_one_does():
    random = np.random.default_rng(0)
    centres = random.normal(size=(20, 16))
    bank, asked = (normalise(centres[random.integers(0, 20, n)] + 0.3 * random.normal(size=(n, 16))) for n in (20_000, 100))
    _, exact = search(bank, asked, 20)
    similarities, found = search(bank, asked, 20, approximate=True)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert np.mean([len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]) / 20 > 0.9
