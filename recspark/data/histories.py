"""Histories: each user's acts in one row, newest last; merged night by night.

This is the door that no impression passes: what models learn from, `seen`, weights, counts and truth
all come from `histories`.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features

_FIELDS = schema.HISTORY_EVENT.names


def event_weight(settings: Features) -> Column:
    """Return the weight of an event by its type.

    Where events are ratings (`explicit`), times its value, of whatever sign; null = no rating: an
    event without a value, or of a type that weighs 0.
    """
    weight = F.lit(settings.other_weight)
    for kind, value in sorted(settings.event_weights.items()):
        weight = F.when(F.col("event_type") == kind, F.lit(value)).otherwise(weight)
    if settings.explicit:
        weight = F.when(weight != 0, weight * F.col("value"))
    return weight.cast("float")


def suffixes(
    labelled: DataFrame, user_ids: DataFrame, item_ids: DataFrame, settings: Features
) -> DataFrame:
    """Return `user_idx, changed_at, suffix`: each reopened user's acts from `changed_at` on.

    Parameters
    ----------
    labelled : events with `session_id`, `is_act` and the owner's `changed_at`
    user_ids, item_ids : the dictionaries
    settings : event weights

    Events are in time order, ties by event_id. Two dictionary joins and one shuffle by user.
    """
    mine = F.col("is_act") & F.col("user_id").isNotNull()
    events = (
        labelled.where((F.col("event_at") >= F.col("changed_at")) & mine)
        .join(user_ids.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(F.broadcast(item_ids.select("item_id", "item_idx")), on="item_id", how="inner")
        .withColumn("weight", event_weight(settings))
        .withColumn("value", F.col("value").cast("float"))
    )
    ordered = F.array_sort(
        F.collect_list(F.struct("event_at", "event_id", *[f for f in _FIELDS if f != "event_at"]))
    )
    return (
        events.groupBy("user_idx")
        .agg(F.min("changed_at").alias("changed_at"), ordered.alias("ordered"))
        .select(
            "user_idx",
            "changed_at",
            F.transform("ordered", lambda e: F.struct(*[e[f].alias(f) for f in _FIELDS]))
            .cast(schema.HISTORY)
            .alias("suffix"),
        )
    )


def merged(histories: DataFrame, changed: DataFrame, new: DataFrame, n_buckets: int) -> DataFrame:
    """Return `schema.HISTORIES`: rows of `histories` with the changed users' endings replaced.

    Parameters
    ----------
    histories : the rows so far (of the buckets that are written)
    changed : user_idx, changed_at: what each reopened user keeps ends before it
    new : user_idx, suffix: what comes after; a user without a suffix lost those events
    n_buckets : slices of the table

    Old events before `changed_at` stay as they are, `suffix` follows. A user left without events
    loses the row. The joins broadcast `changed` and `new` while they are small, so what they cost
    follows the new day (every row of the buckets is written again); users not in `histories` are
    found by an anti join on the index alone.
    """
    kept = (
        histories.join(changed, on="user_idx", how="left")
        .join(new, on="user_idx", how="left")
        .select(
            "user_idx",
            F.when(F.col("changed_at").isNull(), F.col("history"))
            .otherwise(
                F.concat(
                    F.filter("history", lambda e: e["event_at"] < F.col("changed_at")),
                    F.coalesce("suffix", F.array().cast(schema.HISTORY)),
                )
            )
            .alias("history"),
        )
    )
    first = new.join(histories.select("user_idx"), on="user_idx", how="left_anti").select(
        "user_idx", F.col("suffix").alias("history")
    )
    items = F.array_sort(F.array_distinct(F.transform("history", lambda e: e["item_idx"])))
    return (
        kept.unionByName(first)
        .where(F.size("history") > 0)
        .select("user_idx", "history", items.alias("seen"), bucket(n_buckets).alias("bucket"))
    )


def bucket(n_buckets: int) -> Column:
    """Return the slice that a user's row lies in: a hash of user_idx."""
    return F.pmod(F.hash("user_idx"), F.lit(n_buckets)).cast("int")
