"""Exact nearest neighbours and the vote, beside everyone who offers them. `python -m benchmarks neighbours`

Claim: 10,000 queries in a bank of 60,000 features of 512 dimensions, k = 200, at equal answers: at least twice as fast as the fastest exact
peer (torch's matrix product and top-k, scikit-learn's brute force, faiss' flat index; for the vote lightly's `knn_predict`), and in less
memory than twice the bank, the bank included. How fast ours is depends on the data: real ones, Fashion-MNIST's pixels, are searched too.

Answers are equal where each row that is found is, by float64, at least as similar as the k-th of the truth, up to 1e-6: rows nearer to
one another than that are ties, of which any may be taken. The share of rows for which that holds is measured on 500 queries, and its bar
is all of them. Memory is the process's largest size during the search less its size before, plus the bank; Linux alone can tell.

Large banks are searched by an inverted index, whose recall is of the exact search's rows: 500,000 x 128, from which seconds and bytes are
extrapolated to ImageNet's 1,281,167 x 2048 with 50,000 queries. Building takes time as rows x cells x dimensions, the cells as the root of
the rows; a search, exact or not, as queries x rows x dimensions; memory is the bank and the index's copy of it.

Peers work in the parts that they are used with: torch 1,000 queries at a time, lightly 256 as in its own benchmarks.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from benchmarks.features import CLASSES, clustered
from benchmarks.pairs import Row, Work, compared, device_clock, installed, take_turns
from modicum.data.sources import load_images
from modicum.errors import InputError
from modicum.evaluate.raw_pixels import raw_pixels
from modicum.hardware import choose_hardware
from modicum.neighbours import inverted_index, normalise, scores, search
from modicum.record import warn
from modicum.settings import DataSettings, Experiment

K, TEMPERATURE = 200, 0.07
TIE = 1e-6
Found = tuple[np.ndarray, np.ndarray]  # similarities and rows, (Q, K) each
PROC = Path("/proc/self")


def run(quick: bool) -> Iterator[Row]:
    num_bank, num_queries, dimensions = (2_000, 300, 64) if quick else (60_000, 10_000, 512)
    features, labels = clustered(num_bank + num_queries, dimensions)
    yield from exact(features, labels, num_bank, f"{num_queries:,} queries in {num_bank:,} x {dimensions}", 1 if quick else 3)
    del features
    yield from approximate(*((4_000, 100, 16) if quick else (500_000, 1_000, 128)))
    if quick:
        return
    try:
        images = load_images(DataSettings(name="fashion_mnist", image_size=28, channels=1))
    except InputError as reason:
        warn(f"Fashion-MNIST's pixels are not searched: {reason}")
        return
    pixels, _ = raw_pixels(images.pixels)
    order = np.concatenate([images.rows("train"), images.rows("test")])
    yield from exact(pixels[order], images.labels[order], num_bank, "Fashion-MNIST's pixels, 10,000 in 60,000 x 784", 1)


def exact(features: np.ndarray, labels: np.ndarray, num_bank: int, setting: str, rounds: int) -> Iterator[Row]:
    features = normalise(features)
    bank, queries, bank_labels = features[:num_bank], features[num_bank:], labels[:num_bank]
    device = choose_hardware(Experiment()).device
    clock = device_clock(device)

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


def approximate(num_bank: int, num_queries: int, dimensions: int) -> Iterator[Row]:
    features = normalise(clustered(num_bank + num_queries, dimensions)[0])
    bank, queries = features[:num_bank], features[num_bank:]
    start = time.perf_counter()
    _, truth = search(bank, queries, K)
    middle = time.perf_counter()
    index = inverted_index(bank)
    built = time.perf_counter()
    _, found = index.search(queries, K)
    seconds = {"exact": (0.0, middle - start), "inverted index": (built - middle, time.perf_counter() - built)}
    setting = f"{num_queries:,} queries in {num_bank:,} x {dimensions}"
    recall = 100 * float(np.mean([len(np.intersect1d(*both)) for both in zip(truth, found, strict=True)])) / K
    yield figure(f"{setting}, inverted index, recall", recall, "% of the exact")
    rows, size, asked = 1_281_167, 2048, 50_000
    work = rows * size / (num_bank * dimensions)
    there = f"{asked:,} queries in {rows:,} x {size}, extrapolated"
    for name, (build, ask) in seconds.items():
        yield figure(f"{setting}, {name}", build + ask, "s")
        yield figure(f"{there}, {name}", build * work * (rows / num_bank) ** 0.5 + ask * work * asked / num_queries, "s")
    for name, copy in (("exact", 2 * size), ("inverted index", 4 * size + 8)):  # bf16, and fp32 with the row's number
        yield figure(f"{there}, {name}, memory", rows * (4 * size + copy) / 2**20, "MiB")


def figure(setting: str, value: float, unit: str) -> Row:
    return Row("neighbours", setting, "ours", value, value, unit)


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
