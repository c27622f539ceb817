"""The exact top-N kernel: it turns the scores of every retriever into lists of the k best items.

Scores are first computed approximately, by a matrix product (GEMM) in float32, block by block. The
items that may be among the k best are scored again in float64 in a fixed order, rounded to float32,
and sorted by (-score, item_idx). The result is that of a float64 brute force over all items, ties
included, whatever the size of the blocks: see `engines.topn`. A large item matrix is taken tile by
tile, so memory does not grow with the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from scipy import sparse

from recspark import schema
from recspark.data.blocks import (
    Array,
    Histories,
    QueryBlock,
    Ragged,
    local_index,
    parse_queries,
)
from recspark.data.shared import Shared as Shared  # noqa: PLC0414  (models name it `topk.Shared`)
from recspark.models.scoring import memory
from recspark.models.scoring.candidates import Candidates, dot_pairs
from recspark.models.scoring.listed import ListedScores, SlicedScores

# Up to ONE_TILE items are scored in one tile. More items are scored in blocks of at most TILE_ROWS
# rows by TILE_ITEMS items (16 k items, if that is more). Measured with 1 million items of 64
# dimensions, on one core of an EPYC with 16 MB of L3 per core: 1.4 ms per user, against 1.75 ms
# with blocks of 256 x 32,768, 4.4 ms with rows of all items, and 1.6 ms for `implicit`.
ONE_TILE, TILE_ITEMS, TILE_ROWS = 32768, 8192, 1024

_FEATURES = pa.struct([("numbers", pa.list_(pa.float32())), ("fields", pa.list_(pa.int32()))])
_UNIT = 2.0**-24  # unit roundoff of float32
_TINY = float(np.finfo(np.float32).tiny)


class Scores(Protocol):
    """Scores of all items of the vocabulary for one block of n queries (rows).

    A score of -inf means that the item is never recommended to that row. NaN and +inf raise
    ModelError.
    """

    @property
    def known(self) -> Array:
        """Whether the model knows the user of each row, bool (n,); unknown users get no list."""

    def approximate(self, rows: slice) -> Array:
        """Return scores by GEMM, float32 (rows, n_items), in a new array.

        Each score is within `error` of the exact one.
        """

    def exact(self, rows: Array, items: Array) -> Array:
        """Return the score of local item `items[j]` for row `rows[j]`, float64 (p,).

        Sums are computed in a fixed order. The score is -inf if the item is never recommended to
        the row.
        """

    def error(self, rows: slice) -> Array:
        """Return an upper bound of |approximate - exact| for each row, float64 (rows,)."""


class Scorer(Protocol):
    """Turns queries into scores.

    It is sent to the executors, so it can be pickled: it holds arrays and no Spark objects.
    """

    def score(self, block: QueryBlock) -> Scores:
        """Return the scores of `block`. The scores of a row depend on no other row."""


class ListScorer(Protocol):
    """A `Scorer` of a model that scores only a few items for each row."""

    def score(self, block: QueryBlock) -> ListedScores | SlicedScores:
        """Return the scores of `block`. The scores of a row depend on no other row."""


@dataclass(frozen=True)
class DotScores:
    """The scores `users @ items.T + bias`.

    `users` float32 (n, d), `items` float32 (m, d), `bias` float32 (m,) or None, `known` bool (n,);
    d may be 0.

    The bound of the error: in float32, a sum of d products and a bias is off by at most
    gamma(d + 1) * (sum |u_i v_i| + |b|), in whatever order it is computed and with or without fused
    multiply-add. Also sum |u_i v_i| <= |u| |v| (Higham 2002, section 3.1). The error of the float64
    sum is 2^29 times smaller; gamma(d + 2) in place of gamma(d + 1) covers it.
    """

    users: Array
    items: Array
    bias: Array | None
    known: Array

    def approximate(self, rows: slice) -> Array:
        """See `Scores`."""
        out = np.asarray(self.users[rows] @ self.items.T)
        if self.bias is not None:
            out += self.bias
        return out

    def part(self, items: slice) -> DotScores:
        """Return the scores of a slice of the items; `error` of all items is a bound for them."""
        bias = None if self.bias is None else self.bias[items]
        return DotScores(self.users, self.items[items], bias, self.known)

    def exact(self, rows: Array, items: Array) -> Array:
        """See `Scores`. Products of two float32 numbers are exact in float64."""
        out = dot_pairs(self.users, self.items, rows, items)
        if self.bias is not None:
            out += self.bias[items]
        return out

    def error(self, rows: slice) -> Array:
        """See `Scores`."""
        size = self.items.shape[1]
        longest_item, largest_bias = self._longest_item_and_largest_bias
        user_lengths = np.sqrt(np.square(self.users[rows], dtype=np.float64).sum(axis=1))
        return np.asarray(
            _gamma(size + 2) * (user_lengths * longest_item + largest_bias) + (size + 1) * _TINY
        )

    @cached_property
    def _longest_item_and_largest_bias(self) -> tuple[float, float]:
        """The length of the longest item vector, rounded up, and the largest |bias|."""
        longest_item = float(
            np.sqrt(np.einsum("ij,ij->i", self.items, self.items).max(initial=0.0))
        )
        largest_bias = 0.0 if self.bias is None else float(np.abs(self.bias).max(initial=0.0))
        return longest_item * (1 + _gamma(self.items.shape[1] + 2)), largest_bias


@dataclass(frozen=True)
class SparseScores:
    """The scores `weights @ matrix`: a row of scores is a weighted sum of a few rows of the matrix.

    Parameters
    ----------
    start : int64 (n + 1,); row r has the entries `start[r]:start[r + 1]` of `items` and `weights`
    items : int32 (p,), local indices
    weights : float32 (p,)
    matrix : float32 (m, m): item j adds `matrix[j, i]`, times its weight, to the score of item i
    reach : float64 (m,): the largest |value| of each row of `matrix`
    evidence_only : an item with the score 0, to which nothing adds, is not recommended; only for
        weights >= 0

    The bound of the error: gamma(l) * sum_j |w_j| |M_ji| for a sum of l products, and
    |M_ji| <= reach_j.
    """

    start: Array
    items: Array
    weights: Array
    matrix: Array
    reach: Array
    evidence_only: bool = False

    @property
    def known(self) -> Array:
        """Whether each row has at least one item, bool (n,)."""
        return np.asarray(np.diff(self.start) > 0)

    def approximate(self, rows: slice) -> Array:
        """See `Scores`."""
        start = self.start[rows.start : rows.stop + 1]
        entries = slice(start[0], start[-1])
        sparse_weights = sparse.csr_matrix(
            (self.weights[entries], self.items[entries], (start - start[0]).astype(np.int32)),
            shape=(len(start) - 1, self.matrix.shape[0]),
        )
        out: Array = sparse_weights @ self.matrix
        if self.evidence_only:
            out[out == 0] = -np.inf
        return out

    def exact(self, rows: Array, items: Array) -> Array:
        """See `Scores`. A sum runs in the order of the row's items.

        Step s adds the product of the s-th item of every row that has as many, so numpy works on
        all rows at once. Example: rows with 3, 1 and 2 items are sorted by length to 3, 2, 1; then
        `n_adding` is [3, 2, 1], the number of rows that have a first, a second and a third item.
        """
        lengths = np.diff(self.start)[rows]
        order = np.argsort(-lengths, kind="stable")  # longest first: each step needs a prefix
        begin, sorted_items = self.start[rows[order]], items[order]
        n_steps = int(lengths.max(initial=0))
        n_adding = np.searchsorted(-lengths[order], -np.arange(n_steps), side="left")
        total = np.zeros(len(rows))
        for step, n_rows in enumerate(n_adding):
            entry = begin[:n_rows] + step
            total[:n_rows] += (
                self.weights[entry].astype(np.float64)
                * self.matrix[self.items[entry], sorted_items[:n_rows]]
            )
        out = np.empty(len(rows))
        out[order] = total
        if self.evidence_only:
            out[out == 0] = -np.inf
        return out

    def error(self, rows: slice) -> Array:
        """See `Scores`."""
        start = self.start[rows.start : rows.stop + 1]
        entries = slice(start[0], start[-1])
        lengths = np.diff(start)
        bound_of_entry = (
            np.abs(self.weights[entries], dtype=np.float64) * self.reach[self.items[entries]]
        )
        bound_of_row = np.bincount(
            np.repeat(np.arange(len(lengths)), lengths), bound_of_entry, len(lengths)
        )
        return np.asarray(_gamma(lengths + 2) * bound_of_row + (lengths + 1) * _TINY)


def recommend(
    queries: DataFrame,
    items: Array,
    scorer: Scorer | ListScorer,
    k: int,
    allowed: Array | None = None,
) -> DataFrame:
    """Return the k best items per query; see `RetrieverModel.recommend`.

    Lazy: the scorer is broadcast (no job), and nothing runs until the result is written. Narrow: no
    shuffle. Memory of each Python worker on an executor: the scorer (but see `Shared`) and twice
    `memory.block_bytes()`.
    """
    is_allowed = None if allowed is None else np.isin(items, allowed)
    shared = queries.sparkSession.sparkContext.broadcast((items, scorer, is_allowed))

    def recommend_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scorer, allowed_items = shared.value
        for batch in batches:
            yield answer(parse_queries(batch), vocabulary, scorer, k, allowed_items)

    return queries.mapInArrow(recommend_batches, schema.RECOMMENDED)


def score_pairs(pairs: DataFrame, items: Array, scorer: Scorer | ListScorer) -> DataFrame:
    """Return `schema.SCORED`, with a row for each item of each query; see `RetrieverModel.score`.

    Only the pairs are scored. The score is computed in float64 and rounded to float32; it equals
    the score that `recommend` gives the pair.
    """
    shared = pairs.sparkSession.sparkContext.broadcast((items, scorer))

    def score_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scorer = shared.value
        for batch in batches:
            item_lists = batch.column("items")
            rows = np.repeat(np.arange(batch.num_rows), _list_lengths(item_lists))
            block, item_idx = parse_queries(batch), item_lists.flatten()
            score, has_score = pair_scores(block, vocabulary, scorer, rows, item_idx.to_numpy())
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(block.user_idx[rows], pa.int64()),
                    item_idx,
                    pa.array(score.astype(np.float32) + np.float32(0), mask=~has_score),  # no -0
                ],
                names=schema.SCORED.names,
            )

    return pairs.mapInArrow(score_batches, schema.SCORED)


def pair_scores(
    block: QueryBlock, items: Array, scorer: Scorer | ListScorer, rows: Array, item_idx: Array
) -> tuple[Array, Array]:
    """Return the score of `item_idx[j]` for row `rows[j]` of `block`, and whether it has a score.

    The scores are float64 (p,); `has_score` is bool (p,). A pair has no score if the model does not
    know the user or the item, or never recommends the item to the user. The cost grows with the
    number of pairs: no row of all items is computed.
    """
    local = local_index(items, item_idx)
    scores = scorer.score(block)
    has_score = (local >= 0) & scores.known[rows]
    pair_score = np.zeros(len(rows))
    pair_score[has_score] = scores.exact(rows[has_score], local[has_score])
    has_score &= pair_score > -np.inf
    return pair_score, has_score


def _list_lengths(column: pa.ListArray) -> Array:
    return np.asarray(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))


def neighbours(
    spark: SparkSession,
    items: Array,
    scorer: Scorer | ListScorer,
    as_of: int,
    k: int,
    allowed: Array | None = None,
    *,
    with_itself: bool = False,
) -> DataFrame:
    """Return `schema.NEIGHBOURS`, up to k rows for each item that has neighbours.

    The neighbours of an item are what a user would get whose history is one event on that item, at
    `as_of` (microseconds since 1970 UTC). An item is among its own neighbours only `with_itself`.
    `allowed` : as in `recommend`. Lazy and narrow, like `recommend`.
    """
    is_allowed = None if allowed is None else np.isin(items, allowed)
    shared = spark.sparkContext.broadcast((items, scorer, is_allowed))
    names = schema.NEIGHBOURS.names

    def neighbours_of_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scorer, allowed_items = shared.value
        for batch in batches:
            item_idx = vocabulary[batch.column("id").to_numpy()]
            queries = _single_event_queries(item_idx, as_of)
            if with_itself:
                no_items = Ragged(np.zeros(len(item_idx) + 1, np.int64), item_idx[:0])
                queries = replace(queries, seen=no_items)
            lists = answer(queries, vocabulary, scorer, k, allowed_items)
            query_item = lists.column("user_idx").cast(pa.int32())
            yield pa.RecordBatch.from_arrays(
                [query_item, lists.column("rank"), lists.column("item_idx"), lists.column("score")],
                names=names,
            )

    return spark.range(len(items)).mapInArrow(neighbours_of_batches, schema.NEIGHBOURS)


def answer(
    block: QueryBlock,
    items: Array,
    scorer: Scorer | ListScorer,
    k: int,
    allowed: Array | None = None,
) -> pa.RecordBatch:
    """Return the lists of one block as a batch of `schema.RECOMMENDED`, by row, then by rank.

    `items` int32 (n_items,) ascending: the item_idx of each local index. `allowed` bool (n_items,):
    whether each item may be recommended; None = all may.
    """
    scores = scorer.score(block)
    seen_items = _to_local(block.seen, items)
    if isinstance(scores, ListedScores | SlicedScores):
        return _recommended_batch(block, items, *scores.best(seen_items, k, allowed))
    rows_per_block, tile_width = block_shape(len(items), k, isinstance(scores, DotScores))
    tiles = _tiles(scores, len(items), tile_width)
    lists_of_blocks = [
        _best_of_rows(
            scores,
            tiles,
            seen_items,
            slice(begin, min(begin + rows_per_block, len(block))),
            k,
            allowed,
        )
        for begin in range(0, len(block), rows_per_block)
    ] or [
        (
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
        )
    ]
    row, item, rank, score = (
        np.concatenate(arrays) for arrays in zip(*lists_of_blocks, strict=True)
    )
    return _recommended_batch(block, items, row, item, rank, score)


def _recommended_batch(
    block: QueryBlock, items: Array, row: Array, item: Array, rank: Array, score: Array
) -> pa.RecordBatch:
    """Return a batch of `schema.RECOMMENDED`; `row` is a row of `block`, `item` a local item."""
    return pa.RecordBatch.from_arrays(
        [
            pa.array(block.user_idx[row], pa.int64()),
            pa.array(items[item], pa.int32()),
            pa.array(rank, pa.int32()),
            pa.array(score, pa.float32()),
        ],
        names=schema.RECOMMENDED.names,
    )


def block_shape(n_items: int, k: int, in_tiles: bool) -> tuple[int, int]:
    """Return the shape (rows, items) of a block of scores: it takes at most `memory.block_bytes()`.

    A block has at least one row. `in_tiles` : True if the items may be taken tile by tile; False if
    a row must hold the scores of all items.
    """
    n_scores = memory.block_bytes() // 4
    if not in_tiles or n_items <= min(ONE_TILE, n_scores):
        return max(1, n_scores // n_items), n_items
    width = min(n_items, max(TILE_ITEMS, 16 * k), n_scores)
    return max(1, min(TILE_ROWS, n_scores // width)), width


def _tiles(scores: Scores, n_items: int, width: int) -> list[tuple[int, Scores]]:
    """Return (first item, scores) of each tile of at most `width` items."""
    if not isinstance(scores, DotScores) or width >= n_items:
        return [(0, scores)]
    return [(begin, scores.part(slice(begin, begin + width))) for begin in range(0, n_items, width)]


def _best_of_rows(
    scores: Scores,
    tiles: list[tuple[int, Scores]],
    seen: Ragged,
    rows: slice,
    k: int,
    allowed: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Return (row, local item, rank, score) of the k best items of `rows`, by row, then by rank.

    `seen` and `allowed` say which local items may not be recommended, see `answer`.
    """
    start = seen.start[rows.start : rows.stop + 1]
    seen_row = np.repeat(np.arange(len(start) - 1), np.diff(start))
    seen_item = seen.values[start[0] : start[-1]]
    if len(tiles) > 1:  # by item, so that those of a tile are a slice
        order = np.argsort(seen_item)
        seen_row, seen_item = seen_row[order], seen_item[order]
    is_unknown_user = ~scores.known[rows]
    candidates = Candidates(
        k, scores.error(rows), lambda row, item: scores.exact(row + rows.start, item)
    )
    for first_item, tile in tiles:
        approximate = tile.approximate(rows)  # (rows, width)
        seen_of_tile = slice(0, len(seen_row))
        if len(tiles) > 1:
            seen_of_tile = slice(
                *np.searchsorted(seen_item, [first_item, first_item + approximate.shape[1]])
            )
        approximate[seen_row[seen_of_tile], seen_item[seen_of_tile] - first_item] = -np.inf
        approximate[is_unknown_user] = -np.inf
        if allowed is not None:
            approximate[:, ~allowed[first_item : first_item + approximate.shape[1]]] = -np.inf
        candidates.add(approximate, first_item)
    row, item, rank, score = candidates.best()
    return row + rows.start, item, rank, score


def _gamma(n: Any) -> Any:
    """Return gamma(n) = n * u / (1 - n * u), u the unit roundoff of float32.

    It bounds the relative error of a sum of n products.
    """
    return n * _UNIT / (1 - n * _UNIT)


def _to_local(ragged: Ragged, items: Array) -> Ragged:
    """Return `ragged` with each item_idx as a local index; values outside `items` are left out."""
    local = local_index(items, ragged.values)
    is_in_items = local >= 0
    n_kept_before = np.concatenate([[0], np.cumsum(is_in_items)])
    return Ragged(n_kept_before[ragged.start], local[is_in_items])


def _single_event_queries(items: Array, as_of: int) -> QueryBlock:
    """Return one query per item: its history is one event on the item, at `as_of`.

    The item is also in `seen`, so it is not its own neighbour. The query's user_idx is the
    item_idx.
    """
    n_queries = len(items)
    start, weight = np.arange(n_queries + 1), np.ones(n_queries, np.float32)
    return QueryBlock(
        user_idx=items.astype(np.int64),
        history=Histories(start, items, np.full(n_queries, as_of, np.int64), weight),
        seen=Ragged(start, items),
        features=pa.nulls(n_queries, _FEATURES),  # all features are missing
    )
