"""What a person looks at: neighbours of test images, confident mistakes, and the predictions for images without a label."""

import numpy as np
import pandas as pd

from modicum import neighbours as search
from modicum.data.images import UNKNOWN, Images
from modicum.evaluate.rows import Sets
from modicum.randomness import seed_of

MOST_QUERIES = 1000  # without test images the queries are training images, and nobody needs the neighbours of them all


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) of logits (N, C)."""
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def predictions(images: Images, rows: np.ndarray, scores: np.ndarray, class_names: tuple[str, ...]) -> pd.DataFrame:
    """path, class, confidence of the images in `rows`, from their logits (len(rows), C)."""
    probabilities = softmax(scores)
    best = probabilities.argmax(axis=1)
    return pd.DataFrame(
        {
            "path": images.manifest["path"].to_numpy()[rows],
            "class": np.asarray(class_names, dtype=object)[best],
            "confidence": probabilities[np.arange(len(best)), best].round(6),
        }
    )


def mistakes(scores: np.ndarray, sets: Sets, limit: int) -> list[tuple[int, int, float]]:
    """(row, predicted class, confidence) of the wrongly classified test images, most confident first; `scores` (tests, C)."""
    probabilities = softmax(scores)
    best = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(best)), best]
    wrong = np.flatnonzero(best != sets.labels[sets.test])
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]
    return [(int(sets.test[at]), int(best[at]), float(confidence[at])) for at in wrong]


def nearest(features: np.ndarray, sets: Sets, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` training images most like each query: query rows (Q,), neighbour rows (Q, n), cosine similarities (Q, n).

    Queries are the test images, or where there are none, at most MOST_QUERIES training images (never their own neighbours).
    """
    queries = sets.test
    if not len(queries):
        queries = np.sort(np.random.default_rng(seed_of(seed, "evaluate", "queries")).permutation(sets.train)[:MOST_QUERIES])
    own = 0 if len(sets.test) else 1
    count = min(count, len(sets.train) - own)
    if count < 1:
        return queries[:0], np.empty((0, 0), dtype=np.int64), np.empty((0, 0), dtype=np.float32)
    normalised = search.normalise(features)
    similarities, found = search.search(normalised[sets.train], normalised[queries], count + own)
    neighbours = sets.train[found]
    if own:  # drop the query itself, or the last if a duplicate pushed it out of the list
        keep = neighbours != queries[:, None]
        keep[keep.all(axis=1), -1] = False
        neighbours, similarities = neighbours[keep].reshape(-1, count), similarities[keep].reshape(-1, count)
    return queries, neighbours, similarities


def neighbour_table(images: Images, queries: np.ndarray, neighbours: np.ndarray, similarities: np.ndarray, features: str) -> pd.DataFrame:
    """neighbours.csv: one row a pair; labels are class names, empty where unknown; `features` says whose similarity it is."""
    ids, paths = images.manifest["id"].to_numpy(), images.manifest["path"].to_numpy()
    names = np.asarray([*images.class_names, ""], dtype=object)  # UNKNOWN = -1 picks the last
    pairs = np.repeat(queries, neighbours.shape[1]), neighbours.ravel()
    columns = {
        f"{side}_{field}": values[rows]
        for side, rows in zip(("query", "neighbour"), pairs, strict=True)
        for field, values in (("id", ids), ("path", paths), ("label", names[images.labels]))
    }
    ranks = np.tile(np.arange(1, neighbours.shape[1] + 1), len(queries))
    return pd.DataFrame({**columns, "rank": ranks, "similarity": similarities.ravel().round(5), "features": features})


def spread(queries: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of `count` queries to show: drawn at random, one a class in turn, so that no class crowds out another."""
    order = np.random.default_rng(seed_of(seed, "evaluate", "gallery")).permutation(len(queries))
    drawn = pd.Series(labels[queries][order])
    turn = drawn.groupby(drawn).cumcount().to_numpy()
    turn = np.where(drawn == UNKNOWN, len(order), turn)  # those without a label last: right and wrong cannot be marked
    chosen = order[np.argsort(turn, kind="stable")][:count]
    return chosen[np.argsort(labels[queries][chosen], kind="stable")]
