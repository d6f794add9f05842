"""Exact search by cosine similarity: a cheap matrix product proposes rows, a proven bound on its error says which to compute properly.

The product is one in fp32, of the rows as they are, so that nothing is copied. Where the processor multiplies bf16 fast, it is of features
less their mean m, since only differences order neighbours, and those of a network are much smaller than what all features share:
q.x = (q - m).(x - m) + m.(x - m) + q.m, of which the last is the same for all rows; and q - m and x - m are rounded to bf16. By
Cauchy-Schwarz that moves no product by more than |q - m| times the longest remainder of a row, plus the query's remainder times the
longest rounded row; remainders are measured, not estimated.

At least k rows are as similar as the k-th largest product less the bound, and no row whose product is smaller by more than twice the bound
is one of the k nearest. Similarities of the others are computed in fp32, each pair by itself, so that neither the way it was proposed nor
its place among the rows moves a bit of it.
"""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from modicum.hardware import has_fast_bf16
from modicum.search_loops import best, reaching

CELLS = 2**24  # products held at a time
# Parts of the queries searched at a time where threads suffice: each has steps that one thread does alone, or that wait for memory.
TOGETHER = 2
TILE = 32  # bf16 numbers of a row that a processor multiplies at once: products of rows that fill such tiles are up to a third faster
PART = 256  # rows rounded at a time: more leave memory behind that is freed and not given back
PIVOTS = 256  # rows by which queries are ordered
LARGE = 16_384  # rows from which rounding the bank to bf16 pays
GROUPED = 32  # rows of which only the largest product is looked at for the bound; fewer than all 32 are seldom near
UNIT = 2.0**-24  # largest relative error of rounding to fp32
SAFETY = 1.01  # for the rounding of the bounds themselves


class Bank:
    """Rows float32 (N, D) to be searched, as they are."""

    kind = torch.float32  # of the products

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.longest = rows, float(_length(rows).max())
        self.unit = torch.finfo(self.kind).eps / 2

    def products(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For `queries` float32 (Q, D): products (N, Q), which are the similarities but for a constant a query, and bounds (Q,) on how
        far, before it is rounded to the table's precision, any may be off.

        A row of the table for each of the bank, not for each query: the product is then up to a fifth faster.
        """
        if torch.get_num_threads() > 1:
            products = self.rows @ queries.T
        else:  # numpy's is a fifth faster on processors of AMD, but with several threads it serves one part at a time
            products = torch.from_numpy(np.matmul(self.rows.numpy(), queries.numpy().T))
        return products, _slack(queries, _length(queries) * self.longest)


class RoundedBank(Bank):
    """The same with a copy of the rows, less their mean, that is rounded to bf16 and of half their size."""

    kind = torch.bfloat16

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self.mean = rows.mean(dim=0)
        self.size = rows.shape[1]
        self.cheap = torch.zeros(len(rows), (self.size + 1) // TILE * TILE + TILE, dtype=self.kind)
        longest = torch.zeros(4)
        for at in range(0, len(rows), PART):
            centred = rows[at : at + PART] - self.mean
            offset = (centred @ self.mean)[:, None]
            cheap = self.cheap[at : at + PART]
            cheap[:, : self.size + 1] = torch.cat([centred, offset], dim=1)
            # the offset is as large as the product, so that what rounding leaves of it has a column of its own
            cheap[:, self.size + 1] = (offset - cheap[:, self.size, None])[:, 0]
            rounded = cheap[:, : self.size]
            longest = longest.maximum(torch.stack([_length(x).max() for x in (centred, rounded.float(), centred - rounded, offset)]))
        self.longest_centred, self.longest_cheap, self.longest_lost, self.largest_offset = longest.tolist()

    def products(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        centred = queries - self.mean
        cheap = torch.zeros(len(queries), self.cheap.shape[1], dtype=self.kind)
        cheap[:, : self.size] = centred
        cheap[:, self.size : self.size + 2] = 1
        length, lost = _length(centred), _length(centred - cheap[:, : self.size])
        rounding = length * self.longest_lost + lost * self.longest_cheap + self.unit**2 * self.largest_offset
        sums = _length(queries) * self.longest + 2 * length * self.longest_centred + self.largest_offset
        sums += float(self.mean.norm()) * self.longest_centred
        return self.cheap @ cheap.T, SAFETY * rounding + _slack(queries, sums)


def _slack(queries: Tensor, sums: Tensor) -> Tensor:
    """How far products may be off (Q,): n sums of n + 1 terms each by n units of the terms' sizes, in whatever order they are added."""
    return SAFETY * (queries.shape[1] + 8) * UNIT * sums


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` most similar rows of `bank` float32 (N, D) for each of `queries` (Q, D): similarities float32 and rows int64, (Q, k).

    Most similar first, of equally similar rows the lower one first; fewer where the bank has fewer. Similarities do not depend on the
    processor's bf16: it moves only how many rows are computed twice.
    """
    k, bank = min(k, len(bank)), bank.contiguous()
    if not len(queries):
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    searched = RoundedBank(bank) if len(bank) >= LARGE and has_fast_bf16(bank.device) else Bank(bank)
    pivots = bank[:: max(1, len(bank) // PIVOTS)]
    order = (queries @ pivots.T).argmax(dim=1).argsort()  # queries of the same surroundings in one part, which then reads fewer rows
    threads = torch.get_num_threads()
    together = min(TOGETHER, threads)
    size = max(1, CELLS // len(bank) // together)
    parts = order.split(size // 32 * 32 or size)
    similarities, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)

    @torch.inference_mode()  # of each thread
    def answer(part: Tensor) -> None:
        similarities[part], rows[part] = _nearest(searched, queries[part], k)

    each = threads // together
    torch.set_num_threads(each)  # here too: a thread that has worked for this one waits for more, and holds a core
    try:
        with (
            threadpool_limits(each, user_api="blas"),  # numpy's
            ThreadPoolExecutor(together, initializer=_compute_with, initargs=(each,)) as pool,
        ):
            for _ in pool.map(answer, parts):  # an error or an interruption ends it with the parts that are at work
                pass
    finally:
        torch.set_num_threads(threads)
    return similarities, rows


def _compute_with(threads: int) -> None:
    """What the calling thread may use, in torch's operations and in faiss'."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def _nearest(bank: Bank, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _most_similar(bank.rows, queries, *_proposed(bank, queries, k), k)


def _proposed(bank: Bank, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, ascending, and for each the query that it may be one of the `k` nearest of."""
    products, bound = bank.products(queries)
    kth = _at_most_kth(products, k)
    certain = kth - bank.unit * kth.abs() - 2 * bound  # what k rows reach for certain, as a product that may be off
    least = (certain - 3 * bank.unit * certain.abs()).to(bank.kind)  # once for products, twice for itself
    if bank.kind == torch.bfloat16:  # which numpy does not know
        positive = bool((least > 0).all())  # bits of positive numbers are in their order, and quick to compare
        products, least = (x.view(torch.int16) if positive else x.float() for x in (products, least))
    return reaching(products.numpy(), least.numpy())


def _at_most_kth(products: Tensor, k: int) -> Tensor:
    """(Q,): a value that at least `k` products (N, Q) of each query reach; the k-th largest, or little less."""
    table = products.view(torch.int16) if products.dtype == torch.bfloat16 else products
    groups = len(table) // GROUPED
    if groups >= 4 * k:  # of bf16 the bits are compared, three times as fast: of negative numbers one, not the largest, is taken
        table = table[: groups * GROUPED].unflatten(0, (GROUPED, groups)).amax(dim=0)
    position = len(table) - k
    reached = table.view(products.dtype).T.contiguous().float().numpy()
    return torch.from_numpy(np.partition(reached, position, axis=1)[:, position])


def _most_similar(bank: Tensor, queries: Tensor, rows: np.ndarray, proposed_to: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """The best `k` of the pairs proposed, ascending: of `rows` the first to the query `proposed_to[0]`, and so on; at least `k` each."""
    similar = np.empty(len(rows), dtype=np.float32)
    faiss.pairwise_indexed_inner_product(  # type: ignore[attr-defined]  # of ascending rows, so that each is read once
        bank.shape[1], len(rows), *(faiss.swig_ptr(x) for x in (bank.numpy(), rows, queries.numpy(), proposed_to, similar))
    )
    values, found = best(similar, rows, proposed_to, len(queries), k)
    return torch.from_numpy(values), torch.from_numpy(found)


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)
