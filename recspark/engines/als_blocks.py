"""Interactions as blocks of sparse rows, on both sides, and which factors each block needs.

User u is in block u mod n, item i in block i mod n. The columns of a block are compact: the other
side's rows that it needs, by block, then by row. So the factors that the other blocks send, put
after one another in the order of blocks, are what the columns count.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import RDD, StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql.types import BinaryType, IntegerType, StructField, StructType
from scipy import sparse

from recspark.data.blocks import Array
from recspark.errors import KeyViolationError

LEVEL = StorageLevel.MEMORY_AND_DISK
_FLUSH = 8 << 20  # interactions that a task gathers before it hands them to the shuffle
_FIELDS = {"users": np.int64, "lengths": np.int32, "items": np.int32, "weights": np.float32}


@dataclass(frozen=True)
class Order:
    """Items by block, then by number: the order of rows of the matrix of all item factors."""

    n_items: int
    n_blocks: int

    @property
    def bounds(self) -> Array:
        """int64 (n_blocks + 1,): where each block begins."""
        sizes = [len(range(b, self.n_items, self.n_blocks)) for b in range(self.n_blocks)]
        return np.concatenate([[0], np.cumsum(sizes)])

    @property
    def position(self) -> Array:
        """int32 (n_items,): where each item is."""
        item = np.arange(self.n_items)
        return (self.bounds[item % self.n_blocks] + item // self.n_blocks).astype(np.int32)


@dataclass(frozen=True)
class Block:
    """The rows of one block, compressed.

    Parameters
    ----------
    ids : int64 (n,): user_idx or item of each row, ascending
    start : int64 (n + 1,); row r has `start[r]:start[r + 1]` of
    at : columns, int32 (p,), ascending in a row; and weight : float32 (p,)
    bounds : int64 (n_blocks + 1,): columns that stand for each block of the other side
    columns : int32 (bounds[-1],): position in `Order` of each column of a block of users; empty in
        a block of items
    """

    ids: Array
    start: Array
    at: Array
    weight: Array
    bounds: Array
    columns: Array

    @property
    def checksum(self) -> int:
        """CRC-32 of everything in it."""
        value = 0
        for array in (self.ids, self.start, self.at, self.weight, self.bounds, self.columns):
            dense = np.ascontiguousarray(array)
            value = zlib.crc32(dense.data.cast("B") if dense.size else b"", value)
        return value

    def routes(self) -> list[Array]:
        """Return the rows that each block of the other side needs: int32, ascending."""
        n_rows, n_blocks = len(self.start) - 1, len(self.bounds) - 1
        block = np.repeat(np.arange(n_blocks), np.diff(self.bounds))  # of each column
        needed = np.zeros((n_blocks, n_rows), bool)
        needed[block[self.at], np.repeat(np.arange(n_rows), np.diff(self.start))] = True
        return [np.flatnonzero(rows).astype(np.int32) for rows in needed]


@dataclass(frozen=True)
class _Users:
    """Some users of a block; the items of each, one user after the other."""

    users: Array
    lengths: Array
    items: Array
    weights: Array


@dataclass(frozen=True)
class _Corner:
    """What block `block` of users holds of a block of items: entries by item, then by user."""

    block: int
    rows: Array  # int32, ascending: items in their block that have entries
    lengths: Array  # of each
    at: Array  # int32: which of the users that are sent
    weight: Array
    n_columns: int  # users that are sent


def same(key: int) -> int:
    """Block b is in partition b."""
    return key


def user_blocks(pairs: DataFrame, order: Order) -> RDD[tuple[int, Block]]:
    """Return the blocks of users, one a partition, keyed by block.

    Parameters
    ----------
    pairs : user bigint, items array<int> (in [0, n_items), distinct), weights array<float>; one row
        a user

    One shuffle, no action. Raises KeyViolationError, when it runs, for a user in two rows.
    """
    n = order.n_blocks
    out = StructType([StructField("block", IntegerType())])
    for name in _FIELDS:
        out.add(name, BinaryType())

    def deal(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for users in _gather(batches):
            block = np.where(users.lengths > 0, users.users % n, -1)  # nobody without items
            parts = [_pick(users, np.flatnonzero(block == b)) for b in range(n)]
            columns = [[getattr(p, name).tobytes() for p in parts] for name in _FIELDS]
            yield pa.RecordBatch.from_arrays(
                [pa.array(range(n), pa.int32()), *[pa.array(c, pa.binary()) for c in columns]],
                names=out.names,
            )

    def build(records: Iterable[tuple[int, _Users]]) -> Iterator[tuple[int, Block]]:
        found = list(records)
        yield found[0][0], _user_block([users for _, users in found], order)

    dealt = pairs.select("user", "items", "weights").mapInArrow(deal, out).rdd.map(_unpack)
    nobody = _Users(*(np.zeros(0, kind) for kind in _FIELDS.values()))
    every = pairs.sparkSession.sparkContext.parallelize([(b, nobody) for b in range(n)], 1)
    return every.union(dealt).partitionBy(n, same).mapPartitions(build, preservesPartitioning=True)


def item_blocks(users: RDD[tuple[int, Block]], order: Order) -> RDD[tuple[int, Block]]:
    """Return the blocks of items made from those of users: the transpose. One shuffle, no action."""

    def cut(records: Iterable[tuple[int, Block]]) -> Iterator[tuple[int, _Corner]]:
        for key, block in records:
            yield from enumerate(_corners(key, block, order))

    def build(records: Iterable[tuple[int, _Corner]]) -> Iterator[tuple[int, Block]]:
        found = list(records)
        yield found[0][0], _item_block(found[0][0], [corner for _, corner in found], order)

    return (
        users.mapPartitions(cut)
        .partitionBy(order.n_blocks, same)
        .mapPartitions(build, preservesPartitioning=True)
    )


def _gather(batches: Iterable[pa.RecordBatch]) -> Iterator[_Users]:
    """Put small batches together."""
    held: list[_Users] = []
    for batch in batches:
        items, weights = batch.column("items"), batch.column("weights")
        held.append(
            _Users(
                batch.column("user").to_numpy(),
                items.value_lengths().to_numpy(),
                items.flatten().to_numpy(),
                weights.flatten().to_numpy(),
            )
        )
        if sum(len(part.items) for part in held) >= _FLUSH:
            yield _together(held)
            held = []
    if held:
        yield _together(held)


def _together(parts: list[_Users]) -> _Users:
    return _Users(
        *(
            np.concatenate([getattr(part, name) for part in parts]).astype(kind, copy=False)
            for name, kind in _FIELDS.items()
        )
    )


def _unpack(row: Any) -> tuple[int, _Users]:
    return row["block"], _Users(*(np.frombuffer(row[n], kind) for n, kind in _FIELDS.items()))


def _pick(users: _Users, rows: Array) -> _Users:
    """Return some of the users, in the order of `rows`."""
    start = np.concatenate([[0], np.cumsum(users.lengths)])
    lengths = users.lengths[rows]
    skipped = start[rows] - (np.cumsum(lengths) - lengths)
    at = np.repeat(skipped, lengths) + np.arange(lengths.sum())
    return _Users(users.users[rows], lengths, users.items[at], users.weights[at])


def _user_block(parts: list[_Users], order: Order) -> Block:
    users = _together(parts)
    users = _pick(users, np.argsort(users.users, kind="stable"))
    twice = np.flatnonzero(np.diff(users.users) == 0)
    if len(twice):
        raise KeyViolationError(
            f"als: user {users.users[twice[0]]} has more than one row of items; each user has one"
        )
    place = order.position[users.items]
    columns = np.flatnonzero(np.bincount(place, minlength=order.n_items)).astype(np.int32)
    column = np.zeros(order.n_items, np.int32)
    column[columns] = np.arange(len(columns))
    start = np.concatenate([[0], np.cumsum(users.lengths)])
    rows = sparse.csr_matrix(
        (users.weights, column[place], start), shape=(len(users.users), len(columns))
    )
    rows = rows.tocsc().tocsr()  # sorts each row's columns
    return Block(
        users.users,
        rows.indptr.astype(np.int64),
        rows.indices.astype(np.int32),
        rows.data,
        np.searchsorted(columns, order.bounds),
        columns,
    )


def _corners(key: int, block: Block, order: Order) -> Iterator[_Corner]:
    """Yield, for each block of items in turn, what this block of users holds of it."""
    shape = (len(block.start) - 1, len(block.columns))
    by_item = sparse.csr_matrix((block.weight, block.at, block.start), shape=shape).tocsc()
    place = np.zeros(shape[0], np.int32)
    for b, sent in enumerate(block.routes()):
        place[sent] = np.arange(len(sent))
        some = slice(block.bounds[b], block.bounds[b + 1])
        begin, end = by_item.indptr[some.start], by_item.indptr[some.stop]
        yield _Corner(
            key,
            block.columns[some] - np.int32(order.bounds[b]),
            np.diff(by_item.indptr[some.start : some.stop + 1]),
            place[by_item.indices[begin:end]],
            by_item.data[begin:end],
            len(sent),
        )


def _item_block(key: int, corners: list[_Corner], order: Order) -> Block:
    """Put the corners side by side, in the order of the blocks of users."""
    corners = sorted(corners, key=lambda corner: corner.block)
    ids = np.arange(key, order.n_items, order.n_blocks, dtype=np.int64)
    lengths = np.zeros(len(ids), np.int64)
    for corner in corners:
        lengths[corner.rows] += corner.lengths
    start = np.concatenate([[0], np.cumsum(lengths)])
    bounds = np.concatenate([[0], np.cumsum([corner.n_columns for corner in corners])])
    at, weight = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    free = start[:-1].copy()
    for corner, offset in zip(corners, bounds[:-1], strict=True):
        skipped = free[corner.rows] - (np.cumsum(corner.lengths) - corner.lengths)
        into = np.repeat(skipped, corner.lengths) + np.arange(len(corner.at))
        at[into], weight[into] = corner.at + np.int32(offset), corner.weight
        free[corner.rows] += corner.lengths
    return Block(ids, start, at, weight, bounds, np.zeros(0, np.int32))
