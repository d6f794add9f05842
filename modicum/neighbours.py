"""Weighted k-nearest-neighbour classification: cosine similarity, votes exp(similarity / T) (Wu et al., arXiv:1805.01978)."""

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import torch

from modicum.exact_search import nearest

CHUNK = 4096  # queries that vote at a time: bounds the memory of (queries x classes) tables


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows of (N, D) scaled to length 1, float32 and contiguous; a row of zeros stays zero."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def usable(ks: list[int], bank_size: int) -> tuple[list[int], list[int]]:
    """`ks` without repeats, ascending, and apart from them those that the bank is too small for."""
    ordered = sorted(set(ks))
    return [k for k in ordered if k <= bank_size], [k for k in ordered if k > bank_size]


@torch.inference_mode()
def search(bank: np.ndarray, queries: np.ndarray, k: int, approximate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar rows of `bank` (N, D) for each of `queries` (Q, D): similarities float32 (Q, k), rows int64 (Q, k).

    Both are expected normalised. Exact, most similar first, of equally similar rows the lower one first, unless `approximate`,
    which looks only into the cells of an inverted index that lie nearest. One search with the largest k serves every smaller one.
    """
    if approximate:
        return inverted_index(bank).search(queries, k)
    similarities, rows = nearest(torch.from_numpy(bank), torch.from_numpy(queries), k)
    return similarities.numpy(), rows.numpy()


def nearest_others(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` < N most similar by cosine to each row of `features` (N, D), without itself: similarities float32 and rows int64, (N, k)."""
    features = normalise(features)
    similarities, found = search(features, features, k + 1)
    itself = found == np.arange(len(features))[:, None]
    itself[~itself.any(axis=1), -1] = True  # among many copies of an image it may not find itself
    return similarities[~itself].reshape(-1, k), found[~itself].reshape(-1, k)


def inverted_index(bank: np.ndarray) -> Any:
    """As many cells as faiss's guide advises for the size, a sixteenth of which are looked into."""
    cells = max(1, min(len(bank), int(4 * len(bank) ** 0.5)))
    index: Any = faiss.index_factory(bank.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(bank[:: max(1, len(bank) // (64 * cells))])
    index.add(bank)
    index.nprobe = max(1, cells // 16)
    return index


def scores(
    similarities: np.ndarray, neighbour_labels: np.ndarray, ks: list[int], temperature: float, num_classes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """For each k of `ks`, ascending: (k, float64 (Q, C)), each class's sum of votes, -inf where no neighbour is of the class.

    Votes are taken relative to the nearest neighbour's, which moves no ranking and keeps exp within range at any temperature.
    `neighbour_labels` is int64 (Q, K >= max k).
    """
    votes = np.exp((similarities.astype(np.float64) - similarities[:, :1]) / temperature)
    total = np.zeros((len(votes), num_classes))
    done = 0
    for k in ks:
        for start in range(0, len(votes), CHUNK):
            part = slice(start, start + CHUNK)
            labels = neighbour_labels[part, done:k]
            cells = (np.arange(len(labels))[:, None] * num_classes + labels).ravel()
            total[part] += np.bincount(cells, votes[part, done:k].ravel(), len(labels) * num_classes).reshape(-1, num_classes)
        done = k
        yield k, np.where(total > 0, total, -np.inf)
