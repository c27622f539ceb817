"""Training sets: histories as rows of fixed length, spread by a hash over files.

The ranks of a training share the files among them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from typing import Any, Literal

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
    weighted_events,
    where,
)
from recspark.data.interactions import before, interactions

FILES_PER_RANK = 10  # so that a tenth of every rank can be held out for validation
NO_ITEM = -1  # pads `items`
SPARK_HASH_SEED = 42  # seed of the hash by which Spark assigns rows to partitions
Unit = Literal["session", "history"]


def n_training_files(ranks: int) -> int:
    """Return the number of files of a training set: the same number for each rank.

    >>> n_training_files(2)
    20
    """
    return FILES_PER_RANK * ranks


def training_bags(
    histories: DataFrame, cutoff: datetime, features: Features, n_files: int
) -> DataFrame:
    """Return a row per user with the user's newest `features.max_training_items` distinct items.

    Parameters
    ----------
    histories : user_idx, history (newest last, may be null or empty)
    cutoff : events at or after this time are left out, and so are users without an earlier event;
        UTC
    features : `max_training_items` = L, and `half_life_days`: an event that is a days old adds
        weight * 0.5^(a / half_life_days) to the weight of its item; None = it adds its weight
    n_files : partitions of the result; `TableCatalog.replace_slice(..., n_files=n_files)` writes
        each as one file

    Returns
    -------
    `schema.TRAINING_BAGS`: `items` ascending, padded with -1 to L; `weights` beside them, padded
    with 0; `length` = number of items before the padding. Where two items have their newest event
    at the same time, the smaller item_idx is taken first. Events whose weight is null (no rating)
    are left out, and so are users who have no other events.

    Lazy. Cost: one shuffle, which spreads users by their hash. The partitions differ by about
    sqrt(rows / n_files) rows and do not depend on the size of the cluster.
    """
    as_of, length = micros(cutoff), features.max_training_items
    half_life = features.half_life_days

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = weighted_events(earlier(parse_histories(batch.column("history")), as_of))
            has_events = np.diff(history.start) > 0
            items, weights, lengths = bags(history, as_of, half_life, length)
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(np.full(int(has_events.sum()), as_of), pa.timestamp("us", "UTC")),
                    batch.column("user_idx").filter(pa.array(has_events)),
                    fixed_lists(items[has_events]),
                    fixed_lists(weights[has_events]),
                    pa.array(lengths[has_events], pa.int32()),
                ],
                names=schema.TRAINING_BAGS.names,
            )

    packed = histories.select("user_idx", "history").mapInArrow(pack, schema.TRAINING_BAGS)
    return spread(packed, F.xxhash64("user_idx"), n_files)


def bags(
    history: Histories, as_of: int, half_life_days: float | None, length: int
) -> tuple[Array, Array, Array]:
    """Return items int32 and weights float32, both (n, length), and lengths int32 (n,).

    See `training_bags`. The weights are those of `blocks.weigh` with `combine="sum"`. No weight in
    `history` may be NaN.
    """
    pairs, weight = weigh(history, as_of, half_life_days=half_life_days, combine="sum")
    row, item, newest_event_at = pairs.rows, pairs.values, _newest_event_at(history)
    newest_first = np.lexsort((item, -newest_event_at, row))  # within each row
    rank = np.arange(len(newest_first)) - pairs.start[row[newest_first]]
    kept_pairs = np.sort(newest_first[rank < length])  # back to ascending items
    row = row[kept_pairs]
    n_rows = len(history.start) - 1
    lengths = np.bincount(row, minlength=n_rows)
    column = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    items = np.full((n_rows, length), NO_ITEM, np.int32)
    weights = np.zeros((n_rows, length), np.float32)
    items[row, column] = item[kept_pairs]
    weights[row, column] = weight[kept_pairs]
    return items, weights, lengths.astype(np.int32)


def training_sequences(
    histories: DataFrame, cutoff: datetime, features: Features, n_files: int, *, unit: Unit
) -> DataFrame:
    """Return the windows of sessions or of complete histories, one row per window.

    Parameters
    ----------
    histories : user_idx, history (newest last, may be null or empty)
    cutoff : events at or after this time are left out; UTC
    features : `sequence_length` = L; of each user, only the newest `max_training_items` events
        count
    n_files : see `training_bags`
    unit : what is cut into windows: each `session`, or each complete `history`

    Returns
    -------
    `schema.TRAINING_SEQUENCES`: `items` in time order, repeats kept, padded with -1 to L; `length`
    = number of items before the padding, at least 2; `position` = position of the first item in
    the user's history, from 0. A sequence of more than L items is cut from its end into windows of
    L that share one item, so that every step from an item to the next is in exactly one row. Lazy.
    Cost: one shuffle, which spreads rows by the hash of user and position.
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
    """Return the columns of `schema.TRAINING_SEQUENCES` for the windows of `sequences`."""
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

    See `training_sequences` for what a window is. Windows are ordered by row, then by sequence
    within the row, and the newest window of a sequence comes first. A sequence of fewer than
    `shortest` items gives no window.

    Example with `length` 3: the sequence a b c d e is cut from its end into c d e and a b c, which
    share the item c, so that each of the four steps a-b, b-c, c-d, d-e is in exactly one window.
    """
    row_begin, row_end = history.start[:-1], history.start[1:]
    newest_begin = np.maximum(row_begin, row_end - newest)  # first event of a row that counts
    is_start = history.session_starts
    if unit == "history":
        is_start = np.zeros_like(is_start)
    is_start[newest_begin[row_end > row_begin]] = True
    # Sequences: `begin` and `end` are positions in the events of all rows.
    begin = np.flatnonzero(is_start)
    end = np.append(begin[1:], len(is_start))
    row = history.rows[begin]
    end = np.minimum(end, row_end[row])
    is_long_enough = (begin >= newest_begin[row]) & (end - begin >= shortest)
    begin, end, row = begin[is_long_enough], end[is_long_enough], row[is_long_enough]
    # Windows: each takes length - 1 steps from an item to the next.
    n_steps = np.maximum(end - begin - 1, 1)
    n_windows = -(-n_steps // (length - 1))
    sequence = np.repeat(np.arange(len(begin)), n_windows)
    first_window = np.cumsum(n_windows) - n_windows  # number of the first window of each sequence
    window = np.arange(len(sequence)) - first_window[sequence]  # 0 is the newest of its sequence
    window_end = end[sequence] - window * (length - 1)
    window_begin = np.maximum(begin[sequence], window_end - length)
    position = window_begin[:, None] + np.arange(length)  # (n, length), in the events of all rows
    is_inside = position < window_end[:, None]
    items = np.full(position.shape, NO_ITEM, np.int32)
    items[is_inside] = history.item_idx[position[is_inside]]
    row = row[sequence]
    position_in_row = (window_begin - row_begin[row]).astype(np.int32)
    return row, position_in_row, items, (window_end - window_begin).astype(np.int32)


def training_events(
    histories: DataFrame, cutoff: datetime, _features: Features, n_files: int
) -> DataFrame:
    """Return a row per event before the cutoff: `schema.TRAINING_EVENTS`.

    The arguments are those of `training_bags`. All events are there, also those of users with more
    than `max_training_items`: whoever carries states on must see the same events every night. Who
    reads the rows sorts them by time: a file is a hash sample of the events. Lazy. Cost: one
    shuffle, which spreads rows by the hash of user and position.
    """
    as_of = micros(cutoff)

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = earlier(parse_histories(batch.column("history")), as_of)
            row = history.rows
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(np.full(len(row), as_of), pa.timestamp("us", "UTC")),
                    batch.column("user_idx").take(pa.array(row)),
                    pa.array(np.arange(len(row)) - history.start[row], pa.int32()),
                    pa.array(history.item_idx, pa.int32()),
                    pa.array(history.event_at, pa.int64()),
                ],
                names=schema.TRAINING_EVENTS.names,
            )

    packed = histories.select("user_idx", "history").mapInArrow(pack, schema.TRAINING_EVENTS)
    return spread(packed, F.xxhash64("user_idx", "position"), n_files)


def training_timelines(
    histories: DataFrame,
    cutoff: datetime,
    features: Features,
    n_files: int,
    *,
    typed: bool = False,
) -> DataFrame:
    """Return a row per user: the user's newest `features.max_training_items` events and their ages.

    The arguments are those of `training_bags`. The result has `schema.TRAINING_TIMELINES`: `items`
    in time order, repeats kept, padded with -1; `ages` beside them, see `seconds_before`, padded
    with 0; `length` = number of items before the padding, at least 2. Users with one event are left
    out: nothing comes after it. If `typed`, the result has `schema.TRAINING_TYPED_TIMELINES`, with
    the event types beside the items too, see `type_codes`. Lazy. Cost: one shuffle, which spreads
    users by their hash.
    """
    as_of, length = micros(cutoff), features.max_training_items
    row_schema = schema.TRAINING_TYPED_TIMELINES if typed else schema.TRAINING_TIMELINES

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = earlier(parse_histories(batch.column("history")), as_of)
            row, items, ages, lengths = timelines(history, as_of, length)
            types = [fixed_lists(newest_types(history, row, lengths, length))] if typed else []
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(np.full(len(row), as_of), pa.timestamp("us", "UTC")),
                    batch.column("user_idx").take(pa.array(row)),
                    fixed_lists(items),
                    fixed_lists(ages),
                    *types,
                    pa.array(lengths, pa.int32()),
                ],
                names=row_schema.names,
            )

    packed = histories.select("user_idx", "history").mapInArrow(pack, row_schema)
    return spread(packed, F.xxhash64("user_idx"), n_files)


def timelines(history: Histories, as_of: int, length: int) -> tuple[Array, Array, Array, Array]:
    """Return row int64 (n,), items and ages int32 (n, length), and lengths int32 (n,).

    See `training_timelines`. `as_of` is the cutoff, in microseconds since 1970 UTC.

    Example with `length` 3: a row with the items a, b, c, d, which are 9, 5, 5 and 2 seconds old,
    gives the items b, c, d and the ages 5, 5, 2.
    """
    row, _, items, lengths = sequences(history, "history", length, length)
    is_item = np.arange(length) < lengths[:, None]  # (n, length)
    event = history.start[1:][row, None] - lengths[:, None] + np.arange(length)  # (n, length)
    ages = np.zeros(items.shape, np.int32)
    ages[is_item] = seconds_before(history.event_at[event[is_item]], as_of)
    return row, items, ages, lengths


def newest_types(history: Histories, row: Array, lengths: Array, length: int) -> Array:
    """Return the codes of the types of the events in the rows of `timelines`, int32 (n, length).

    `row` and `lengths` are those that `timelines` returned. Padded with 0; see `type_codes`.
    """
    is_event = np.arange(length) < lengths[:, None]  # (n, length)
    event = history.start[1:][row, None] - lengths[:, None] + np.arange(length)  # (n, length)
    types = np.zeros(is_event.shape, np.int32)
    types[is_event] = type_codes(history.event_type)[event[is_event]]
    return types


def type_codes(event_types: pa.Array) -> Array:
    """Return a number for each event type, int32 (n_events,): a hash of its name. Null has 0.

    A hash needs no vocabulary, so rows of all nights, and queries, have the same codes.

    >>> codes = type_codes(pa.array(["click", None, "click", "purchase"]))
    >>> codes[0] == codes[2] == type_code("click"), codes[1] == 0, codes[0] == codes[3]
    (True, True, False)
    """
    coded = event_types.dictionary_encode()
    names = coded.dictionary.to_pylist()
    of_name = np.array([*map(type_code, names), 0], np.int32)
    return of_name[coded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]


def type_code(event_type: str) -> int:
    """Return the code of an event type, 0 <= code < 2^31; see `type_codes`."""
    return zlib.crc32(event_type.encode()) >> 1


def seconds_before(event_at: Array, as_of: int) -> Array:
    """Return how many whole seconds each event lies before `as_of`, int32 (n_events,), at least 0.

    Both times are in microseconds since 1970 UTC. More than 68 years count as 68 years.

    >>> seconds_before(np.array([0, 1_500_000]), 2_000_000)
    array([2, 0], dtype=int32)
    """
    seconds = (as_of - event_at) // 1_000_000
    return np.clip(seconds, 0, np.iinfo(np.int32).max).astype(np.int32)


def training_item_bags(
    histories: DataFrame, cutoff: datetime, features: Features, n_files: int
) -> DataFrame:
    """Return a row per item with its newest `features.max_training_users` users.

    This is `training_bags` with users and items exchanged; the arguments are the same. The result
    has `schema.TRAINING_ITEM_BAGS`: `users` ascending, padded with -1, and beside them `weights` as
    in `interactions`, padded with 0. Pairs that weigh 0 are left out, unless the weights are
    ratings. Where two users have their newest event at the same time, the smaller user_idx is taken
    first.

    Lazy. Cost: two shuffles. Each task before the first shuffle sends at most `max_training_users`
    users per item, however many users have the item.
    """
    longest = features.max_training_users
    events = before(histories, cutoff, ratings=features.explicit)
    pairs = interactions(events, cutoff, features.half_life_days)
    newest_first = Window.partitionBy("item_idx").orderBy(F.desc("last_event_at"), "user_idx")
    newest_pairs = (
        pairs.where(F.lit(features.explicit) | (F.col("weight") > 0))
        .withColumn("rank", F.row_number().over(newest_first))
        .where(F.col("rank") <= longest)
    )
    bag = F.sort_array(F.collect_list(F.struct("user_idx", "weight"))).alias("bag")
    item_bags = newest_pairs.groupBy("item_idx").agg(bag)
    item_bags = item_bags.select(
        F.lit(cutoff).alias("cutoff"),
        "item_idx",
        padded(F.col("bag.user_idx"), longest, F.lit(-1).cast("long")).alias("users"),
        padded(F.col("bag.weight"), longest, F.lit(0.0).cast("float")).alias("weights"),
        F.size("bag").alias("length"),
    )
    return spread(item_bags, F.xxhash64("item_idx"), n_files)


def padded(values: Column, length: int, fill: Column) -> Column:
    """Return the array column `values`, filled up to `length` with `fill`.

    `fill` is a column of the type of the elements.
    """
    return F.concat(values, F.array_repeat(fill, F.lit(length) - F.size(values)))


def spread(rows: DataFrame, hashed: Column, n_files: int) -> DataFrame:
    """Return `rows` in `n_files` partitions of about equal size.

    `hashed` is a column with a 64-bit hash, which decides the partition of a row.
    """
    return rows.repartition(n_files, _partition_key(rows, hashed, n_files))


# The function that makes each training table: (histories, cutoff, features, n_files) -> rows.
TRAINING_TABLES: dict[str, Callable[[DataFrame, datetime, Features, int], DataFrame]] = {
    "training_bags": training_bags,
    "training_item_bags": training_item_bags,
    "training_events": training_events,
    "training_sessions": partial(training_sequences, unit="session"),
    "training_histories": partial(training_sequences, unit="history"),
    "training_timelines": training_timelines,
    "training_typed_timelines": partial(training_timelines, typed=True),
}


def earlier(history: Histories, as_of: int) -> Histories:
    """Return `history` without events at or after `as_of`."""
    return where(history, history.event_at < as_of)


def _newest_event_at(history: Histories) -> Array:
    """Return the time of the newest event of each (row, item), in the order of `blocks.weigh`."""
    rows = history.rows
    order = np.lexsort((history.item_idx, rows))
    row, item, event_at = rows[order], history.item_idx[order], history.event_at[order]
    if not len(event_at):
        return event_at
    is_first = np.ones(len(row), bool)  # the first event of its (row, item)
    is_first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    return np.maximum.reduceat(event_at, np.flatnonzero(is_first))


def fixed_lists(values: Array) -> pa.ListArray:
    """Return the rows of `values` (n, length) as an Arrow array of n lists."""
    n, length = values.shape
    start = np.arange(n + 1, dtype=np.int32) * length
    return pa.ListArray.from_arrays(pa.array(start), pa.array(values.ravel()))


def _partition_key(rows: DataFrame, hashed: Column, n_files: int) -> Column:
    """Return a column that `rows.repartition(n, column)` sends to floor(hashed / 2^64 * n).

    Spark puts a row into partition pmod(murmur3(column), n). To send a row to a chosen partition,
    the column must therefore hold an integer whose murmur3 falls into that partition. For each
    partition one such integer is found, `integers[partition]`, by asking Spark for the hashes of 0,
    1, 2, ... (about n ln n of them, 0.2 ms each).
    """
    jvm: Any = rows.sparkSession.sparkContext._jvm
    murmur3 = jvm.org.apache.spark.unsafe.hash.Murmur3_x86_32(SPARK_HASH_SEED)
    integers: dict[int, int] = {}
    candidate = 0
    while len(integers) < n_files:
        integers.setdefault(murmur3.hashInt(candidate) % n_files, candidate)
        candidate += 1
    # The hash falls into one of 2^20 equal ranges, so the share of a partition is exact to a
    # millionth.
    hash_range = F.shiftrightunsigned(hashed, 44)
    partition = F.floor(hash_range * F.lit(n_files) / F.lit(float(1 << 20))).cast("int")
    return F.element_at(F.array(*[F.lit(integers[i]) for i in range(n_files)]), partition + 1)
