"""Features on a common scale, against the formula in float64, and what neighbours gain by it."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from modicum.neighbours import normalise
from modicum.whitening import PRIOR, standardise, whiten


def test_standardise_uses_training_images_alone_and_silences_constant_columns():
    features = np.array([[1, 5, 0.1], [3, 5, 0.1], [100, 9, 0.1]], dtype=np.float32)
    result = standardise(features, np.array([0, 1]))
    np.testing.assert_allclose(result, [[-1, 0, 0], [1, 0, 0], [98, 0, 0]], atol=1e-5)


def some_features(count: int = 9000) -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.normal(size=(count, 6)) @ random.normal(size=(6, 6)) + 5).astype(np.float32)


def test_whitened_features_vary_alike_over_the_images_given() -> None:
    features, rows = some_features(), np.arange(0, 9000, 2)
    mixed = whiten(features, rows)[rows].astype(np.float64)
    variances = np.linalg.eigvalsh(np.corrcoef(features[rows].T.astype(np.float64)))
    expected = variances / (variances + PRIOR / 4500 * variances[-1])
    found = np.cov(mixed.T, bias=True)
    np.testing.assert_allclose(found, np.diag(found.diagonal()), atol=1e-4)
    np.testing.assert_allclose(found.diagonal(), expected, rtol=1e-3)
    np.testing.assert_allclose(mixed.mean(axis=0), 0, atol=1e-4)


def test_images_beside_those_given_are_moved_alike_and_have_no_say() -> None:
    features, rows = some_features(), np.arange(5000)
    other = np.concatenate([features[:5000], 1e3 * features[5000:]])
    np.testing.assert_allclose(whiten(other, rows)[:5000], whiten(features, rows)[:5000], rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_few_images_leave_the_angles_of_standardised_features_nearly_as_they_are(seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(8, 5)).astype(np.float32)
    cosines = [normalise(kind) @ normalise(kind).T for kind in (whiten(features), standardise(features))]
    np.testing.assert_allclose(*cosines, atol=0.1)


def test_neighbours_see_a_class_that_only_a_small_direction_tells() -> None:
    random = np.random.default_rng(1)
    labels = np.arange(4000) % 2
    loud = random.normal(size=(4000, 5)) @ random.normal(size=(5, 8)) * 2 + random.normal(size=(4000, 8)) / 8
    features = (loud + labels[:, None] * random.normal(size=8)).astype(np.float32)

    def accuracy(kind: np.ndarray) -> float:
        seen = normalise(kind)
        return KNeighborsClassifier(20).fit(seen[:3000], labels[:3000]).score(seen[3000:], labels[3000:])

    assert accuracy(standardise(features)) < 0.8
    assert accuracy(whiten(features, np.arange(3000))) > 0.95


@pytest.mark.parametrize("features", [np.full((5, 3), 2.0), np.zeros((4, 2)), np.eye(3)[:1], np.arange(12.0).reshape(2, 6)])
def test_features_without_spread_or_of_few_images_stay_finite(features: np.ndarray) -> None:
    assert np.isfinite(whiten(features.astype(np.float32))).all()
