"""The exact top-N kernel: every model ends here.

Scores come by GEMM in float32, block by block. What may be among the k best is then scored once
more in float64 in a fixed order, rounded to float32, and sorted by (-score, item_idx). The answer
is that of a float64 brute force over all items, ties included, whatever the blocks: see
`engines.topn`. A large item matrix is taken tile by tile, so memory does not follow the catalogue.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from scipy import sparse

from recspark import schema, storage
from recspark.data.blocks import Array, Histories, QueryBlock, Ragged, parse_queries
from recspark.engines.topn import Candidates, dot_pairs
from recspark.errors import ModelError
from recspark.models.scoring.listed import ListedScores

# Approximate scores held at once. Measured: smaller blocks pack the item matrix too often, larger
# ones leave the cache.
BLOCK_BYTES = 32 << 20
# Of a larger item matrix: 1 M items x 64 take 1.4 ms a user so, 1.75 ms at 256 x 32,768, 4.4 ms in
# rows of all items, and 1.6 ms in `implicit` (one core of an EPYC with 16 MB of L3 each).
ONE_TILE, TILE_ITEMS, TILE_ROWS = 32768, 8192, 1024

_FEATURES = pa.struct([("numbers", pa.list_(pa.float32())), ("fields", pa.list_(pa.int32()))])
_UNIT = 2.0**-24  # unit roundoff of float32
_TINY = float(np.finfo(np.float32).tiny)


class Scores(Protocol):
    """Scores of one block of queries against all items of the vocabulary.

    -inf means that the item is never recommended to that row; NaN and +inf raise ModelError.
    """

    @property
    def known(self) -> Array:
        """Where the model knows the user, bool (n,); a row of False gets no list."""

    def approximate(self, rows: slice) -> Array:
        """Scores by GEMM, float32 (rows, n_items), new: each within `error` of the exact one."""

    def exact(self, rows: Array, items: Array) -> Array:
        """Scores of local `items[j]` for row `rows[j]`, float64 (p,), summed in a fixed order.

        -inf where the item is never recommended to the row.
        """

    def error(self, rows: slice) -> Array:
        """Bound of |approximate - exact| in each row, float64 (rows,)."""


class Scorer(Protocol):
    """Turns queries into scores; shipped to executors, so it pickles (arrays, no Spark objects)."""

    def score(self, block: QueryBlock) -> Scores:
        """Return the scores of `block`; those of a row depend on that row alone."""


class ListScorer(Protocol):
    """A `Scorer` of a model that scores a few items of each row only."""

    def score(self, block: QueryBlock) -> ListedScores:
        """Return the scores of `block`; those of a row depend on that row alone."""


@dataclass(frozen=True)
class Shared:
    """A read-only array that executors need.

    A whole memory-mapped `.npy` file (an artifact in a local or mounted folder) travels as its
    name, and all workers of a machine share its pages; any other array travels by value, a copy a
    worker.
    """

    array: Array

    def __reduce__(self) -> tuple[Any, ...]:
        array = self.array
        base: object = array.base  # the map itself, for a whole file
        if isinstance(array, np.memmap) and isinstance(base, mmap.mmap):
            return _open_shared, (str(array.filename), array.dtype.str, array.shape)
        return Shared, (np.asarray(array),)


@dataclass(frozen=True)
class DotScores:
    """Scores `users @ items.T + bias`.

    `users` float32 (n, d), `items` float32 (m, d), `bias` float32 (m,) or None, `known` bool (n,);
    d may be 0.

    Error: a sum of d products and a bias in any order, fused or not, errs by at most
    gamma(d + 1) * (sum |u_i v_i| + |b|), and sum |u_i v_i| <= |u| |v| (Higham 2002, section 3.1).
    The float64 sum errs 2^29 times less, and one more term of gamma pays for it.
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
        """Return the scores of some of the items; the error of the whole holds for them."""
        bias = None if self.bias is None else self.bias[items]
        return DotScores(self.users, self.items[items], bias, self.known)

    def exact(self, rows: Array, items: Array) -> Array:
        """See `Scores`. Products are exact in float64."""
        out = dot_pairs(self.users, self.items, rows, items)
        if self.bias is not None:
            out += self.bias[items]
        return out

    def error(self, rows: slice) -> Array:
        """See `Scores`."""
        size = self.items.shape[1]
        longest, heaviest = self._reach
        norms = np.sqrt(np.square(self.users[rows], dtype=np.float64).sum(axis=1))
        return np.asarray(_gamma(size + 2) * (norms * longest + heaviest) + (size + 1) * _TINY)

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """The longest item vector and the largest |bias|."""
        longest = float(np.sqrt(np.einsum("ij,ij->i", self.items, self.items).max(initial=0.0)))
        heaviest = 0.0 if self.bias is None else float(np.abs(self.bias).max(initial=0.0))
        return longest * (1 + _gamma(self.items.shape[1] + 2)), heaviest


@dataclass(frozen=True)
class SparseScores:
    """Scores `weights @ matrix`: each row adds up the matrix rows of its few items.

    Parameters
    ----------
    start : int64 (n + 1,); row r has `start[r]:start[r + 1]` of
    items : int32 (p,), and weights : float32 (p,)
    matrix : float32 (m, m): row j holds what item j adds to every item
    reach : float64 (m,): largest |value| of each row of `matrix`
    evidence_only : an item to which nothing adds (score 0) is not recommended; for weights >= 0

    Error: gamma(l) * sum_j |w_j| |M_ji| for a sum of l products, and |M_ji| <= reach_j.
    """

    start: Array
    items: Array
    weights: Array
    matrix: Array
    reach: Array
    evidence_only: bool = False

    @property
    def known(self) -> Array:
        """Rows with at least one item, bool (n,)."""
        return np.asarray(np.diff(self.start) > 0)

    def approximate(self, rows: slice) -> Array:
        """See `Scores`."""
        start = self.start[rows.start : rows.stop + 1]
        part = slice(start[0], start[-1])
        block = sparse.csr_matrix(
            (self.weights[part], self.items[part], (start - start[0]).astype(np.int32)),
            shape=(len(start) - 1, self.matrix.shape[0]),
        )
        out: Array = block @ self.matrix
        if self.evidence_only:
            out[out == 0] = -np.inf
        return out

    def exact(self, rows: Array, items: Array) -> Array:
        """See `Scores`. Sums in the order of the row's items, all rows in step."""
        length = np.diff(self.start)[rows]
        order = np.argsort(-length, kind="stable")  # longest first: who still adds is a prefix
        begin, item = self.start[rows[order]], items[order]
        steps = int(length.max(initial=0))
        adding = np.searchsorted(-length[order], -np.arange(steps), side="left")
        total = np.zeros(len(rows))
        for step, n in enumerate(adding):
            at = begin[:n] + step
            total[:n] += self.weights[at].astype(np.float64) * self.matrix[self.items[at], item[:n]]
        out = np.empty(len(rows))
        out[order] = total
        if self.evidence_only:
            out[out == 0] = -np.inf
        return out

    def error(self, rows: slice) -> Array:
        """See `Scores`."""
        start = self.start[rows.start : rows.stop + 1]
        part = slice(start[0], start[-1])
        length = np.diff(start)
        size = np.abs(self.weights[part], dtype=np.float64) * self.reach[self.items[part]]
        total = np.bincount(np.repeat(np.arange(len(length)), length), size, len(length))
        return np.asarray(_gamma(length + 2) * total + (length + 1) * _TINY)


def recommend(
    queries: DataFrame,
    items: Array,
    scorer: Scorer | ListScorer,
    k: int,
    allowed: Array | None = None,
) -> DataFrame:
    """Return the k best items per query; see `RetrieverModel.recommend`.

    Lazy: the scorer is broadcast (no job), nothing runs until the answer is written. Narrow: no
    shuffle. Executor memory: the scorer once a Python worker (see `Shared`), and twice
    `BLOCK_BYTES`.
    """
    mask = None if allowed is None else np.isin(items, allowed)
    shared = queries.sparkSession.sparkContext.broadcast((items, scorer, mask))

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scores, allowed_items = shared.value
        for batch in batches:
            yield answer(parse_queries(batch), vocabulary, scores, k, allowed_items)

    return queries.mapInArrow(run, schema.RECOMMENDED)


def score_pairs(pairs: DataFrame, items: Array, scorer: Scorer | ListScorer) -> DataFrame:
    """Return `schema.SCORED`, a row for each item of each query; see `RetrieverModel.score`.

    Only the pairs are scored, in float64, rounded to float32: what `recommend` gives them.
    """
    shared = pairs.sparkSession.sparkContext.broadcast((items, scorer))

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scores = shared.value
        for batch in batches:
            asked = batch.column("items")
            rows = np.repeat(np.arange(batch.num_rows), _lengths(asked))
            block, item = parse_queries(batch), asked.flatten()
            score, known = pair_scores(block, vocabulary, scores, rows, item.to_numpy())
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(block.user_idx[rows], pa.int64()),
                    item,
                    pa.array(score.astype(np.float32) + np.float32(0), mask=~known),  # no -0
                ],
                names=schema.SCORED.names,
            )

    return pairs.mapInArrow(run, schema.SCORED)


def pair_scores(
    block: QueryBlock, items: Array, scorer: Scorer | ListScorer, rows: Array, item_idx: Array
) -> tuple[Array, Array]:
    """Return the score of `item_idx[j]` for row `rows[j]` of `block`, float64 (p,), and where there
    is one, bool (p,): elsewhere the model does not know the user or the item, or never lists it.

    Cost follows the pairs: no row of all items is made.
    """
    local = local_index(items, item_idx)
    scores = scorer.score(block)
    known = (local >= 0) & scores.known[rows]
    out = np.zeros(len(rows))
    out[known] = scores.exact(rows[known], local[known])
    known &= out > -np.inf
    return out, known


def _lengths(column: pa.ListArray) -> Array:
    return np.asarray(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))


def neighbours(
    spark: SparkSession, items: Array, scorer: Scorer | ListScorer, as_of: int, k: int
) -> DataFrame:
    """Return `schema.NEIGHBOURS`: what a user who only acted on one item, at `as_of`, would get.

    One row in k for each item that has neighbours. Lazy and narrow, as `recommend`.
    """
    shared = spark.sparkContext.broadcast((items, scorer))
    names = schema.NEIGHBOURS.names

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scores = shared.value
        for batch in batches:
            chosen = vocabulary[batch.column("id").to_numpy()]
            best = answer(_single(chosen, as_of), vocabulary, scores, k)
            item = best.column("user_idx").cast(pa.int32())
            yield pa.RecordBatch.from_arrays(
                [item, best.column("rank"), best.column("item_idx"), best.column("score")],
                names=names,
            )

    return spark.range(len(items)).mapInArrow(run, schema.NEIGHBOURS)


def answer(
    block: QueryBlock,
    items: Array,
    scorer: Scorer | ListScorer,
    k: int,
    allowed: Array | None = None,
) -> pa.RecordBatch:
    """Return the lists of one block as a batch of `schema.RECOMMENDED`, by row, then rank.

    `items` int32 (n_items,) ascending: the item_idx of each local index. `allowed` bool (n_items,):
    the items that may be listed; None = all.
    """
    scores = scorer.score(block)
    seen = _local(block.seen, items)
    if isinstance(scores, ListedScores):
        return _lists(block, items, *scores.best(seen, k, allowed))
    step, width = block_shape(len(items), k, isinstance(scores, DotScores))
    tiles = _tiles(scores, len(items), width)
    parts = [
        _best(scores, tiles, seen, slice(begin, min(begin + step, len(block))), k, allowed)
        for begin in range(0, len(block), step)
    ] or [
        (
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
        )
    ]
    row, item, rank, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _lists(block, items, row, item, rank, score)


def _lists(
    block: QueryBlock, items: Array, row: Array, item: Array, rank: Array, score: Array
) -> pa.RecordBatch:
    """Return a batch of `schema.RECOMMENDED` of rows of `block` and local items."""
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
    """Return the (rows, items) of a block of scores held at once: at most `block_bytes()` of them.

    `in_tiles` : items may be taken tile by tile; else a row has all of them.
    """
    room = block_bytes() // 4
    if not in_tiles or n_items <= min(ONE_TILE, room):
        return max(1, room // n_items), n_items
    width = min(n_items, max(TILE_ITEMS, 16 * k), room)
    return max(1, min(TILE_ROWS, room // width)), width


def block_bytes() -> int:
    """Return `BLOCK_BYTES`, or a 32nd of the memory that Spark grants a Python worker if that is
    less.
    """
    granted = int(os.environ.get("PYSPARK_EXECUTOR_MEMORY_MB") or 0) << 20
    return min(BLOCK_BYTES, granted // 32) if granted else BLOCK_BYTES


def local_index(items: Array, item_idx: Array) -> Array:
    """Return the position of each `item_idx` in `items` (ascending), -1 where it is not there.

    >>> local_index(np.array([3, 5, 9]), np.array([9, 4, 3]))
    array([ 2, -1,  0])
    """
    at = np.minimum(np.searchsorted(items, item_idx), len(items) - 1)
    return np.where(items[at] == item_idx, at, -1)


def _tiles(scores: Scores, n_items: int, width: int) -> list[tuple[int, Scores]]:
    """Return the scores of each tile of items, and its first item."""
    if not isinstance(scores, DotScores) or width >= n_items:
        return [(0, scores)]
    return [(begin, scores.part(slice(begin, begin + width))) for begin in range(0, n_items, width)]


def _best(
    scores: Scores,
    tiles: list[tuple[int, Scores]],
    seen: Ragged,
    rows: slice,
    k: int,
    allowed: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Return (row, local item, rank, score) of the k best of each row, by row, then rank."""
    start = seen.start[rows.start : rows.stop + 1]
    masked = np.repeat(np.arange(len(start) - 1), np.diff(start))
    masked_item = seen.values[start[0] : start[-1]]
    if len(tiles) > 1:
        order = np.argsort(masked_item)
        masked, masked_item = masked[order], masked_item[order]
    unknown = ~scores.known[rows]
    found = Candidates(
        k, scores.error(rows), lambda row, item: scores.exact(row + rows.start, item)
    )
    for first, tile in tiles:
        approximate = tile.approximate(rows)  # (rows, width)
        part = slice(0, len(masked))
        if len(tiles) > 1:
            part = slice(*np.searchsorted(masked_item, [first, first + approximate.shape[1]]))
        approximate[masked[part], masked_item[part] - first] = -np.inf
        approximate[unknown] = -np.inf
        if allowed is not None:
            approximate[:, ~allowed[first : first + approximate.shape[1]]] = -np.inf
        found.add(approximate, first)
    row, item, rank, score = found.best()
    return row + rows.start, item, rank, score


def _gamma(n: Any) -> Any:
    """Return n * u / (1 - n * u) for float32: the relative error of a sum of n products."""
    return n * _UNIT / (1 - n * _UNIT)


def _local(ragged: Ragged, items: Array) -> Ragged:
    """Return `ragged` with item_idx as local indices; what is not in `items` is left out."""
    at = local_index(items, ragged.values)
    kept = at >= 0
    before = np.concatenate([[0], np.cumsum(kept)])
    return Ragged(before[ragged.start], at[kept])


def _single(items: Array, as_of: int) -> QueryBlock:
    """Return a query per item: one event on it at `as_of`, itself masked, user_idx = item_idx."""
    n = len(items)
    start, ones = np.arange(n + 1), np.ones(n, np.float32)
    return QueryBlock(
        user_idx=items.astype(np.int64),
        history=Histories(start, items, np.full(n, as_of, np.int64), ones),
        seen=Ragged(start, items),
        features=pa.nulls(n, _FEATURES),  # of nobody anything is known
    )


def _open_shared(path: str, dtype: str, shape: tuple[int, ...]) -> Shared:
    array = storage.read_array(path, mmap=True)
    if array.dtype.str != dtype or array.shape != shape:
        raise ModelError(f"{path}: the artifact changed while it was in use; run the stage again")
    return Shared(array)
