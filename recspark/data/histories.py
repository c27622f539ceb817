"""Histories: each user's acts in one row, newest last; merged night by night.

An act is an event that is not an impression. Impressions are left out here once, for all later
steps: the input of models, `seen`, weights, counts and truth all come from `histories`.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features

_FIELDS = schema.HISTORY_EVENT.names


def event_weight(settings: Features) -> Column:
    """Return the weight of an event by its type, float.

    Where events are ratings (`settings.explicit`), the weight is multiplied by the event's value,
    whatever its sign. The weight is then null where the event is no rating, that is, where the
    event has no value or its type weighs 0.
    """
    weight = F.lit(settings.other_weight)
    for event_type, type_weight in sorted(settings.event_weights.items()):
        weight = F.when(F.col("event_type") == event_type, F.lit(type_weight)).otherwise(weight)
    if settings.explicit:
        weight = F.when(weight != 0, weight * F.col("value"))
    return weight.cast("float")


def suffixes(
    labelled: DataFrame, user_ids: DataFrame, item_ids: DataFrame, settings: Features
) -> DataFrame:
    """Return `user_idx, changed_at, suffix`: the acts of each reopened user from `changed_at` on.

    Parameters
    ----------
    labelled : events with `session_id`, `is_act` and their user's `changed_at`
    user_ids, item_ids : the dictionaries
    settings : event weights

    The acts are in time order; acts at the same time are ordered by event_id. Cost: two
    dictionary joins and one shuffle by user.
    """
    is_act_of_user = F.col("is_act") & F.col("user_id").isNotNull()
    events = (
        labelled.where((F.col("event_at") >= F.col("changed_at")) & is_act_of_user)
        .join(user_ids.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(item_ids.select("item_id", "item_idx"), on="item_id", how="inner")
        .withColumn("weight", event_weight(settings))
        .withColumn("value", F.col("value").cast("float"))
    )
    ordered = F.array_sort(
        F.collect_list(
            F.struct("event_at", "event_id", *[field for field in _FIELDS if field != "event_at"])
        )
    )
    return (
        events.groupBy("user_idx")
        .agg(F.min("changed_at").alias("changed_at"), ordered.alias("ordered"))
        .select(
            "user_idx",
            "changed_at",
            F.transform(
                "ordered", lambda event: F.struct(*[event[field].alias(field) for field in _FIELDS])
            )
            .cast(schema.HISTORY)
            .alias("suffix"),
        )
    )


def merged(histories: DataFrame, changed: DataFrame, new: DataFrame, n_buckets: int) -> DataFrame:
    """Return `schema.HISTORIES`: `histories`, where the end of each changed user's history is
    replaced.

    Parameters
    ----------
    histories : the rows of the table before this night, of the buckets that are written
    changed : user_idx, changed_at; a reopened user keeps the events before `changed_at`
    new : user_idx, suffix: the acts from `changed_at` on. A user of `changed` without a row here
        has no acts from then on
    n_buckets : number of slices of the table

    Example: a history has events of Monday, Tuesday and Wednesday, and a late event of Tuesday noon
    comes in. `changed_at` is Tuesday noon, the time of the user's first changed event, and `suffix`
    has all acts from then on, the late one included. The new history is the old events before
    Tuesday noon, then `suffix`.

    A user who has no event afterwards has no row in the result. Users who are not in `histories`
    yet are found by an anti join on user_idx alone.

    Cost: the joins broadcast `changed` and `new` while these are small, so the cost of the joins
    grows with the new day only. Every row of the buckets is written again.
    """
    continued = (
        histories.join(changed, on="user_idx", how="left")
        .join(new, on="user_idx", how="left")
        .select(
            "user_idx",
            F.when(F.col("changed_at").isNull(), F.col("history"))
            .otherwise(
                F.concat(
                    F.filter("history", lambda event: event["event_at"] < F.col("changed_at")),
                    F.coalesce("suffix", F.array().cast(schema.HISTORY)),
                )
            )
            .alias("history"),
        )
    )
    of_new_users = new.join(histories.select("user_idx"), on="user_idx", how="left_anti").select(
        "user_idx", F.col("suffix").alias("history")
    )
    items = F.array_sort(F.array_distinct(F.transform("history", lambda event: event["item_idx"])))
    return (
        continued.unionByName(of_new_users)
        .where(F.size("history") > 0)
        .select("user_idx", "history", items.alias("seen"), bucket(n_buckets).alias("bucket"))
    )


def bucket(n_buckets: int) -> Column:
    """Return the number of the slice that holds a user's row, int: a hash of user_idx."""
    return F.pmod(F.hash("user_idx"), F.lit(n_buckets)).cast("int")
