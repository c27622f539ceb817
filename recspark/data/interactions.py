"""Histories as of a cutoff, and the weights of users and items made from them.

What is computed for one user is computed inside the user's row: no shuffle, sums in time order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.blocks import (
    MICROS_PER_DAY,
    Array,
    local_index,
    micros,
    parse_histories,
    weigh,
)

# The columns of `interactions_of_users`.
_OF_USERS = schema.columns(
    user_idx=schema.LONG,
    item_idx=schema.INT,
    weight=schema.FLOAT,
    n_events=schema.INT,
    last_event_at=schema.TIMESTAMP,
)


def before(
    histories: DataFrame, cutoff: datetime, *, keep_empty: bool = False, ratings: bool = False
) -> DataFrame:
    """Return `user_idx, history, seen`: the events before `cutoff`, and the items of those events.

    Users without an event before the cutoff are left out, or kept with empty arrays (`keep_empty`).
    With `ratings` (`features.explicit`), the events are ratings, and only the newest rating of an
    item before the cutoff counts (`newest_ratings`). This function is the only place that applies
    the rule; everything computed from histories takes its weights from here. Narrow: no shuffle, no
    action.
    """
    cutoff_at = F.lit(cutoff)
    sliced = F.filter("history", lambda event: event["event_at"] < cutoff_at)
    items = F.array_sort(F.array_distinct(F.transform("history", lambda event: event["item_idx"])))
    history = newest_ratings("history") if ratings else F.col("history")
    return (
        histories.select("user_idx", sliced.alias("history"))
        .where(F.lit(keep_empty) | (F.size("history") > 0))
        .select("user_idx", history.alias("history"), items.alias("seen"))
    )


def in_horizon(cutoff: datetime, horizon_days: int) -> Callable[[Column], Column]:
    """Return a function of an event of a history: whether it lies in [cutoff, cutoff + horizon).

    The function is for `F.filter("history", ...)`.
    """
    begin = F.timestamp_micros(F.lit(micros(cutoff)))
    end = F.timestamp_micros(F.lit(micros(cutoff + timedelta(days=horizon_days))))
    return lambda event: (event["event_at"] >= begin) & (event["event_at"] < end)


def hash_sample(users: DataFrame, max_users: int, seed: int, n_users: int | None = None) -> Column:
    """Return whether a user of `users` is in a sample of about `max_users` users.

    Where `users` has at most `max_users` rows, all are in the sample. Otherwise a hash of
    `user_idx` and `seed` decides, so that the same number of users gives the same sample. `n_users`
    is the number of users; where it is None, one job counts them.
    """
    n_users = users.count() if n_users is None else n_users
    if n_users <= max_users:
        return F.lit(True)
    draw = F.pmod(F.xxhash64("user_idx", F.lit(seed)), F.lit(1 << 32))
    return draw < F.lit(int(max_users / n_users * (1 << 32)))


def newest_ratings(history: str) -> Column:
    """Return the events of column `history`; only the newest rating of each item keeps its weight.

    All other events get the weight null, which means no rating. An event whose weight
    is null already is no rating, so it never replaces an older rating. Events stay in their order,
    newest last. Cost: two sorts of the array.

    Example: (item 7, weight 3), (item 5, weight 4), (item 7, weight 1), (item 5, weight null)
    become the weights null, 4, 1, null.
    """
    # Sorted by item; within an item, events without a weight first, then ratings from old to new.
    # So the last event of an item is its newest rating.
    by_item = F.array_sort(
        F.transform(
            history,
            lambda event, position: F.struct(
                event["item_idx"].alias("item_idx"),
                event["weight"].isNotNull().alias("is_rating"),
                position.alias("place"),
            ),
        )
    )
    next_by_item = F.slice(by_item, 2, F.size(by_item))
    is_newest = F.array_sort(  # back to the order of `history`
        F.zip_with(
            by_item,
            next_by_item,
            lambda event, next_event: F.struct(
                event["place"].alias("place"),
                (next_event.isNull() | (next_event["item_idx"] != event["item_idx"])).alias(
                    "is_newest"
                ),
            ),
        )
    )
    return F.zip_with(
        history,
        is_newest,
        lambda event, flag: event.withField("weight", F.when(flag["is_newest"], event["weight"])),
    )


def interactions(histories: DataFrame, cutoff: datetime, half_life_days: float | None) -> DataFrame:
    """Return `cutoff, user_idx, item_idx, weight, n_events, last_event_at`, a row per user and
    item.

    Parameters
    ----------
    histories : user_idx, history (events before `cutoff`)
    cutoff : the time at which an event has age 0, UTC
    half_life_days : of the weights; None = no decay

    The items of a user are ascending. An item whose events all have the weight null (no rating) has
    no row; `n_events` and `last_event_at` count all events of the item, those with a null weight
    too. Narrow: no shuffle, no action.
    """
    as_of = micros(cutoff)

    def interactions_of_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield interactions_of_users(
                batch.column("user_idx"), batch.column("history"), as_of, half_life_days
            )

    rows = histories.select("user_idx", "history").mapInArrow(interactions_of_batches, _OF_USERS)
    return rows.select(F.lit(cutoff).alias("cutoff"), *_OF_USERS.names)


def interactions_of_users(
    user_idx: pa.Array, history: pa.ListArray, as_of: int, half_life_days: float | None
) -> pa.RecordBatch:
    """Return the interactions of a batch of users, without `cutoff`; see `interactions`.

    `as_of` is the cutoff in microseconds since 1970 UTC.
    """
    parsed = parse_histories(history)
    items, weights = weigh(parsed, as_of, half_life_days=half_life_days, combine="sum")
    # The same events once more, undecayed: their number and the newest time per (row, item).
    order = np.lexsort((parsed.item_idx, parsed.rows))
    row, item, event_at = parsed.rows[order], parsed.item_idx[order], parsed.event_at[order]
    is_first = np.ones(len(row), bool)  # of the events of its (row, item)
    is_first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    begin = np.flatnonzero(is_first)  # (n_pairs,)
    n_events = np.diff(np.append(begin, len(row))).astype(np.int32)
    last_event_at = np.maximum.reduceat(event_at, begin) if len(begin) else event_at
    has_weight = ~np.isnan(parsed.weight[order])
    # `weigh` leaves out pairs without any weight; so does this.
    is_kept = np.logical_or.reduceat(has_weight, begin) if len(begin) else has_weight
    return pa.RecordBatch.from_arrays(
        [
            user_idx.take(pa.array(items.rows)),
            pa.array(items.values, pa.int32()),
            pa.array(weights, pa.float32()),
            pa.array(n_events[is_kept], pa.int32()),
            pa.array(last_event_at[is_kept], pa.timestamp("us", "UTC")),
        ],
        names=_OF_USERS.names,
    )


def queries(histories: DataFrame, mode: str) -> DataFrame:
    """Return the queries that models answer (`schema.QUERIES`), one per row of `histories`.

    `histories` are as `before` returns them. `mode` novel masks the user's `seen` items; repeat
    masks nothing. Narrow: no shuffle, no action.
    """
    seen = F.col("seen") if mode == "novel" else F.array().cast(schema.ITEM_IDXS)
    return histories.select("user_idx", "history", seen.alias("seen"))


def decayed_item_weights(
    histories: DataFrame,
    cutoff: datetime,
    half_life_days: float | None,
    *,
    by: tuple[str, ...] = (),
) -> DataFrame:
    """Return `item_idx, weight double`: decayed event weights summed over all users.

    `by` names columns of `histories`, such as a segment. Each combination of their values gets its
    sums, and these columns come first in the result. Events whose weight is null (no rating) are
    left out. The weight of each event is rounded to 2^-32 and summed as an integer, so the sum does
    not depend on the order of a shuffle; the error is below 2^-33 per event. One shuffle of
    item-sized partial sums, no action.
    """
    events = histories.select(*by, F.explode("history").alias("e")).where("e.weight IS NOT NULL")
    weight = F.col("e.weight").cast("double")
    if half_life_days is not None:
        age_days = (F.lit(micros(cutoff)) - F.unix_micros("e.event_at")) / F.lit(
            float(MICROS_PER_DAY)
        )
        weight = weight * F.pow(F.lit(0.5), age_days / F.lit(half_life_days))
    steps = F.round(weight * F.lit(float(2**32))).cast("decimal(38,0)")
    return (
        events.select(*by, F.col("e.item_idx").alias("item_idx"), steps.alias("steps"))
        .groupBy(*by, "item_idx")
        .agg((F.sum("steps").cast("double") / F.lit(float(2**32))).alias("weight"))
    )


def decayed_weights_of_vocabulary(
    histories: DataFrame, cutoff: datetime, half_life_days: float | None, items: Array
) -> Array:
    """Return the `decayed_item_weights` of the vocabulary `items`, float64 (n_items,).

    `items` int32 (n_items,), ascending. An item without events has the weight 0. One job, with the
    shuffle of `decayed_item_weights`; the driver holds a row per item.
    """
    sums = decayed_item_weights(histories, cutoff, half_life_days).toArrow()
    local = local_index(items, sums.column("item_idx").to_numpy())
    is_in_vocabulary = local >= 0
    weights = np.zeros(len(items))
    weights[local[is_in_vocabulary]] = sums.column("weight").to_numpy()[is_in_vocabulary]
    return weights
