"""What an exact search asks of a table of products, as compiled loops: which cells deserve a second look, and which pairs are the best."""

import numpy as np

from modicum.compiled import Array, compiled

FEW = 2**14  # places for cells at first; they double where they do not suffice
LOW = 2**32 - 1  # the half of a key that says the row


def reaching(products: Array, border: Array) -> tuple[Array, Array]:
    """The cells of `products` (N, Q), float32 or int16, that are not below their query's `border` (Q,): rows, ascending, and queries,
    int64. NaN, of which no bound is known, is not below."""
    rows, queries = np.empty(FEW, np.int64), np.empty(FEW, np.int64)
    row, count = _list(products, border, rows, queries, 0, 0)
    while row < len(products):
        for places in (rows, queries):
            places.resize(2 * len(places) + len(border), refcheck=False)
        row, count = _list(products, border, rows, queries, row, count)
    return rows[:count], queries[:count]


@compiled
def _any_reaches(products: Array, border: Array) -> bool:
    count = 0  # a sum is vectorised, a search that ends early is not
    for query in range(len(border)):
        count += not products[query] < border[query]
    return count > 0


@compiled
def _list(products: Array, border: Array, rows: Array, queries: Array, row: int, count: int) -> tuple[int, int]:
    """Goes on at `row` until one might not find room. Returns where it stopped, and how many cells there are."""
    while row < len(products) and count + len(border) <= len(rows):
        if _any_reaches(products[row], border):
            for query in range(len(border)):
                if not products[row, query] < border[query]:
                    rows[count] = row
                    queries[count] = query
                    count += 1
        row += 1
    return row, count


def best(similarities: Array, rows: Array, queries: Array, num_queries: int, k: int) -> tuple[Array, Array]:
    """Of pairs (P,), `rows` below 2**32 and `k` or more for each query, the `k` with the largest float32 similarities; of equal ones the
    lower rows, and NaN before all. Returns similarities and rows int64 (Q, k)."""
    alike = np.where(np.isnan(similarities), np.float32(np.nan), similarities + np.float32(0))  # NaN and zero have two signs
    counts = np.bincount(queries, minlength=num_queries)
    keys = np.full((num_queries, counts.max()), np.iinfo(np.int64).min)
    _place(_in_order(alike.view(np.int32)), rows, queries, np.zeros_like(counts), keys)
    keys.sort(axis=1)
    chosen = keys[:, ::-1][:, :k]
    return _in_order((chosen >> 32).astype(np.int32)).view(np.float32), LOW - (chosen & LOW)


def _in_order(bits: Array) -> Array:
    """The bits of float32, as int32 that are ordered as the numbers are; and back."""
    return bits ^ ((bits >> 31) & np.int32(2**31 - 1))


@compiled
def _place(values: Array, rows: Array, queries: Array, counts: Array, keys: Array) -> None:
    """Each pair as a number in its query's row of `keys`, the larger the more similar it is, and then the lower its row."""
    for pair in range(len(values)):
        query = queries[pair]
        keys[query, counts[query]] = (np.int64(values[pair]) << 32) | (LOW - rows[pair])
        counts[query] += 1
