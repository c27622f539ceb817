"""Interactions as blocks of sparse rows, on both sides, and which factors each block needs.

User u is in block u mod n, item i is in block i mod n. A block is a sparse matrix in compressed
rows, and its columns are compact: one column for each row of the other side that the block needs,
sorted by block, then by row. So when the blocks of the other side send their factors, putting the
factors after one another in the order of blocks gives exactly one row per column.
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
_FLUSH = 8 << 20  # interactions that a task gathers before it gives them to the shuffle
_FIELDS = {"users": np.int64, "lengths": np.int32, "items": np.int32, "weights": np.float32}


@dataclass(frozen=True)
class Order:
    """The order of the rows in the matrix of all item factors: by block, then by item.

    With 5 items in 2 blocks the rows are items 0, 2, 4, 1, 3: `bounds` is [0, 3, 5] and `position`
    is [0, 3, 1, 4, 2].
    """

    n_items: int
    n_blocks: int

    @property
    def bounds(self) -> Array:
        """Where each block begins, int64 (n_blocks + 1,)."""
        sizes = [len(range(block, self.n_items, self.n_blocks)) for block in range(self.n_blocks)]
        return np.concatenate([[0], np.cumsum(sizes)])

    @property
    def position(self) -> Array:
        """The row of each item in the matrix of all item factors, int32 (n_items,)."""
        item = np.arange(self.n_items)
        return (self.bounds[item % self.n_blocks] + item // self.n_blocks).astype(np.int32)


@dataclass(frozen=True)
class Block:
    """The rows of one block, compressed.

    Parameters
    ----------
    ids : int64 (n,): user_idx or item of each row, ascending
    start : int64 (n + 1,); the entries of row r are `start[r]:start[r + 1]` of `indices` and
        `weight`
    indices : int32 (p,): column of each entry, ascending in a row
    weight : float32 (p,): weight of each entry
    bounds : int64 (n_blocks + 1,): columns `bounds[b]:bounds[b + 1]` stand for rows of block b of
        the other side
    columns : int32 (bounds[-1],): position in `Order` of each column of a block of users; empty in
        a block of items
    """

    ids: Array
    start: Array
    indices: Array
    weight: Array
    bounds: Array
    columns: Array

    @property
    def checksum(self) -> int:
        """CRC-32 of all arrays of the block."""
        value = 0
        for array in (self.ids, self.start, self.indices, self.weight, self.bounds, self.columns):
            contiguous = np.ascontiguousarray(array)
            value = zlib.crc32(contiguous.data.cast("B") if contiguous.size else b"", value)
        return value

    def routes(self) -> list[Array]:
        """Return, for each block of the other side, the rows that it needs from this block.

        A block needs the factors of a row if the row has an entry in one of its columns. Rows are
        int32, ascending.
        """
        n_rows, n_blocks = len(self.start) - 1, len(self.bounds) - 1
        block_of_column = np.repeat(np.arange(n_blocks), np.diff(self.bounds))
        is_needed = np.zeros((n_blocks, n_rows), bool)
        is_needed[
            block_of_column[self.indices], np.repeat(np.arange(n_rows), np.diff(self.start))
        ] = True
        return [np.flatnonzero(is_needed_row).astype(np.int32) for is_needed_row in is_needed]


@dataclass(frozen=True)
class _Users:
    """Some users of a block, and the items and weights of each, one user after the other."""

    users: Array
    lengths: Array
    items: Array
    weights: Array


@dataclass(frozen=True)
class _Corner:
    """The entries that a block of users and a block of items share, sorted by item, then by user.

    The users' factors are needed by the block of items, so the block of users sends those of every
    user who has an entry here.
    """

    user_block: int
    rows: Array  # int32, ascending: the rows, in their block, of the items that have entries
    lengths: Array  # number of entries of each of these items
    indices: Array  # int32: the user of each entry, as an index into the users that are sent
    weight: Array
    n_sent: int  # users that are sent


def partition_of_block(block: int) -> int:
    """Return the partition of a block: block b is in partition b."""
    return block


def user_blocks(pairs: DataFrame, order: Order) -> RDD[tuple[int, Block]]:
    """Return the blocks of users, one per partition, keyed by block.

    Parameters
    ----------
    pairs : user bigint, items array<int> (in [0, n_items), distinct), weights array<float>; one row
        per user

    One shuffle, no action. A user without items is in no block. A user in two rows raises
    KeyViolationError once the RDD is computed.
    """
    n_blocks = order.n_blocks
    dealt_schema = StructType([StructField("block", IntegerType())])
    for name in _FIELDS:
        dealt_schema.add(name, BinaryType())

    def deal_to_blocks(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for users in _gather(batches):
            # A user without items belongs to no block: -1.
            block_of_user = np.where(users.lengths > 0, users.users % n_blocks, -1)
            parts = [
                _pick(users, np.flatnonzero(block_of_user == block)) for block in range(n_blocks)
            ]
            columns = [[getattr(part, name).tobytes() for part in parts] for name in _FIELDS]
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(range(n_blocks), pa.int32()),
                    *[pa.array(column, pa.binary()) for column in columns],
                ],
                names=dealt_schema.names,
            )

    def build(records: Iterable[tuple[int, _Users]]) -> Iterator[tuple[int, Block]]:
        keyed_parts = list(records)
        yield keyed_parts[0][0], _user_block([users for _, users in keyed_parts], order)

    dealt = (
        pairs.select("user", "items", "weights")
        .mapInArrow(deal_to_blocks, dealt_schema)
        .rdd.map(_unpack)
    )
    no_users = _Users(*(np.zeros(0, dtype) for dtype in _FIELDS.values()))
    # An empty part of every block, so that blocks without a user exist as well.
    empty_by_block = pairs.sparkSession.sparkContext.parallelize(
        [(block, no_users) for block in range(n_blocks)], 1
    )
    return (
        empty_by_block.union(dealt)
        .partitionBy(n_blocks, partition_of_block)
        .mapPartitions(build, preservesPartitioning=True)
    )


def item_blocks(users: RDD[tuple[int, Block]], order: Order) -> RDD[tuple[int, Block]]:
    """Return the blocks of items, one per partition, by transposing the blocks of users.

    One shuffle, no action.
    """

    def cut_into_corners(records: Iterable[tuple[int, Block]]) -> Iterator[tuple[int, _Corner]]:
        for user_block, block in records:
            yield from enumerate(_corners(user_block, block, order))

    def build(records: Iterable[tuple[int, _Corner]]) -> Iterator[tuple[int, Block]]:
        keyed_corners = list(records)
        yield (
            keyed_corners[0][0],
            _item_block(keyed_corners[0][0], [corner for _, corner in keyed_corners], order),
        )

    return (
        users.mapPartitions(cut_into_corners)
        .partitionBy(order.n_blocks, partition_of_block)
        .mapPartitions(build, preservesPartitioning=True)
    )


def _gather(batches: Iterable[pa.RecordBatch]) -> Iterator[_Users]:
    """Put small batches together, until they have `_FLUSH` interactions."""
    gathered: list[_Users] = []
    for batch in batches:
        items, weights = batch.column("items"), batch.column("weights")
        gathered.append(
            _Users(
                batch.column("user").to_numpy(),
                items.value_lengths().to_numpy(),
                items.flatten().to_numpy(),
                weights.flatten().to_numpy(),
            )
        )
        if sum(len(part.items) for part in gathered) >= _FLUSH:
            yield _concatenate(gathered)
            gathered = []
    if gathered:
        yield _concatenate(gathered)


def _concatenate(parts: list[_Users]) -> _Users:
    return _Users(
        *(
            np.concatenate([getattr(part, name) for part in parts]).astype(dtype, copy=False)
            for name, dtype in _FIELDS.items()
        )
    )


def _unpack(row: Any) -> tuple[int, _Users]:
    return row["block"], _Users(
        *(np.frombuffer(row[name], dtype) for name, dtype in _FIELDS.items())
    )


def _pick(users: _Users, rows: Array) -> _Users:
    """Return some of the users, in the order of `rows`.

    `entries` are the indices of the chosen users' items. Example: users with 2, 3 and 1 items,
    `rows` [2, 0]. The chosen users' items begin at 5 and 0 in `users` and go to 0 and 1, so the
    shifts are 5 and -1, and `entries` is [5, 0, 1].
    """
    start = np.concatenate([[0], np.cumsum(users.lengths)])
    lengths = users.lengths[rows]
    shift = start[rows] - (np.cumsum(lengths) - lengths)
    entries = np.repeat(shift, lengths) + np.arange(lengths.sum())
    return _Users(users.users[rows], lengths, users.items[entries], users.weights[entries])


def _user_block(parts: list[_Users], order: Order) -> Block:
    users = _concatenate(parts)
    users = _pick(users, np.argsort(users.users, kind="stable"))
    repeats = np.flatnonzero(np.diff(users.users) == 0)
    if len(repeats):
        raise KeyViolationError(
            f"als: user {users.users[repeats[0]]} has more than one row of items; each user has one"
        )
    # The columns of the block are the positions of its users' items, each once, ascending.
    positions = order.position[users.items]
    columns = np.flatnonzero(np.bincount(positions, minlength=order.n_items)).astype(np.int32)
    column_of_position = np.zeros(order.n_items, np.int32)
    column_of_position[columns] = np.arange(len(columns))
    start = np.concatenate([[0], np.cumsum(users.lengths)])
    rows = sparse.csr_matrix(
        (users.weights, column_of_position[positions], start),
        shape=(len(users.users), len(columns)),
    )
    rows = rows.tocsc().tocsr()  # there and back, which sorts each row's columns
    return Block(
        users.users,
        rows.indptr.astype(np.int64),
        rows.indices.astype(np.int32),
        rows.data,
        np.searchsorted(columns, order.bounds),
        columns,
    )


def _corners(user_block: int, block: Block, order: Order) -> Iterator[_Corner]:
    """Yield, for each block of items in turn, the corner that it shares with this block of users.

    `block.routes()` lists the users that the block of items needs. In its corner a user is counted
    as the place in that list: with `sent_users` [3, 7], user row 7 becomes 1.
    """
    shape = (len(block.start) - 1, len(block.columns))
    by_item = sparse.csr_matrix((block.weight, block.indices, block.start), shape=shape).tocsc()
    index_in_sent = np.zeros(shape[0], np.int32)
    for item_block, sent_users in enumerate(block.routes()):
        index_in_sent[sent_users] = np.arange(len(sent_users))
        column_range = slice(block.bounds[item_block], block.bounds[item_block + 1])
        begin, end = by_item.indptr[column_range.start], by_item.indptr[column_range.stop]
        yield _Corner(
            user_block,
            block.columns[column_range] - np.int32(order.bounds[item_block]),
            np.diff(by_item.indptr[column_range.start : column_range.stop + 1]),
            index_in_sent[by_item.indices[begin:end]],
            by_item.data[begin:end],
            len(sent_users),
        )


def _item_block(block_index: int, corners: list[_Corner], order: Order) -> Block:
    """Return a block of items: its corners side by side, in the order of the blocks of users.

    The columns of the first corner come first, then those of the second, and so on: `bounds`. In
    every row, the entries of each corner go behind those of the corner before; `next_free` is where
    the next entry of each row goes.
    """
    corners = sorted(corners, key=lambda corner: corner.user_block)
    ids = np.arange(block_index, order.n_items, order.n_blocks, dtype=np.int64)
    lengths = np.zeros(len(ids), np.int64)
    for corner in corners:
        lengths[corner.rows] += corner.lengths
    start = np.concatenate([[0], np.cumsum(lengths)])
    bounds = np.concatenate([[0], np.cumsum([corner.n_sent for corner in corners])])
    indices, weight = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    next_free = start[:-1].copy()
    for corner, offset in zip(corners, bounds[:-1], strict=True):
        shift = next_free[corner.rows] - (np.cumsum(corner.lengths) - corner.lengths)
        entries = np.repeat(shift, corner.lengths) + np.arange(len(corner.indices))
        indices[entries], weight[entries] = corner.indices + np.int32(offset), corner.weight
        next_free[corner.rows] += corner.lengths
    return Block(ids, start, indices, weight, bounds, np.zeros(0, np.int32))
