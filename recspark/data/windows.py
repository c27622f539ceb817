"""Training sets: histories as fixed-length rows, spread by hash over files that ranks share out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features
from recspark.data.blocks import (
    Array,
    Histories,
    micros,
    parse_histories,
    weigh,
    weighed,
    where,
)
from recspark.data.interactions import before, interactions

FILES_PER_RANK = 10  # so that a tenth of every rank can be held out for validation
NO_ITEM = -1  # pads `items`
Unit = Literal["session", "history"]


def n_training_files(ranks: int) -> int:
    """Return how many files a training set gets: the same number for each rank.

    >>> n_training_files(2)
    20
    """
    return FILES_PER_RANK * ranks


def training_bags(
    histories: DataFrame, cutoff: datetime, features: Features, n_files: int
) -> DataFrame:
    """Return a row per user with the newest `features.max_training_items` distinct items.

    Parameters
    ----------
    histories : user_idx, history (newest last, may be null or empty)
    cutoff : events from it on are left out, and so are users without an earlier one; UTC
    features : `max_training_items` = L, and `half_life_days`: an event of age a days adds
        weight * 0.5^(a / half_life_days) to its item; None = its weight
    n_files : partitions of the result; `TableCatalog.replace_slice(..., n_files=n_files)` makes a
        file of each

    Returns
    -------
    `schema.TRAINING_BAGS`: `items` ascending, padded with -1 to L; `weights` beside them, padded
    with 0; `length` = items before the padding. Of items with the same newest event, the smaller
    item_idx stays; events that weigh null (no rating) are left out, and users with no other. Lazy.
    Cost: one shuffle, which spreads users by their hash, whatever the cluster's size: partitions
    differ by about sqrt(rows / n_files) rows.
    """
    as_of, length = micros(cutoff), features.max_training_items
    half_life = features.half_life_days

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = weighed(earlier(parse_histories(batch.column("history")), as_of))
            kept = np.diff(history.start) > 0
            items, weights, lengths = bags(history, as_of, half_life, length)
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(np.full(int(kept.sum()), as_of), pa.timestamp("us", "UTC")),
                    batch.column("user_idx").filter(pa.array(kept)),
                    fixed_lists(items[kept]),
                    fixed_lists(weights[kept]),
                    pa.array(lengths[kept], pa.int32()),
                ],
                names=schema.TRAINING_BAGS.names,
            )

    packed = histories.select("user_idx", "history").mapInArrow(pack, schema.TRAINING_BAGS)
    return spread(packed, F.xxhash64("user_idx"), n_files)


def bags(
    history: Histories, as_of: int, half_life_days: float | None, length: int
) -> tuple[Array, Array, Array]:
    """Return items int32 and weights float32, both (n, length), and lengths int32 (n,).

    See `training_bags`; the weights are those of `blocks.weigh` with `combine="sum"`, and none of
    `history` is NaN.
    """
    found, weight = weigh(history, as_of, half_life_days=half_life_days, combine="sum")
    row, item, last = found.rows, found.values, _newest(history)
    order = np.lexsort((item, -last, row))  # newest first in each row
    rank = np.arange(len(order)) - found.start[row[order]]
    chosen = np.sort(order[rank < length])  # back to ascending items
    row = row[chosen]
    n = len(history.start) - 1
    lengths = np.bincount(row, minlength=n)
    column = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    items = np.full((n, length), NO_ITEM, np.int32)
    weights = np.zeros((n, length), np.float32)
    items[row, column] = item[chosen]
    weights[row, column] = weight[chosen]
    return items, weights, lengths.astype(np.int32)


def training_sequences(
    histories: DataFrame, cutoff: datetime, features: Features, n_files: int, *, unit: Unit
) -> DataFrame:
    """Return windows of sessions, or of whole histories: a row each.

    Parameters
    ----------
    histories : user_idx, history (newest last, may be null or empty)
    cutoff : events from it on are left out; UTC
    features : `sequence_length` = L; of a user, only the newest `max_training_items` events count
    n_files : see `training_bags`
    unit : whose end ends a row: `session` or `history`

    Returns
    -------
    `schema.TRAINING_SEQUENCES`: `items` in time order, repeats kept, padded with -1 to L; `length`
    = items before the padding, at least 2; `position` = place of the first one in the user's
    history, from 0. A longer sequence is cut from its end into windows of L that share one item, so
    that every step from an item to the next is in exactly one row. Lazy. Cost: one shuffle, which
    spreads rows by the hash of user and position.
    """
    as_of, length, newest = micros(cutoff), features.sequence_length, features.max_training_items

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = earlier(parse_histories(batch.column("history")), as_of)
            row, position, items, lengths = sequences(history, unit, length, newest)
            yield pa.RecordBatch.from_arrays(
                window_columns(batch, as_of, row, position, items, lengths),
                names=schema.TRAINING_SEQUENCES.names,
            )

    packed = histories.select("user_idx", "history").mapInArrow(pack, schema.TRAINING_SEQUENCES)
    return spread(packed, F.xxhash64("user_idx", "position"), n_files)


def window_columns(
    batch: pa.RecordBatch, as_of: int, row: Array, position: Array, items: Array, lengths: Array
) -> list[pa.Array]:
    """Return the columns of `schema.TRAINING_SEQUENCES` for what `sequences` found in `batch`."""
    return [
        pa.array(np.full(len(row), as_of), pa.timestamp("us", "UTC")),
        batch.column("user_idx").take(pa.array(row)),
        pa.array(position, pa.int32()),
        fixed_lists(items),
        pa.array(lengths, pa.int32()),
    ]


def sequences(
    history: Histories, unit: Unit, length: int, newest: int, shortest: int = 2
) -> tuple[Array, Array, Array, Array]:
    """Return row int64 (n,), position int32 (n,), items int32 (n, length) and lengths int32 (n,).

    See `training_sequences`; by row, then the sequence in it, then the window, newest first. A
    sequence of fewer than `shortest` items has none.
    """
    first, last = history.start[:-1], history.start[1:]
    capped = np.maximum(first, last - newest)  # where the events of a row that count begin
    starts = history.session_starts
    if unit == "history":
        starts = np.zeros_like(starts)
    starts[capped[last > first]] = True
    rows = history.rows
    begin = np.flatnonzero(starts)
    end = np.append(begin[1:], len(starts))
    row = rows[begin]
    end = np.minimum(end, last[row])
    kept = (begin >= capped[row]) & (end - begin >= shortest)
    begin, end, row = begin[kept], end[kept], row[kept]
    n_steps = np.maximum(end - begin - 1, 1)
    n_windows = -(-n_steps // (length - 1))  # each takes length - 1 steps
    sequence = np.repeat(np.arange(len(begin)), n_windows)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    to = end[sequence] - number * (length - 1)
    since = np.maximum(begin[sequence], to - length)
    at = since[:, None] + np.arange(length)
    inside = at < to[:, None]
    items = np.full(at.shape, NO_ITEM, np.int32)
    items[inside] = history.item_idx[at[inside]]
    row = row[sequence]
    return row, (since - first[row]).astype(np.int32), items, (to - since).astype(np.int32)


def training_item_bags(
    histories: DataFrame, cutoff: datetime, features: Features, n_files: int
) -> DataFrame:
    """Return a row per item with its newest `features.max_training_users` users: bags on their side.

    `schema.TRAINING_ITEM_BAGS`: `users` ascending, padded with -1; `weights` beside them as in
    `interactions`, those above 0 (of ratings all), padded with 0. Of users with the same newest event the smaller
    user_idx stays. Arguments as in `training_bags`. Lazy. Cost: two shuffles; each task of the first
    sends on `max_training_users` users of an item at most, however many have it.
    """
    longest = features.max_training_users
    earlier_ones = before(histories, cutoff, ratings=features.explicit)
    pairs = interactions(earlier_ones, cutoff, features.half_life_days)
    newest_first = Window.partitionBy("item_idx").orderBy(F.desc("last_event_at"), "user_idx")
    newest = (
        pairs.where(F.lit(features.explicit) | (F.col("weight") > 0))
        .withColumn("place", F.row_number().over(newest_first))
        .where(F.col("place") <= longest)
    )
    bag = F.sort_array(F.collect_list(F.struct("user_idx", "weight"))).alias("bag")
    made = newest.groupBy("item_idx").agg(bag)
    made = made.select(
        F.lit(cutoff).alias("cutoff"),
        "item_idx",
        padded(F.col("bag.user_idx"), longest, F.lit(-1).cast("long")).alias("users"),
        padded(F.col("bag.weight"), longest, F.lit(0.0).cast("float")).alias("weights"),
        F.size("bag").alias("length"),
    )
    return spread(made, F.xxhash64("item_idx"), n_files)


def padded(values: Column, length: int, fill: Column) -> Column:
    """Return the array `values` with `fill`, of its elements' type, behind it up to `length`."""
    return F.concat(values, F.array_repeat(fill, F.lit(length) - F.size(values)))


def spread(rows: DataFrame, hashed: Column, n_files: int) -> DataFrame:
    """Return `rows` in `n_files` partitions of about equal size, by `hashed`, a 64-bit hash."""
    return rows.repartition(n_files, _partition_key(hashed, n_files))


# What each training table is made by: (histories, cutoff, features, n_files) -> rows.
TRAINING_TABLES: dict[str, Callable[[DataFrame, datetime, Features, int], DataFrame]] = {
    "training_bags": training_bags,
    "training_item_bags": training_item_bags,
    "training_sessions": partial(training_sequences, unit="session"),
    "training_histories": partial(training_sequences, unit="history"),
}


def earlier(history: Histories, as_of: int) -> Histories:
    """Return `history` without events at or after `as_of`."""
    return where(history, history.event_at < as_of)


def _newest(history: Histories) -> Array:
    """Return the time of the newest event of each (row, item), in the order of `blocks.weigh`."""
    rows = history.rows
    order = np.lexsort((history.item_idx, rows))
    row, item, at = rows[order], history.item_idx[order], history.event_at[order]
    first = np.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    return np.maximum.reduceat(at, np.flatnonzero(first)) if len(at) else at


def fixed_lists(values: Array) -> pa.ListArray:
    """Return the rows of `values` (n, length) as lists."""
    n, length = values.shape
    start = np.arange(n + 1, dtype=np.int32) * length
    return pa.ListArray.from_arrays(pa.array(start), pa.array(values.ravel()))


def _partition_key(hashed: Column, n: int) -> Column:
    """Return a column that `repartition(n, column)` sends to partition `floor(hashed / 2^64 * n)`.

    Spark puts a row into partition pmod(murmur3(column), n), so equal shares need, for each
    partition, a number that falls there: n different values would leave some partitions empty.
    """
    keys: dict[int, int] = {}
    candidate = 0
    while len(keys) < n:
        keys.setdefault(_murmur3(candidate) % n, candidate)
        candidate += 1
    # 2^20 equal ranges of the hash: the share of a partition is exact to a millionth.
    position = F.shiftrightunsigned(hashed, 44)
    target = F.floor(position * F.lit(n) / F.lit(float(1 << 20))).cast("int")
    return F.element_at(F.array(*[F.lit(keys[i]) for i in range(n)]), target + 1)


def _murmur3(value: int) -> int:
    """Return Spark's hash of an int >= 0 (Murmur3 x86 32-bit, seed 42), as signed int32.

    >>> _murmur3(0), _murmur3(1)
    (933211791, -559580957)
    """
    mask = 0xFFFFFFFF

    def rotated(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & mask

    block = rotated(value * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
    out = (rotated(42 ^ block, 13) * 5 + 0xE6546B64) & mask
    out ^= 4
    out = (out ^ (out >> 16)) * 0x85EBCA6B & mask
    out = (out ^ (out >> 13)) * 0xC2B2AE35 & mask
    out ^= out >> 16
    return out - (1 << 32) if out >> 31 else out
