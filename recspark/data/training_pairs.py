"""Pairs of items that many users have both, and pairs like them that few have, as training files.

The two items of a negative pair are as popular as those of the positive pair that it is drawn for.
Else a model would learn which items are popular, and its error would measure that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy import sparse

from recspark import schema, storage
from recspark.data.blocks import (
    Array,
    Histories,
    local_index,
    parse_histories,
    weighted_events,
    where,
)
from recspark.data.dataset import TrainingSet
from recspark.data.training_rows import spread
from recspark.errors import EmptyDataError

TABLE = "training_pairs"
COLUMNS = ("item_a", "item_b", "label", "held_out")
A_IS_HELD_OUT, B_IS_HELD_OUT = 1, 2  # bits of the column `held_out`

_PAIRS = schema.columns(item_a=schema.INT, item_b=schema.INT, n_users=schema.LONG)
_ROWS = schema.columns(
    item_a=schema.INT, item_b=schema.INT, label=schema.FLOAT, held_out=schema.INT
)
_PAIRS_AT_ONCE = 1 << 22  # pairs of items of users that one product counts
_EVERYBODY = -1  # the "pair" of this number with itself counts the users


@dataclass(frozen=True)
class PairRules:
    """Which pairs are positive, and how the negative ones are drawn.

    Parameters
    ----------
    min_users : users who have both items of a positive pair, at least
    min_lift : how many times as many users as by chance have both items, at least: n_ab n / (n_a n_b)
    max_history : the newest events of a user that count
    n_negatives : negative pairs drawn for each positive one; those that are positive are left out
    n_matched : the item that takes the place of one is drawn among this many others whose numbers of
        users are nearest to its own
    validation : share of the items that is held out; the pairs of such an item are no training rows
    seed : of the draws
    """

    min_users: int
    min_lift: float
    max_history: int
    n_negatives: int
    n_matched: int
    validation: float
    seed: int


@dataclass(frozen=True)
class TrainingPairs:
    """The files of the training rows, and of the rows with a held-out item; None = there are none.

    A row has `item_a` < `item_b` (item_idx), `label` (1 = positive) and `held_out`: the sum of
    `A_IS_HELD_OUT` and `B_IS_HELD_OUT`. `n_positive` counts the positive pairs, held out or not.
    """

    training: TrainingSet
    held_out: TrainingSet | None
    n_positive: int


def write_training_pairs(
    histories: DataFrame, items: Array, rules: PairRules, folder: str, n_files: int
) -> TrainingPairs:
    """Write the training rows of `items`, and return the files.

    Parameters
    ----------
    histories : user_idx, history (newest last, before the cutoff)
    items : item_idx int32 (n_items,), ascending; pairs with other items are left out
    folder : URI of the folder of the files; one that is complete is used as it is

    Rows lie in the file that a hash of the pair gives, sorted, so neither the files nor their order
    depend on how `histories` is partitioned. Raises EmptyDataError where no pair is positive, or no
    training row negative.

    Cost: two jobs over the histories with one shuffle of the pairs of items that a user has both
    (max_history^2 / 2 for each user at most, added up before it by each task); then one anti join and
    one shuffle of n_negatives + 1 rows for each positive pair. The driver holds a number per item.
    """
    positive_folder = storage.join(folder, "positive")
    if not storage.is_complete(folder):
        storage.remove(folder)
        spark = histories.sparkSession
        counts = pair_counts(histories, items, rules.max_history).persist()
        try:
            n_users = counts.where("item_a = item_b").toArrow()
            _positive_pairs(counts, n_users, items, rules).write.parquet(
                storage.for_spark(positive_folder)
            )
        finally:
            counts.unpersist()
        positive = spark.read.schema(_PAIRS).parquet(storage.for_spark(positive_folder))
        users_of_item = _users_of_items(n_users, items)
        held_out = _held_out(len(items), rules)
        rows = _with_negatives(positive, items, users_of_item, held_out, rules)
        in_order = spread(rows, F.xxhash64("item_a", "item_b"), n_files).sortWithinPartitions(
            *COLUMNS
        )
        for name, part in (("training", "held_out = 0"), ("held_out", "held_out > 0")):
            if name == "training" or held_out.any():
                in_order.where(part).write.parquet(storage.for_spark(storage.join(folder, name)))
        storage.mark_complete(folder)
    n_positive = _files(positive_folder).n_rows
    if n_positive == 0:
        raise EmptyDataError(
            f"no two items have {rules.min_users} users or more in common, and {rules.min_lift} times "
            "as many as by chance; lower min_users or min_lift, or wait for more events"
        )
    training, held = (_files(storage.join(folder, name)) for name in ("training", "held_out"))
    if training.n_rows == 0:
        raise EmptyDataError(
            f"all {n_positive:,} positive pairs have a held-out item; lower validation"
        )
    return TrainingPairs(training, held if held.n_rows else None, n_positive)


def _files(folder: str) -> TrainingSet:
    uris = [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]
    return TrainingSet.of_files(TABLE, 0, uris)


def pair_counts(histories: DataFrame, items: Array, max_history: int) -> DataFrame:
    """Return `item_a, item_b, n_users`: how many users have both items, item_a <= item_b.

    item_a = item_b counts the users of an item, and -1 those of any. An event of weight 0 or less
    does not count. Lazy; one shuffle of the pairs of each task.
    """
    shared = histories.sparkSession.sparkContext.broadcast(items)

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = weighted_events(parse_histories(batch.column("history")))
            for rows in _slices(_newest(history, max_history), shared.value):
                yield _counted(rows, shared.value)

    return (
        histories.select("history")
        .mapInArrow(count, _PAIRS)
        .groupBy("item_a", "item_b")
        .agg(F.sum("n_users").alias("n_users"))
    )


def _newest(history: Histories, n: int) -> Histories:
    """Return the newest n events of each row that weigh more than 0."""
    history = where(history, history.weight > 0)
    ends = np.repeat(history.start[1:], np.diff(history.start))
    return where(history, np.arange(len(history.item_idx)) >= ends - n)


def _slices(history: Histories, items: Array) -> Iterator[sparse.csr_matrix]:
    """Yield the items of the rows, 1 for each, (rows, n_items); `_PAIRS_AT_ONCE` pairs at a time."""
    local = local_index(items, history.item_idx)
    is_known = local >= 0
    row = history.rows[is_known]
    users = sparse.csr_matrix(
        (np.ones(len(row), np.int64), (row, local[is_known])),
        shape=(len(history.start) - 1, len(items)),
    )
    users.data[:] = 1  # an item with several events counts once
    n_pairs = np.cumsum(np.diff(users.indptr).astype(np.int64) ** 2)
    begin = 0
    while begin < users.shape[0]:
        before = n_pairs[begin - 1] if begin else 0
        end = int(np.searchsorted(n_pairs, before + _PAIRS_AT_ONCE, side="right"))
        end = max(end, begin + 1)
        yield users[begin:end]
        begin = end


def _counted(users: sparse.csr_matrix, items: Array) -> pa.RecordBatch:
    together = sparse.triu(users.T @ users).tocoo()
    n_users = int((np.diff(users.indptr) > 0).sum())
    columns = (
        np.append(items[together.row], _EVERYBODY),
        np.append(items[together.col], _EVERYBODY),
        np.append(together.data, n_users),
    )
    return pa.RecordBatch.from_arrays(
        [
            pa.array(values, t)
            for values, t in zip(columns, (pa.int32(), pa.int32(), pa.int64()), strict=True)
        ],
        names=_PAIRS.names,
    )


def _users_of_items(n_users: pa.Table, items: Array) -> Array:
    """Return the number of users of each item, int64 (n_items + 1,), that of all users last."""
    users = np.zeros(len(items) + 1, np.int64)
    local = local_index(items, n_users.column("item_a").to_numpy())
    users[local] = n_users.column("n_users").to_numpy()  # local -1, everybody, is the last place
    return users


def _positive_pairs(
    counts: DataFrame, n_users: pa.Table, items: Array, rules: PairRules
) -> DataFrame:
    """Return the rows of `counts` that are positive pairs. Lazy and narrow."""
    shared = counts.sparkSession.sparkContext.broadcast((items, _users_of_items(n_users, items)))

    def keep(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        known_items, users = shared.value
        for batch in batches:
            a, b = (
                users[local_index(known_items, batch.column(name).to_numpy())].astype(np.float64)
                for name in ("item_a", "item_b")
            )
            lift = batch.column("n_users").to_numpy() * float(users[-1]) / (a * b)
            yield batch.filter(pa.array(lift >= rules.min_lift))

    is_pair = (F.col("item_a") < F.col("item_b")) & (F.col("n_users") >= rules.min_users)
    return counts.where(is_pair).mapInArrow(keep, _PAIRS)


def _held_out(n_items: int, rules: PairRules) -> Array:
    """Return whether each item is held out, bool (n_items,)."""
    return np.random.default_rng([rules.seed, 1]).random(n_items) < rules.validation


def _with_negatives(
    positive: DataFrame, items: Array, users_of_item: Array, held_out: Array, rules: PairRules
) -> DataFrame:
    """Return the positive pairs and the negative pairs drawn for them: `_ROWS`. Lazy."""
    by_popularity = in_order_of_popularity(users_of_item[:-1], rules.seed)
    shared = positive.sparkSession.sparkContext.broadcast((items, by_popularity, held_out))

    def label(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        known_items, order, is_held_out = shared.value
        for batch in batches:
            a, b = (local_index(known_items, batch.column(n).to_numpy()) for n in _PAIRS.names[:2])
            drawn_a, drawn_b = drawn_pairs(
                a, b, batch.column("key").to_numpy(), order, rules.n_negatives, rules.n_matched
            )
            labels = np.append(np.ones(len(a), np.float32), np.zeros(len(drawn_a), np.float32))
            a, b = np.append(a, drawn_a), np.append(b, drawn_b)
            bits = A_IS_HELD_OUT * is_held_out[a] + B_IS_HELD_OUT * is_held_out[b]
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(known_items[a], pa.int32()),
                    pa.array(known_items[b], pa.int32()),
                    pa.array(labels),
                    pa.array(bits, pa.int32()),
                ],
                names=_ROWS.names,
            )

    key = F.xxhash64("item_a", "item_b", F.lit(rules.seed)).alias("key")
    rows = positive.select("item_a", "item_b", key).mapInArrow(label, _ROWS)
    negative = rows.where("label = 0").join(
        positive.select("item_a", "item_b"), on=["item_a", "item_b"], how="left_anti"
    )
    return rows.where("label = 1").unionByName(negative.select(*_ROWS.names))


def in_order_of_popularity(users_of_item: Array, seed: int) -> Array:
    """Return the items from the least to the most popular, int64 (n_items,).

    Items with equally many users come in a random order: neighbours in the order then have nothing
    in common but their popularity.
    """
    ties = np.random.default_rng([seed, 2]).permutation(len(users_of_item))
    return np.lexsort((ties, users_of_item))


def drawn_pairs(
    a: Array, b: Array, key: Array, by_popularity: Array, n_negatives: int, n_matched: int
) -> tuple[Array, Array]:
    """Return `n_negatives` pairs for each pair (a, b), as (smaller item, larger item).

    One of the two items, drawn by a coin, stays; one of the `n_matched` items that are nearest to
    the other one in `by_popularity` takes its place. Pairs of an item with itself are left out.

    Parameters
    ----------
    a, b : local items of each pair, int (p,)
    key : a random int64 of each pair, which decides its draws
    by_popularity : the local items in order, int (n_items,)
    """
    random = _mixed(np.repeat(key.astype(np.uint64), n_negatives), n_negatives)
    stays, goes = np.repeat(a, n_negatives), np.repeat(b, n_negatives)
    is_swapped = (random & np.uint64(1)).astype(bool)
    stays, goes = np.where(is_swapped, goes, stays), np.where(is_swapped, stays, goes)
    other = as_popular(goes, random >> np.uint64(1), by_popularity, n_matched)
    is_pair = other != stays
    stays, other = stays[is_pair], other[is_pair]
    return np.minimum(stays, other), np.maximum(stays, other)


def as_popular(items: Array, random: Array, by_popularity: Array, n_matched: int) -> Array:
    """Return for each local item another one that is about as popular; `random` uint64 (p,) decides.

    It is one of the `n_matched` items that are nearest to it in `by_popularity`; near an end, more
    of them lie to one side.

    Example: the order [4, 1, 0, 3, 2] and n_matched = 2 give item 1 the others 4 and 0, and item 4,
    at the end, 1 and 0.
    """
    n_items = len(by_popularity)
    place = np.empty(n_items, np.int64)
    place[by_popularity] = np.arange(n_items)
    n_others = min(n_matched, n_items - 1)
    first = np.clip(place[items] - n_others // 2, 0, n_items - 1 - n_others)
    drawn = first + (random % np.uint64(max(n_others, 1))).astype(np.int64)
    drawn += drawn >= place[items]  # all places of the window but its own
    return np.asarray(by_popularity[np.minimum(drawn, n_items - 1)])


def _mixed(keys: Array, n: int) -> Array:
    """Return a random uint64 for each key; keys come in runs of n, and each place has its own.

    The finaliser of SplitMix64. Source: Steele, Lea and Flood 2014.
    """
    place = (np.arange(len(keys)) % max(n, 1) + 1).astype(np.uint64)
    x = keys + place * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
