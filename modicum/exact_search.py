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

import warnings

import numpy as np
import torch
from torch import Tensor

from modicum.hardware import has_fast_bf16

CELLS = 2**23  # products held at a time
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
        return self.rows @ queries.T, _slack(queries, _length(queries) * self.longest)


class RoundedBank(Bank):
    """The same with a copy of the rows, less their mean, that is rounded to bf16 and of half their size."""

    kind = torch.bfloat16

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self.mean = rows.mean(dim=0)
        self.cheap = torch.empty(len(rows), rows.shape[1] + 2, dtype=self.kind)
        longest = torch.zeros(4)
        for at in range(0, len(rows), PART):
            centred = rows[at : at + PART] - self.mean
            offset = (centred @ self.mean)[:, None]
            cheap = torch.cat([centred, offset], dim=1).to(self.kind)
            # the offset is as large as the product, so that what rounding leaves of it has a column of its own
            self.cheap[at : at + PART] = torch.cat([cheap, (offset - cheap[:, -1:]).to(self.kind)], dim=1)
            lost = centred - cheap[:, :-1]
            longest = longest.maximum(torch.stack([_length(x).max() for x in (centred, cheap[:, :-1].float(), lost, offset)]))
        self.longest_centred, self.longest_cheap, self.longest_lost, self.largest_offset = longest.tolist()

    def products(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        centred = queries - self.mean
        cheap = torch.cat([centred, torch.ones(len(queries), 2)], dim=1).to(self.kind)
        length, lost = _length(centred), _length(centred - cheap[:, :-2])
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
    k = min(k, len(bank))
    if not len(queries):
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    searched = RoundedBank(bank) if len(bank) >= LARGE and has_fast_bf16(bank.device) else Bank(bank)
    pivots = bank[:: max(1, len(bank) // PIVOTS)]
    order = (queries @ pivots.T).argmax(dim=1).argsort()  # queries of the same surroundings after one another: the cache holds their rows
    size = max(1, CELLS // len(bank))
    similarities, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    for at in order.split(size // 64 * 64 or size):
        similarities[at], rows[at] = _nearest(searched, queries[at], k)
    return similarities, rows


def _nearest(bank: Bank, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    products, bound = bank.products(queries)
    kth = _at_most_kth(products, k)
    certain = kth - bank.unit * kth.abs() - 2 * bound  # what k rows reach for certain, as a product that may be off
    least = (certain - 3 * bank.unit * certain.abs()).to(bank.kind)  # once for products, twice for itself
    rows, proposed_to = np.divmod(np.flatnonzero(_not_below(products, least)), len(queries))
    of_query = np.argsort(proposed_to.astype(np.min_scalar_type(len(queries))), kind="stable")  # small numbers are sorted without comparing
    counts = torch.from_numpy(np.bincount(proposed_to, minlength=len(queries)))
    return _most_similar(bank.rows, queries, counts, torch.from_numpy(rows[of_query]), k)


def _not_below(products: Tensor, least: Tensor) -> np.ndarray:
    """bool (N, Q). NaN, of which no bound is known, is not below."""
    if products.dtype == torch.bfloat16 and bool((least > 0).all()):  # bits of positive numbers are in their order, and quick to compare
        return products.view(torch.int16).numpy() >= least.view(torch.int16).numpy()
    return ~(products < least).numpy()


def _at_most_kth(products: Tensor, k: int) -> Tensor:
    """(Q,): a value that at least `k` products (N, Q) of each query reach; the k-th largest, or little less."""
    groups = len(products) // GROUPED
    if groups >= 4 * k:
        products = products[: groups * GROUPED].unflatten(0, (GROUPED, groups)).amax(dim=0)
    position = len(products) - k
    return torch.from_numpy(np.partition(products.T.contiguous().float().numpy(), position, axis=1)[:, position])


def _most_similar(bank: Tensor, queries: Tensor, counts: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best `k` of the rows proposed: of `rows` the first `counts[0]`, ascending, to the first query, and so on, at least `k` each."""
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(enable=False):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        proposed = torch.sparse_csr_tensor(ends, rows, torch.zeros(len(rows)), (len(queries), len(bank)))
        similar = torch.sparse.sampled_addmm(proposed, queries, bank.T, beta=0).values()
    table = torch.full((len(counts), int(counts.max())), -torch.inf)
    query = torch.repeat_interleave(counts)
    place = torch.arange(len(rows)) - ends[query]
    table[query, place] = similar
    values, order = table.sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows[ends[:-1, None] + order[:, :k]]


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)
