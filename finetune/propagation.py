"""Labels spread over the neighbour graph of features: Zhou 2004 and Poisson learning (Calder 2020, arXiv:2006.11184).

Sparse, by conjugate gradients: a hundred products or so with a matrix of 2 k N entries. The search for neighbours is what takes time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from modicum.neighbours import nearest_others
from modicum.whitening import whiten

Kind = Literal["zhou", "poisson"]
Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # like `nearest_others`
SHARPNESS = 2  # power of Zhou's shares that makes them as sure as they are right: docs/results.md
ROUNDS = 100  # of scaling classes and images in turn: half a second for 60,000 images, and the classes' shares are right to 0.002 points
MOST_PRODUCTS = 2000
TOLERANCE = 1e-6  # of the residual, relative to the right-hand side
# Poisson's equation has the factor 1, for which a part of the graph without labels has no solution; there this one gives zeros.
NEARLY_ONE = 1 - 1e-5


@dataclass(frozen=True)
class Propagation:
    """How labels are spread; the defaults are those of the method `propagate` and of every warm start."""

    kind: Kind = "zhou"
    neighbours: int = 10
    alpha: float = 0.99
    prior: tuple[float, ...] | None = None  # share of the images that each class is meant to have; of zhou

    def __call__(self, features: np.ndarray, labels: np.ndarray, num_classes: int, find: Find = nearest_others) -> np.ndarray:
        """Targets float64 (N, C) for a head, rows summing to 1, from `features` (N, D) and `labels` int64 (N,), -1 for none.

        Zhou's scores are shares of influence and stay soft, sharpened and, with a `prior`, aligned to it; Poisson's are no
        probabilities, so that only the class counts. Images that no label reaches have all classes alike. `find` may know the
        neighbours from before.
        """
        graph = neighbour_graph(*find(whiten(features), min(self.neighbours, len(features) - 1)))
        scores = spread(graph, labels, num_classes, self.kind, self.alpha)
        if self.kind == "poisson":
            reached = np.ptp(scores, axis=1, keepdims=True) > 0  # a part of the graph without labels has zeros
            return np.where(reached, np.eye(num_classes)[scores.argmax(axis=1)], 1 / num_classes)
        return aligned(scores**SHARPNESS, self.prior)


def aligned(scores: np.ndarray, prior: tuple[float, ...] | None) -> np.ndarray:
    """Rows of `scores` (N, C), positive, scaled to sum to 1, and classes scaled so that their means are `prior`, which sums to 1.

    Class mass normalisation (Zhu 2003, "Semi-supervised learning using Gaussian fields", ICML, section 4), repeated until both hold.
    """
    scores = scores / scores.sum(axis=1, keepdims=True)
    for _ in range(ROUNDS if prior else 0):
        scores *= prior / scores.mean(axis=0)
        scores /= scores.sum(axis=1, keepdims=True)
    return scores


def neighbour_graph(similarities: np.ndarray, found: np.ndarray) -> sparse.csr_array:
    """Symmetric weights (N, N) between each of N images and its k nearest: cosines and rows (N, k), most similar first.

    exp(-4 d^2 / d_k^2) with d_k the distance to the image's own k-th neighbour (arXiv:2006.11184, section 3), then the mean of both
    directions.
    """
    size, k = found.shape
    squares = np.maximum(2 - 2 * similarities.astype(np.float64), 0)
    weights = np.exp(-4 * squares / np.maximum(squares[:, -1:], 1e-12))
    graph = sparse.csr_array((weights.ravel(), (np.repeat(np.arange(size), k), found.ravel())), shape=(size, size))
    return sparse.csr_array((graph + graph.T) / 2)


def spread(graph: sparse.csr_array, labels: np.ndarray, num_classes: int, kind: Kind, alpha: float = 0.99) -> np.ndarray:
    """Scores float64 (N, C) of all nodes from `labels` int64 (N,), -1 where there is none; the class of a node is its largest.

    `zhou`: (1 - alpha) (I - alpha S)^-1 Y with S = D^-1/2 W D^-1/2, rows scaled to sum to 1 ("Learning with local and global
    consistency", NIPS 2004, equation 4).
    `poisson`: L u = Y - mean of Y, on the labelled nodes (arXiv:2006.11184, equation 2.1); the degree-weighted mean of u is 0.
    """
    labelled = labels >= 0
    sources = np.zeros((len(labels), num_classes))
    sources[labelled, labels[labelled]] = 1
    if kind == "zhou":
        scores = np.maximum((1 - alpha) * _solve(graph, sources, alpha), 1e-12)
        return scores / scores.sum(axis=1, keepdims=True)
    sources[labelled] -= sources[labelled].mean(axis=0)
    root = np.sqrt(graph.sum(axis=1))[:, None]
    return _solve(graph, sources / root, NEARLY_ONE) / root


def _solve(graph: sparse.csr_array, right: np.ndarray, alpha: float) -> np.ndarray:
    """X (N, C) of (I - alpha D^-1/2 W D^-1/2) X = `right` (N, C), all columns side by side."""
    root = sparse.diags_array(1 / np.sqrt(graph.sum(axis=1)))
    smooth = sparse.csr_array(alpha * (root @ graph @ root))
    solution, residual, direction = np.zeros_like(right), right.copy(), right.copy()
    square = (residual**2).sum(axis=0)
    enough = TOLERANCE**2 * square
    for _ in range(MOST_PRODUCTS):
        product = direction - smooth @ direction
        step = square / np.maximum((direction * product).sum(axis=0), 1e-300)
        solution += step * direction
        residual -= step * product
        before, square = square, (residual**2).sum(axis=0)
        if (square <= enough).all():
            break
        direction = residual + square / np.maximum(before, 1e-300) * direction
    return solution
