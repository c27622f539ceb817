"""Sessions: a user's events without a gap above the limit, cut at a maximum length.

An event is an act, or an impression: an item that was shown to the user. Both are signs of the
user's presence, so both hold a session together; only acts are its items.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark.config import Sessions

MICROS_PER_MINUTE = 60_000_000


def owner() -> Column:
    """Who a session belongs to: the user, or the session key where the user is unknown."""
    return F.coalesce(F.col("user_id"), F.concat(F.lit("session:"), F.col("session_key")))


def is_act(settings: Sessions) -> Column:
    """Return whether an event is something that the user did, not an impression."""
    return ~F.col("event_type").isin(*settings.impression_types)


def with_session_id(events: DataFrame, settings: Sessions) -> DataFrame:
    """Add `owner`, `chain_at`, `session_id` and `is_act` to events.

    A chain is a run of events of one owner with no gap above `gap_minutes` (a gap of exactly the
    limit stays in, as in Spark's `session_window`). A chain longer than `max_minutes` is cut into
    slices of that length counted from its first event, so an event's session depends on earlier
    events only. `session_id` = hash(owner, the session's first event): adding a user or rerunning a
    day renumbers nobody. Ties in time are ordered by event_id.

    Cost: one shuffle by owner, one sort; no action.
    """
    by_time = Window.partitionBy("owner").orderBy("event_at", "event_id")
    at = F.unix_micros("event_at")
    gap = F.lit(int(settings.gap_minutes * MICROS_PER_MINUTE))
    is_new = F.coalesce(at - F.lag(at).over(by_time) > gap, F.lit(True))
    chained = (
        events.withColumn("owner", owner())
        .withColumn("is_new", is_new)
        .withColumn(
            "chain_at",
            F.last(F.when(F.col("is_new"), F.col("event_at")), ignorenulls=True).over(by_time),
        )
    )
    piece = F.lit(0).cast("bigint")
    if settings.max_minutes is not None:
        length = int(settings.max_minutes * MICROS_PER_MINUTE)
        age = F.unix_micros("event_at") - F.unix_micros("chain_at")
        piece = F.floor(age / F.lit(length))
    pieces = chained.withColumn("piece", piece)
    starts = F.col("is_new") | (
        F.col("piece") != F.coalesce(F.lag("piece").over(by_time), F.lit(-1))
    )
    first = F.last(F.when(starts, F.col("event_id")), ignorenulls=True).over(by_time)
    hashed = F.sha2(F.concat_ws("\u0001", F.col("owner"), F.col("first_event_id")), 256)
    return (
        pieces.withColumn("first_event_id", first)
        .withColumn("session_id", F.substring(hashed, 1, 32))
        .withColumn("is_act", is_act(settings))
        .drop("is_new", "piece", "first_event_id")
    )


def sessions(labelled: DataFrame) -> DataFrame:
    """Return one row per session (`schema.SESSIONS`) of events that carry `session_id`.

    `items` acted on and `shown` in time order, repeats kept; a session may have either without the
    other, and starts and ends with any event. Same partitioning as `with_session_id`: no further
    shuffle by owner is needed, since the grouping starts with it.
    """
    in_order = F.array_sort(F.collect_list(F.struct("event_at", "event_id", "item_id", "is_act")))
    shown = F.transform(
        F.filter("in_order", lambda e: ~e["is_act"]),
        lambda e: F.struct(e["item_id"].alias("item_id"), e["event_at"].alias("event_at")),
    )
    return (
        labelled.groupBy("owner", "session_id")
        .agg(
            F.first("user_id").alias("user_id"),
            F.first("session_key").alias("session_key"),
            F.min("event_at").alias("started_at"),
            F.max("event_at").alias("ended_at"),
            F.count_if("is_act").cast("int").alias("n_events"),
            in_order.alias("in_order"),
        )
        .select(
            "session_id",
            "user_id",
            F.when(F.col("user_id").isNull(), F.col("session_key")).alias("session_key"),
            "started_at",
            "ended_at",
            "n_events",
            F.filter("in_order", lambda e: e["is_act"])["item_id"].alias("items"),
            shown.alias("shown"),
            F.to_date("started_at").alias("started_date"),
        )
    )


def reopened(changes: DataFrame, old_sessions: DataFrame, settings: Sessions) -> DataFrame:
    """Return `owner, changed_at, anchor`: from where each owner's sessions must be made again.

    Parameters
    ----------
    changes : events added or removed since the sessions were made
    old_sessions : the sessions as they are

    `changed_at` is the owner's first changed event. `anchor` is the start of the earliest chain
    that reaches it (its last event at most one gap before), else `changed_at`: events before it
    keep their sessions, since a session depends on earlier events only. Cost: two shuffles by
    owner, of the changes and of the sessions of changed owners; no action.
    """
    changed = (
        changes.withColumn("owner", owner())
        .groupBy("owner")
        .agg(F.min("event_at").alias("changed_at"))
    )
    gap = F.expr(f"INTERVAL {int(settings.gap_minutes * MICROS_PER_MINUTE)} MICROSECONDS")
    by_time = Window.partitionBy("owner").orderBy("started_at")
    mine = old_sessions.withColumn("owner", owner()).join(changed, on="owner", how="inner")
    is_new = F.coalesce(F.col("started_at") - gap > F.lag("ended_at").over(by_time), F.lit(True))
    chains = (
        mine.withColumn("is_new", is_new)
        .withColumn(
            "chain_at",
            F.last(F.when(F.col("is_new"), F.col("started_at")), ignorenulls=True).over(by_time),
        )
        .where(F.col("ended_at") >= F.col("changed_at") - gap)
        .groupBy("owner")
        .agg(F.min("chain_at").alias("chain_at"))
    )
    return changed.join(chains, on="owner", how="left").select(
        "owner",
        "changed_at",
        F.least("changed_at", F.coalesce("chain_at", "changed_at")).alias("anchor"),
    )
