"""Exact nearest neighbours and the vote, beside everyone who offers them. `python -m benchmarks neighbours`

Claim: 10,000 queries in a bank of 60,000 features of 512 dimensions, k = 200, at equal answers: at least twice as fast as the fastest exact
peer (torch's matrix product and top-k, scikit-learn's brute force, faiss' flat index; for the vote lightly's `knn_predict`), and in less
memory than twice the bank, the bank included.

Answers are equal where each row that is found is, by float64, at least as similar as the k-th of the truth, up to 1e-6: rows nearer to
one another than that are ties, of which any may be taken. The share of rows for which that holds is measured on 500 queries, and its bar
is all of them. Memory is the process's largest size during the search less its size before, plus the bank; Linux alone can tell.

Peers work in the parts that they are used with: torch 1,000 queries at a time, lightly 256 as in its own benchmarks.
"""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from benchmarks.features import CLASSES, clustered
from benchmarks.pairs import Row, Work, compared, device_clock, installed, take_turns
from modicum.hardware import choose_hardware
from modicum.neighbours import normalise, scores, search
from modicum.settings import Experiment

K, TEMPERATURE = 200, 0.07
TIE = 1e-6
Found = tuple[np.ndarray, np.ndarray]  # similarities and rows, (Q, K) each
PROC = Path("/proc/self")


def run(quick: bool) -> Iterator[Row]:
    num_bank, num_queries, dimensions = (2_000, 300, 64) if quick else (60_000, 10_000, 512)
    features, labels = clustered(num_bank + num_queries, dimensions)
    features = normalise(features)
    bank, queries, bank_labels = features[:num_bank], features[num_bank:], labels[:num_bank]
    device = choose_hardware(Experiment()).device
    clock, rounds = device_clock(device), 1 if quick else 3
    setting = f"{num_queries:,} queries in {num_bank:,} x {dimensions}"

    searches: dict[str, Callable[[], Found]] = {
        "ours": lambda: search(bank, queries, K),
        "torch, product and top-k": lambda: by_torch(bank, queries, device),
        "scikit-learn, brute force": lambda: by_sklearn(bank, queries),
        "faiss, flat": lambda: by_faiss(bank, queries),
    }
    bars = dict.fromkeys(searches.keys() - {"ours"}, 2.0)
    yield from compared("neighbours", setting, take_turns(searches, rounds, clock, warm_up=False), bars=bars)
    if installed("lightly"):
        from lightly.utils.benchmarking import knn_predict

        votes: dict[str, Work] = {
            "ours": lambda: our_classes(bank, queries, bank_labels),
            "lightly, knn_predict": lambda: peer_classes(knn_predict, bank, queries, bank_labels, device),
        }
        seconds = take_turns(votes, rounds, clock, warm_up=False)
        yield from compared("neighbours", f"{setting}, with the vote", seconds, bars={"lightly, knn_predict": 2.0})

    truth = np.sort(queries[:500].astype(np.float64) @ bank.T.astype(np.float64), axis=1)[:, -K]
    for name, find in searches.items():
        right = 100 * exact_share(bank, queries, find()[1], truth)
        yield Row(
            "neighbours", f"{setting}, answers", name, right, right, "% exact", right / 100 if name == "ours" else None, bars_of(name)
        )
    if (PROC / "clear_refs").exists():
        for name, find in searches.items():
            size = bank.nbytes + peak_memory(find)
            within = 2 * bank.nbytes / size if name == "ours" else None  # how often it fits into twice the bank
            yield Row("neighbours", f"{setting}, memory", name, size / 2**20, size / 2**20, "MiB", within, bars_of(name))


def bars_of(name: str) -> float | None:
    return 1.0 if name == "ours" else None


def by_torch(bank: np.ndarray, queries: np.ndarray, device: torch.device) -> Found:
    there = torch.from_numpy(bank).to(device)
    parts = [(part.to(device) @ there.T).topk(K) for part in torch.from_numpy(queries).split(1000)]
    similarities, rows = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return similarities, rows


def by_sklearn(bank: np.ndarray, queries: np.ndarray) -> Found:
    """By distance, which orders rows of unit length as their cosine does."""
    distances, rows = NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=-1).fit(bank).kneighbors(queries)
    return 1 - distances**2 / 2, rows


def by_faiss(bank: np.ndarray, queries: np.ndarray) -> Found:
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    similarities, rows = index.search(queries, K)
    return similarities, rows


def our_classes(bank: np.ndarray, queries: np.ndarray, labels: np.ndarray) -> np.ndarray:
    similarities, rows = search(bank, queries, K)
    ((_, votes),) = scores(similarities, labels[rows], [K], TEMPERATURE, CLASSES)
    return votes.argmax(axis=1)


def peer_classes(
    predict: Callable[..., torch.Tensor], bank: np.ndarray, queries: np.ndarray, labels: np.ndarray, device: torch.device
) -> np.ndarray:
    there, truth = torch.from_numpy(bank).to(device).T, torch.from_numpy(labels).to(device)
    parts = torch.from_numpy(queries).split(256)
    ordered = [predict(part.to(device), there, truth, CLASSES, K, TEMPERATURE) for part in parts]
    return torch.cat(ordered)[:, 0].cpu().numpy()


def exact_share(bank: np.ndarray, queries: np.ndarray, rows: np.ndarray, least: np.ndarray) -> float:
    """Share of the found rows (Q, K), of the first len(least) queries, that are among the truth: at least as similar as its k-th.

    A row found twice counts once.
    """
    right = 0
    for query, found, border in zip(queries, rows, least, strict=False):
        unique = np.unique(found)
        right += int((bank[unique].astype(np.float64) @ query.astype(np.float64) >= border - TIE).sum())
    return right / (len(least) * K)


def peak_memory(work: Work) -> int:
    """Bytes by which the process grows at most while `work` runs."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what glibc has kept of earlier searches would serve this one unseen
    (PROC / "clear_refs").write_text("5")  # the largest size so far becomes the present one
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    (line,) = (line for line in (PROC / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
