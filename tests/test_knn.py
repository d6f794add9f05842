"""Weighted kNN against a loop written from the formula, and against scikit-learn."""

import math
import threading

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from modicum import exact_search
from modicum.neighbours import normalise, scores, search, usable
from modicum.search_loops import best, reaching


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


def pair_by_pair(bank, queries, k):
    """Similarities of all pairs as the search computes those that it proposes, and the k best, of equal ones the lower row."""
    bank, queries = torch.from_numpy(bank), torch.from_numpy(queries)
    pairs = np.divmod(np.arange(len(bank) * len(queries)), len(queries))
    similarities, rows = exact_search._most_similar(bank, queries, *pairs, k)
    return similarities.numpy(), rows.numpy()


def shared_mean(random, size):
    """What a network without a projection gives: all features alike but for a little."""
    return 5 + 0.01 * random.normal(size=(size, 24))


def near_duplicates(random, size):
    """Closer to one another than bf16 can tell, and than fp32 nearly."""
    return random.normal(size=(10, 24))[random.integers(0, 10, size)] + 1e-6 * random.normal(size=(size, 24))


def copies(random, size):
    return random.normal(size=(7, 24))[random.integers(0, 7, size)]


def with_zeros(random, size):
    return np.where(random.random((size, 1)) < 0.5, 0, random.normal(size=(size, 24)))


def constant(random, size):
    return np.ones((size, 24))


def opposite(random, size):
    """Most of the bank lies together, and a few rows far from it, so that bounds are loose."""
    return np.where(random.random((size, 1)) < 0.02, -1, 1) * (1 + 0.05 * random.normal(size=(size, 24)))


@pytest.mark.parametrize("features", [shared_mean, near_duplicates, copies, with_zeros, constant, opposite])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (40, 40), (300, 7), (3000, 9)])
def test_a_search_finds_what_comparing_every_pair_finds_to_the_last_bit(features, rounded, size, k, monkeypatch):
    monkeypatch.setattr(exact_search, "LARGE", 1 if rounded else size + 1)
    monkeypatch.setattr(exact_search, "has_fast_bf16", lambda device: True)
    drawn = normalise(features(np.random.default_rng(0), size + 50))
    bank, queries = drawn[:size], drawn[size:]
    similarities, found = search(bank, queries, k)
    expected = pair_by_pair(bank, queries, k)
    np.testing.assert_array_equal(found, expected[1])
    np.testing.assert_array_equal(similarities, expected[0])
    truth = np.take_along_axis(queries.astype(np.float64) @ bank.T.astype(np.float64), found, axis=1)
    np.testing.assert_allclose(similarities, truth, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [shared_mean, near_duplicates, copies, with_zeros, constant, opposite])
def test_no_product_is_further_off_than_its_bound(features, kind):
    random = np.random.default_rng(1)
    rows, queries = (torch.from_numpy(normalise(features(random, size))) for size in (500, 60))
    bank = exact_search.RoundedBank(rows) if kind == torch.bfloat16 else exact_search.Bank(rows)
    products, bound = bank.products(queries)
    truth = rows.double() @ queries.double().T
    if kind == torch.bfloat16:
        truth -= bank.mean.double() @ queries.double().T
    off = (products.double() - truth).abs()
    assert products.dtype == kind
    assert (off <= bound + bank.unit * products.double().abs()).all()


def test_few_rows_are_computed_twice_where_features_share_a_mean(monkeypatch):
    proposed = []
    chosen = exact_search._most_similar
    monkeypatch.setattr(exact_search, "_most_similar", lambda *given: proposed.append(len(given[2])) or chosen(*given))
    monkeypatch.setattr(exact_search, "has_fast_bf16", lambda device: True)
    random = np.random.default_rng(0)
    bank, queries = (normalise(2 + random.normal(size=(size, 24))) for size in (20_000, 50))
    search(bank, queries, 20)
    assert 50 * 20 <= sum(proposed) < 50 * 20 * 3


def test_rows_that_are_no_numbers_leave_no_search_without_an_answer():
    bank = normalise(np.eye(6))
    bank[3] = np.nan
    _, found = search(bank, bank[:2], 3)
    assert found[:, 0].tolist() == [3, 3]
    assert found[:, 1].tolist() == [0, 1]


def test_how_features_lie_in_memory_changes_nothing():
    drawn = normalise(np.random.default_rng(0).normal(size=(300, 24)))
    bank, queries = drawn[:250], drawn[250:]
    for ours, others in zip(search(bank, queries, 5), search(np.asfortranarray(bank), np.asfortranarray(queries), 5), strict=True):
        np.testing.assert_array_equal(ours, others)


@pytest.mark.parametrize("kind", [np.float32, np.int16])
@pytest.mark.parametrize("places", [1, 2**14])
def test_cells_that_reach_their_border_are_listed_in_the_order_of_their_rows(kind, places, monkeypatch):
    monkeypatch.setattr("modicum.search_loops.FEW", places)
    random = np.random.default_rng(0)
    products, border = random.integers(-50, 50, (300, 7)).astype(kind), random.integers(-50, 60, 7).astype(kind)
    products[40:90] = -99
    if kind == np.float32:
        products[[3, 45], [2, 6]] = np.nan
    rows, queries = reaching(products, border)
    expected = [(row, query) for row in range(300) for query in range(7) if not products[row, query] < border[query]]
    assert list(zip(rows, queries, strict=True)) == expected
    assert rows.dtype == queries.dtype == np.int64


def test_the_best_pairs_are_the_most_similar_then_the_lowest_rows_and_what_is_no_number_before_all():
    pairs = [(9, 1, 0.5), (3, 0, -0.0), (4, 0, 0.0), (5, 0, -0.25), (6, 0, -np.nan), (2**32 - 1, 0, 0.0), (7, 1, 0.5), (8, 1, -0.75)]
    rows, queries, similarities = (np.array(column, kind) for column, kind in zip(zip(*pairs, strict=True), (int, int, "f4"), strict=True))
    values, found = best(similarities, rows, queries, 2, 3)
    assert found.tolist() == [[6, 3, 4], [7, 9, 8]]
    np.testing.assert_array_equal(values, np.array([[np.nan, 0, 0], [0.5, 0.5, -0.75]], dtype=np.float32))
    random = np.random.default_rng(0)
    queries, similarities = np.repeat(np.arange(5), 60), random.normal(size=300).astype(np.float32).round(1)
    values, found = best(similarities, np.tile(np.arange(60), 5), queries, 5, 60)
    order = np.argsort(-similarities.reshape(5, 60), axis=1, kind="stable")
    np.testing.assert_array_equal(found, order)
    np.testing.assert_array_equal(values, np.take_along_axis(similarities.reshape(5, 60), order, axis=1))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rounded", [False, True])
def test_threads_and_parts_change_nothing(rounded, two_threads, monkeypatch):
    monkeypatch.setattr(exact_search, "LARGE", 1 if rounded else 10_000)
    monkeypatch.setattr(exact_search, "has_fast_bf16", lambda device: True)
    drawn = normalise(np.random.default_rng(0).normal(size=(1300, 24)))
    bank, queries = drawn[:1000], drawn[1000:]
    whole = search(bank, queries, 7)
    monkeypatch.setattr(exact_search, "CELLS", 9000)  # four queries a part, or nine
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for ours, others in zip(search(bank, queries, 7), whole, strict=True):
            np.testing.assert_array_equal(ours, others)


@pytest.mark.parametrize(("threads", "workers"), [(1, 1), (2, 2), (5, 2)])
def test_a_search_takes_no_more_threads_than_it_may(threads, workers, two_threads, monkeypatch):
    seen = set()
    monkeypatch.setattr(exact_search, "CELLS", 12)  # a query a part
    chosen = exact_search._nearest
    monkeypatch.setattr(
        exact_search, "_nearest", lambda *given: seen.add((threading.get_ident(), torch.get_num_threads())) or chosen(*given)
    )
    torch.set_num_threads(threads)
    search(np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32), 2)
    assert 1 <= len(seen) <= workers
    assert {number for _, number in seen} == {threads // workers}
    assert torch.get_num_threads() == threads


def test_a_search_that_fails_says_why_and_gives_the_threads_back(two_threads, monkeypatch):
    def fails(bank, queries, k):
        raise MemoryError("no room")

    monkeypatch.setattr(exact_search, "_nearest", fails)
    with pytest.raises(MemoryError, match="no room"):
        search(np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32), 2)
    assert torch.get_num_threads() == 2


def test_no_queries_have_no_neighbours():
    similarities, found = search(np.eye(4, dtype=np.float32), np.empty((0, 4), dtype=np.float32), 3)
    assert similarities.shape == found.shape == (0, 3)


def test_an_approximate_search_finds_most_of_what_the_exact_one_does():
    random = np.random.default_rng(0)
    centres = random.normal(size=(20, 16))
    bank, asked = (normalise(centres[random.integers(0, 20, n)] + 0.3 * random.normal(size=(n, 16))) for n in (20_000, 100))
    _, exact = search(bank, asked, 20)
    similarities, found = search(bank, asked, 20, approximate=True)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert np.mean([len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]) / 20 > 0.9
