"""Sessions: a user's events without a gap above the limit, cut at a maximum length.

An event is an act, or an impression: an item that was shown to the user. Both show that the user
was present, so both keep a session open; the `items` of a session are those of its acts only.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark.config import Sessions

MICROS_PER_MINUTE = 60_000_000


def owner() -> Column:
    """Return the owner of an event: the user, or the session key where the user is unknown."""
    return F.coalesce(F.col("user_id"), F.concat(F.lit("session:"), F.col("session_key")))


def is_act(settings: Sessions) -> Column:
    """Return whether an event is something that the user did, not an impression."""
    return ~F.col("event_type").isin(*settings.impression_types)


def with_session_id(events: DataFrame, settings: Sessions) -> DataFrame:
    """Return `events` with `owner`, `chain_at`, `session_id` and `is_act`.

    A chain is a run of events of one owner with no gap above `gap_minutes` (a gap of exactly the
    limit stays in, as in Spark's `session_window`). `chain_at` is the time of the chain's first
    event. A chain longer than `max_minutes` is cut into pieces of that length, counted from its
    first event; each piece is a session. So the session of an event depends on earlier events only.
    `session_id` is a hash of the owner and the event_id of the session's first event: adding a user
    or rerunning a day gives no other session a new id. Events at equal times are ordered by
    event_id.

    Example with a gap of 30 and a maximum of 60 minutes: events at 0:00, 0:25, 0:50, 1:15 and 3:00
    are two chains, from 0:00 and from 3:00, and three sessions: (0:00, 0:25, 0:50), (1:15), (3:00).

    Cost: one shuffle by owner, one sort; no action.
    """
    by_time = Window.partitionBy("owner").orderBy("event_at", "event_id")
    event_micros = F.unix_micros("event_at")
    gap = F.lit(int(settings.gap_minutes * MICROS_PER_MINUTE))
    is_chain_start = F.coalesce(event_micros - F.lag(event_micros).over(by_time) > gap, F.lit(True))
    in_chains = (
        events.withColumn("owner", owner())
        .withColumn("is_new", is_chain_start)
        .withColumn(
            "chain_at",
            F.last(F.when(F.col("is_new"), F.col("event_at")), ignorenulls=True).over(by_time),
        )
    )
    piece = F.lit(0).cast("bigint")  # number of the piece in its chain
    if settings.max_minutes is not None:
        piece_length = int(settings.max_minutes * MICROS_PER_MINUTE)
        since_chain_start = F.unix_micros("event_at") - F.unix_micros("chain_at")
        piece = F.floor(since_chain_start / F.lit(piece_length))
    in_pieces = in_chains.withColumn("piece", piece)
    is_session_start = F.col("is_new") | (
        F.col("piece") != F.coalesce(F.lag("piece").over(by_time), F.lit(-1))
    )
    first_event_id = F.last(F.when(is_session_start, F.col("event_id")), ignorenulls=True).over(
        by_time
    )
    hashed = F.sha2(F.concat_ws("\u0001", F.col("owner"), F.col("first_event_id")), 256)
    return (
        in_pieces.withColumn("first_event_id", first_event_id)
        .withColumn("session_id", F.substring(hashed, 1, 32))
        .withColumn("is_act", is_act(settings))
        .drop("is_new", "piece", "first_event_id")
    )


def sessions(labelled: DataFrame) -> DataFrame:
    """Return one row per session (`schema.SESSIONS`) of the events that `with_session_id` returns.

    `items` (acted on) and `shown` are in time order, repeats kept. A session may have one without
    the other; it starts and ends with an event of either kind. No further shuffle by owner is
    needed: `with_session_id` has partitioned the events by owner, and the grouping here starts with
    the owner.
    """
    in_order = F.array_sort(F.collect_list(F.struct("event_at", "event_id", "item_id", "is_act")))
    shown = F.transform(
        F.filter("in_order", lambda event: ~event["is_act"]),
        lambda event: F.struct(
            event["item_id"].alias("item_id"), event["event_at"].alias("event_at")
        ),
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
            F.filter("in_order", lambda event: event["is_act"])["item_id"].alias("items"),
            shown.alias("shown"),
            F.to_date("started_at").alias("started_date"),
        )
    )


def reopened(changes: DataFrame, old_sessions: DataFrame, settings: Sessions) -> DataFrame:
    """Return `owner, changed_at, anchor`: from `anchor` on, an owner's sessions must be rebuilt.

    Parameters
    ----------
    changes : events added or removed since the sessions were made
    old_sessions : the sessions that were made, `schema.SESSIONS`

    `changed_at` is the time of the owner's first changed event. `anchor` is the start of the
    earliest chain that reaches `changed_at`: a chain that has an event after `changed_at`, or at
    most one gap before it. Where no chain reaches `changed_at`, `anchor` is `changed_at`. Events
    before the anchor keep their sessions, since a session depends on earlier events only. Cost: two
    shuffles by owner, of the changes and of the sessions of changed owners; no action.
    """
    changed_owners = (
        changes.withColumn("owner", owner())
        .groupBy("owner")
        .agg(F.min("event_at").alias("changed_at"))
    )
    gap = F.expr(f"INTERVAL {int(settings.gap_minutes * MICROS_PER_MINUTE)} MICROSECONDS")
    by_time = Window.partitionBy("owner").orderBy("started_at")
    sessions_of_changed_owners = old_sessions.withColumn("owner", owner()).join(
        changed_owners, on="owner", how="inner"
    )
    is_chain_start = F.coalesce(
        F.col("started_at") - gap > F.lag("ended_at").over(by_time), F.lit(True)
    )
    earliest_chains = (
        sessions_of_changed_owners.withColumn("is_new", is_chain_start)
        .withColumn(
            "chain_at",
            F.last(F.when(F.col("is_new"), F.col("started_at")), ignorenulls=True).over(by_time),
        )
        .where(F.col("ended_at") >= F.col("changed_at") - gap)
        .groupBy("owner")
        .agg(F.min("chain_at").alias("chain_at"))
    )
    return changed_owners.join(earliest_chains, on="owner", how="left").select(
        "owner",
        "changed_at",
        F.least("changed_at", F.coalesce("chain_at", "changed_at")).alias("anchor"),
    )
