"""Histories to user-item weights, inside the row: no shuffle, sums in time order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.blocks import MICROS_PER_DAY, micros, parse_histories, weigh

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
    """Return `user_idx, history, seen` as of `cutoff`: events before it, and the items of those.

    Users without an event before the cutoff are left out, or kept with empty arrays (`keep_empty`).
    Where events are `ratings` (`features.explicit`), the newest one before the cutoff stands for its
    item: this is the one place that says so (`newest_ratings`), and all that is made of histories
    takes its weights from here. Narrow: no shuffle, no action.
    """
    moment = F.lit(cutoff)
    sliced = F.filter("history", lambda event: event["event_at"] < moment)
    items = F.array_sort(F.array_distinct(F.transform("history", lambda event: event["item_idx"])))
    history = newest_ratings("history") if ratings else F.col("history")
    return (
        histories.select("user_idx", sliced.alias("history"))
        .where(F.lit(keep_empty) | (F.size("history") > 0))
        .select("user_idx", history.alias("history"), items.alias("seen"))
    )


def in_horizon(cutoff: datetime, horizon_days: int) -> Callable[[Column], Column]:
    """Return what says of an event of a history whether it lies in [cutoff, cutoff + horizon)."""
    begin = F.timestamp_micros(F.lit(micros(cutoff)))
    end = F.timestamp_micros(F.lit(micros(cutoff + timedelta(days=horizon_days))))
    return lambda event: (event["event_at"] >= begin) & (event["event_at"] < end)


def hash_sample(users: DataFrame, most: int, seed: int, n_users: int | None = None) -> Column:
    """Return whether a user of `users` is in the sample: all where they are at most `most`, else by a
    hash of `user_idx` and `seed`, the same for the same number of them.

    One job counts them, where `n_users` does not say how many they are.
    """
    n_users = users.count() if n_users is None else n_users
    if n_users <= most:
        return F.lit(True)
    draw = F.pmod(F.xxhash64("user_idx", F.lit(seed)), F.lit(1 << 32))
    return draw < F.lit(int(most / n_users * (1 << 32)))


def newest_ratings(history: str) -> Column:
    """Return the events of the column `history`, newest last; of each item all but the newest rating
    weigh null, which is no rating.

    An event that weighs null already stands for nothing. Cost: two sorts of the array.
    """
    placed = F.array_sort(
        F.transform(
            history,
            lambda event, place: F.struct(
                event["item_idx"].alias("item_idx"),
                event["weight"].isNotNull().alias("is_rating"),
                place.alias("place"),
            ),
        )
    )
    following = F.slice(placed, 2, F.size(placed))
    is_newest = F.array_sort(
        F.zip_with(
            placed,
            following,
            lambda event, later: F.struct(
                event["place"].alias("place"),
                (later.isNull() | (later["item_idx"] != event["item_idx"])).alias("is_newest"),
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
    cutoff : age 0 of the decay, UTC
    half_life_days : of the weights; None = none

    A user's items are ascending. An item whose events all weigh null (no rating) has no row;
    `n_events` and `last_event_at` are of all its events. Narrow: no shuffle, no action.
    """
    as_of = micros(cutoff)

    def weights(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield of_users(batch.column("user_idx"), batch.column("history"), as_of, half_life_days)

    rows = histories.select("user_idx", "history").mapInArrow(weights, _OF_USERS)
    return rows.select(F.lit(cutoff).alias("cutoff"), *_OF_USERS.names)


def of_users(
    user_idx: pa.Array, history: pa.ListArray, as_of: int, half_life_days: float | None
) -> pa.RecordBatch:
    """Return the interactions of a batch of users, without `cutoff`; see `interactions`."""
    parsed = parse_histories(history)
    items, weights = weigh(parsed, as_of, half_life_days=half_life_days, combine="sum")
    # The same events once more, undecayed: their number and the newest time per (row, item).
    order = np.lexsort((parsed.item_idx, parsed.rows))
    row, item, at = parsed.rows[order], parsed.item_idx[order], parsed.event_at[order]
    first = np.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    begin = np.flatnonzero(first)
    counts = np.diff(np.append(begin, len(row))).astype(np.int32)
    last = np.maximum.reduceat(at, begin) if len(begin) else at
    rated = ~np.isnan(parsed.weight[order])
    kept = np.logical_or.reduceat(rated, begin) if len(begin) else rated  # as in `weigh`
    return pa.RecordBatch.from_arrays(
        [
            user_idx.take(pa.array(items.rows)),
            pa.array(items.values, pa.int32()),
            pa.array(weights, pa.float32()),
            pa.array(counts[kept], pa.int32()),
            pa.array(last[kept], pa.timestamp("us", "UTC")),
        ],
        names=_OF_USERS.names,
    )


def queries(histories: DataFrame, mode: str) -> DataFrame:
    """Return what models answer (`schema.QUERIES`) for every row of `histories`, as `before` gives it.

    `mode` novel masks the user's `seen`; repeat masks nothing. Narrow: no shuffle, no action.
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

    `by` names columns of `histories` whose values are summed apart; they come first. Events that
    weigh null (no rating) are left out. Each event's
    weight is rounded to 2^-32 and summed as an integer, so the sum does not depend on the order of a
    shuffle; error below 2^-33 an event. One shuffle of item-sized partial sums, no action.
    """
    events = histories.select(*by, F.explode("history").alias("e")).where("e.weight IS NOT NULL")
    weight = F.col("e.weight").cast("double")
    if half_life_days is not None:
        age = (F.lit(micros(cutoff)) - F.unix_micros("e.event_at")) / F.lit(float(MICROS_PER_DAY))
        weight = weight * F.pow(F.lit(0.5), age / F.lit(half_life_days))
    steps = F.round(weight * F.lit(float(2**32))).cast("decimal(38,0)")
    return (
        events.select(*by, F.col("e.item_idx").alias("item_idx"), steps.alias("steps"))
        .groupBy(*by, "item_idx")
        .agg((F.sum("steps").cast("double") / F.lit(float(2**32))).alias("weight"))
    )
