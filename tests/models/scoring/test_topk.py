"""The kernel equals a float64 brute force, whatever the blocks and partitions."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from recspark import schema, storage
from recspark.data.blocks import Array, Histories, QueryBlock, Ragged
from recspark.errors import ModelError
from recspark.models.scoring import candidates as topn
from recspark.models.scoring import memory, topk

Rows = dict[int, list[tuple[int, float]]]  # user -> (item_idx, score) by rank


@dataclass(frozen=True)
class Fixed:
    """A scorer that answers any block of users 0..n-1 from scores made beforehand."""

    scores: topk.DotScores | topk.SparseScores

    def score(self, block: QueryBlock) -> topk.Scores:
        s, rows = self.scores, block.user_idx
        if isinstance(s, topk.DotScores):
            return topk.DotScores(s.users[rows], s.items, s.bias, s.known[rows])
        length = np.diff(s.start)[rows]
        at = np.concatenate(
            [np.arange(s.start[r], s.start[r + 1]) for r in rows] or [np.zeros(0)]
        ).astype(int)
        start = np.concatenate([[0], np.cumsum(length)])
        return topk.SparseScores(
            start, s.items[at], s.weights[at], s.matrix, s.reach, s.evidence_only
        )


def block(users: Array, seen: list[list[int]]) -> QueryBlock:
    """A block of users without events; `seen` holds item_idx."""
    n = len(users)
    none = np.zeros(n + 1, np.int64)
    start = np.concatenate([[0], np.cumsum([len(s) for s in seen])]).astype(np.int64)
    empty = np.zeros(0, np.int32)
    return QueryBlock(
        user_idx=users.astype(np.int64),
        history=Histories(none, empty, np.zeros(0, np.int64), np.zeros(0, np.float32)),
        seen=Ragged(start, np.array([i for s in seen for i in s], np.int32)),
    )


def lists(batch: pa.RecordBatch) -> Rows:
    """The lists of a batch; asserts that ranks run from 1 without gaps."""
    found: Rows = {}
    for row in batch.to_pylist():
        mine = found.setdefault(row["user_idx"], [])
        mine.append((row["item_idx"], row["score"]))
        assert row["rank"] == len(mine)
    return found


def brute_force(exact: Array, items: Array, seen: list[list[int]], known: Array, k: int) -> Rows:
    """The k best by (-float32 score, item_idx); -inf is never recommended."""
    found: Rows = {}
    for user, row in enumerate(exact.astype(np.float32)):
        if known[user]:
            is_open = (row != -np.inf) & ~np.isin(items, seen[user])
            order = np.lexsort((items, -row))
            best = order[is_open[order]][:k]
            if len(best):
                found[user] = [(int(items[i]), float(row[i])) for i in best]
    return found


def all_exact(scores: topk.Scores, n_items: int) -> Array:
    n = len(scores.known)
    row, item = np.divmod(np.arange(n * n_items), n_items)
    return scores.exact(row, item).reshape(n, n_items)


# Multiples of 1/8 multiply and add exactly in any order: a difference is the kernel's.
EIGHTHS = st.integers(-8, 8).map(lambda i: i / 8)
# Few distinct values, and steps below float32's resolution beside 1: ties and near ties at the cut.
NEAR = st.sampled_from([0.0, 1.0, 1.0 + 2**-23, 1.0 - 2**-24, -1.0, 2.0**-24, 2.0**-30])


@st.composite
def cases(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[topk.DotScores, ...]:
    n, m, d = draw(st.integers(0, 6)), draw(st.integers(1, 40)), draw(st.integers(0, 4))

    def array(*shape: int) -> Array:
        size = int(np.prod(shape))
        flat = draw(st.lists(values, min_size=size, max_size=size))
        return np.array(flat, np.float32).reshape(shape)

    bias = array(m) if draw(st.booleans()) else None
    known = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    items = np.sort(
        np.array(draw(st.lists(st.integers(0, 99), min_size=m, max_size=m, unique=True)), np.int32)
    )
    seen = draw(st.lists(st.lists(st.integers(0, 99), max_size=60), min_size=n, max_size=n))
    k, rows, width = draw(st.integers(1, 50)), draw(st.integers(1, 7)), draw(st.integers(1, 40))
    return topk.DotScores(array(n, d), array(m, d), bias, known), items, seen, k, (rows, width)


def answer_in_blocks(case: tuple) -> pa.RecordBatch:
    """The answer from blocks of (rows, items)."""
    scores, items, seen, k, shape = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "block_shape", lambda *_: shape)
        patch.setattr(topn, "_GROUP", 3)
        return topk.answer(block(np.arange(len(seen)), seen), items, Fixed(scores), k)


@settings(max_examples=100, deadline=None)
@given(cases(EIGHTHS))
def test_dot_scores_equal_brute_force(case: tuple) -> None:
    scores, items, seen, k, _ = case
    exact = scores.users.astype(float) @ scores.items.astype(float).T
    if scores.bias is not None:
        exact += scores.bias
    expected = brute_force(exact, items, seen, scores.known, k)
    got = answer_in_blocks(case)
    assert got.schema.names == schema.RECOMMENDED.names
    assert lists(got) == expected


@settings(max_examples=100, deadline=None)
@given(cases(NEAR))
def test_near_ties_equal_float64_rounded_once(case: tuple) -> None:
    scores, items, seen, k, _ = case
    expected = brute_force(all_exact(scores, len(items)), items, seen, scores.known, k)
    assert lists(answer_in_blocks(case)) == expected


def random_case(rng: np.random.Generator, n: int, m: int, d: int) -> topk.DotScores:
    def vectors(rows: int) -> Array:
        scale = np.exp2(rng.integers(-8, 8, (rows, 1)))
        return (rng.standard_normal((rows, d)) * scale).astype(np.float32)

    bias = rng.standard_normal(m).astype(np.float32)
    return topk.DotScores(vectors(n), vectors(m), bias, np.ones(n, bool))


def random_sparse(
    rng: np.random.Generator, n: int, m: int, evidence_only: bool
) -> topk.SparseScores:
    length = rng.integers(0, 20, n)
    matrix = rng.standard_normal((m, m)).astype(np.float32)
    if evidence_only:
        matrix = np.where(rng.random((m, m)) < 0.03, np.abs(matrix), 0).astype(np.float32)
    items = np.concatenate([np.sort(rng.choice(m, s, replace=False)) for s in length])
    weights = np.exp2(rng.uniform(-12, 3, length.sum())).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(length)])
    return topk.SparseScores(
        start,
        items.astype(np.int32),
        weights,
        matrix,
        np.abs(matrix).max(axis=1).astype(float),
        evidence_only,
    )


@pytest.mark.parametrize("seed", range(2))
def test_float_scores_do_not_depend_on_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = 60, 700
    items = np.sort(rng.choice(5000, m, replace=False)).astype(np.int32)
    seen = [rng.choice(items, rng.integers(0, 50)).tolist() for _ in range(n)]
    # A cluster of items whose scores differ by less than float32 resolves, in every list.
    dot = random_case(rng, n, m, 33)
    dot.items[100:160] = dot.items[99] * (1 + rng.integers(-1, 2, (60, 33)) * 2.0**-23)
    for scores in (dot, random_sparse(rng, n, m, False), random_sparse(rng, n, m, True)):
        exact = all_exact(scores, m)
        if isinstance(scores, topk.SparseScores) and scores.evidence_only:
            exact[exact == 0] = -np.inf
        for k in (1, 10, 100):
            whole = topk.answer(block(np.arange(n), seen), items, Fixed(scores), k)
            expected = brute_force(exact, items, seen, scores.known, k)
            assert lists(whole) == expected
            single = [
                topk.answer(block(np.array([u]), [seen[u]]), items, Fixed(scores), k)
                for u in range(n)
            ]
            assert pa.Table.from_batches(single) == pa.Table.from_batches([whole])


@pytest.mark.parametrize("seed", range(5))
def test_order_below_what_a_gemm_resolves(seed: int) -> None:
    """All scores lie within the GEMM's error of each other, so its own order is noise."""
    rng = np.random.default_rng(seed)
    n, m, d = 20, 60, 48
    users = rng.standard_normal((n, d)).astype(np.float32)
    steps = (rng.random((m, d)) < 0.1) * 2.0**-23
    base = rng.standard_normal(d).astype(np.float32)
    scores = topk.DotScores(users, (base * (1 + steps)).astype(np.float32), None, np.ones(n, bool))
    items = np.arange(m, dtype=np.int32)
    exact = all_exact(scores, m)
    by_gemm = np.argsort(-scores.approximate(slice(0, n)), axis=1, kind="stable")
    assert (by_gemm != np.argsort(-exact.astype(np.float32), axis=1, kind="stable")).any()
    none: list[list[int]] = [[] for _ in range(n)]
    for k in (1, 5, 20):
        got = topk.answer(block(np.arange(n), none), items, Fixed(scores), k)
        assert lists(got) == brute_force(exact, items, none, scores.known, k)


@pytest.mark.parametrize("seed", range(5))
def test_error_bounds_hold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = 30, 200
    dot = random_case(rng, n, m, 77)
    # Integers below 2^53 would be exact; longdouble has 11 bits more than float64.
    true = dot.users.astype(np.longdouble) @ dot.items.astype(np.longdouble).T + dot.bias
    rows = slice(3, 20)
    for scores, truth in [(dot, true), (s := random_sparse(rng, n, m, False), dense(s))]:
        far = np.abs(scores.approximate(rows) - truth[rows]).max(axis=1)
        bound = scores.error(rows)
        assert (far <= bound).all()
        assert (bound > 0).any()
        # And tight enough to be of use: survivors are few.
        assert (bound <= 1e-4 * np.abs(truth[rows]).max(axis=1) + 1e-30).all()
        apart = np.abs(all_exact(scores, m) - truth).max(axis=1)
        assert (apart <= 2.0**-28 * scores.error(slice(0, n))).all()


def dense(scores: topk.SparseScores) -> Array:
    out = np.zeros((len(scores.start) - 1, len(scores.matrix)), np.longdouble)
    matrix = scores.matrix.astype(np.longdouble)
    for r in range(len(out)):
        for at in range(scores.start[r], scores.start[r + 1]):
            out[r] += np.longdouble(scores.weights[at]) * matrix[scores.items[at]]
    return out


def test_few_items_are_scored_twice() -> None:
    rng = np.random.default_rng(0)
    n, m, k = 50, 5000, 10
    scores = topk.DotScores(
        rng.standard_normal((n, 64)).astype(np.float32),
        rng.standard_normal((m, 64)).astype(np.float32),
        None,
        np.ones(n, bool),
    )
    rows = slice(0, n)
    for width in (m, 700):
        found = topn.Candidates(k, scores.error(rows), scores.exact)
        for begin in range(0, m, width):
            found.add(scores.part(slice(begin, begin + width)).approximate(rows), begin)
        assert np.bincount(found.row).min() >= k
        assert len(found.row) < (1.5 if width == m else 3) * k * n


@pytest.mark.parametrize("tied", [0.0, 1.0])
def test_what_is_held_does_not_follow_the_catalogue(tied: float) -> None:
    """All scores tie: the first k items are the answer, and few are held at any time."""
    n, m, d, k, width = 20, 4000, 8, 10, 200
    scores = topk.DotScores(
        np.full((n, d), tied, np.float32), np.ones((m, d), np.float32), None, np.ones(n, bool)
    )
    found = topn.Candidates(k, scores.error(slice(0, n)), scores.exact)
    most = 0
    for begin in range(0, m, width):
        found.add(scores.part(slice(begin, begin + width)).approximate(slice(0, n)), begin)
        most = max(most, len(found.row))
    assert most <= n * (4 * k + width)
    row, item, rank, score = found.best()
    assert row.tolist() == np.repeat(np.arange(n), k).tolist()
    assert item.tolist() == list(range(k)) * n
    assert (rank == item + 1).all()
    assert (score == d * tied).all()


def test_blocks_are_bounded_by_what_the_worker_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert topk.block_shape(1_000, 10, in_tiles=True)[1] == 1_000
    for granted in (None, "64", "512"):
        if granted is not None:
            monkeypatch.setenv("PYSPARK_EXECUTOR_MEMORY_MB", granted)
        room = memory.block_bytes()
        assert room <= memory.BLOCK_BYTES
        assert granted is None or room <= int(granted) << 15
        for n_items in (1, 5_000, 20_000_000):
            for k in (1, 100, 5_000):
                rows, width = topk.block_shape(n_items, k, in_tiles=True)
                assert rows >= 1
                assert 1 <= width <= n_items
                assert 4 * rows * width <= room


def test_heavy_users_cost_no_more_candidates() -> None:
    """A user who has seen all but three items gets those, in order."""
    m = 2000
    items = np.arange(m, dtype=np.int32)
    scores = topk.DotScores(
        np.ones((1, 1), np.float32), items[:, None].astype(np.float32), None, np.ones(1, bool)
    )
    left = {5, 900, 1500}
    got = topk.answer(
        block(np.zeros(1), [[i for i in range(m) if i not in left]]), items, Fixed(scores), 100
    )
    assert lists(got) == {0: [(1500, 1500.0), (900, 900.0), (5, 5.0)]}


def test_zeros_of_both_signs_tie() -> None:
    tiny = np.array([[-1e-30], [1e-30], [-1e-30], [1e-30]], np.float32)
    scores = topk.DotScores(tiny[1:2], tiny, None, np.ones(1, bool))
    rounded = all_exact(scores, 4).astype(np.float32)
    assert np.signbit(rounded).tolist() == [[True, False, True, False]]
    got = topk.answer(block(np.zeros(1), [[]]), np.arange(4, dtype=np.int32), Fixed(scores), 3)
    assert lists(got) == {0: [(0, 0.0), (1, 0.0), (2, 0.0)]}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 6, 96])
def test_scores_that_are_not_finite_are_refused(bad: float, at: int) -> None:
    bias = np.zeros(97, np.float32)
    bias[at] = bad
    scores = topk.DotScores(
        np.zeros((2, 0), np.float32), np.zeros((97, 0), np.float32), bias, np.ones(2, bool)
    )
    with pytest.raises(ModelError, match="NaN or infinite"):
        topk.answer(block(np.arange(2), [[], []]), np.arange(97, dtype=np.int32), Fixed(scores), 2)


def test_mapped_arrays_travel_by_name(tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    file = str(tmp_path / "a.npy")
    storage.write_array(file, array)
    mapped = storage.read_array(file, mmap=True)

    by_name = pickle.dumps(topk.Shared(mapped))
    assert len(by_name) < 1000
    assert np.array_equal(pickle.loads(by_name).array, array)
    for part in (mapped[3:], mapped[:, 1:], array):  # a part of a file must not become all of it
        again = pickle.loads(pickle.dumps(topk.Shared(part))).array
        assert np.array_equal(again, part)

    storage.write_array(file, array[:50])
    with pytest.raises(ModelError, match="changed while it was in use"):
        pickle.loads(by_name)


@pytest.mark.spark
def test_spark_answers_are_those_of_one_block(spark: SparkSession) -> None:
    rng = np.random.default_rng(7)
    n, m, k = 300, 120, 9
    items = np.sort(rng.choice(1000, m, replace=False)).astype(np.int32)
    scores = random_case(rng, n, m, 5)
    seen = [
        np.sort(rng.choice(items, rng.integers(0, m), replace=False)).tolist() for _ in range(n)
    ]
    rows = [(u, [], seen[u]) for u in range(n)]
    queries = spark.createDataFrame(rows, schema.QUERIES)
    expected = topk.answer(block(np.arange(n), seen), items, Fixed(scores), k)
    for parts in (1, 7):
        got = topk.recommend(queries.repartition(parts), items, Fixed(scores), k)
        assert got.schema == schema.RECOMMENDED
        table = got.toArrow().sort_by([("user_idx", "ascending"), ("rank", "ascending")])
        assert table.to_pylist() == expected.to_pylist()
