"""What is known of users and items as of a cutoff."""

from __future__ import annotations

from datetime import datetime, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema

WINDOWS = (7, 28, 90)  # days
_DESCRIBED = ("item_name", "category", "price", "text", "media")
LIGHT, HEAVY = (
    2,
    10,
)  # orders: light <= 2 < regular < 10 <= heavy. Guess; quartiles of the bundled shop


def user_features(histories: DataFrame, cutoff: datetime) -> DataFrame:
    """Return `schema.USER_FEATURES`, a row per user with an event before `cutoff`.

    recency: days since the last event; tenure: days since the first; mean_gap: days between orders
    (null for one order); spend: sum of `value`; activity: light, regular or heavy by orders. Sums
    run in time order. Narrow: no shuffle, no action. `histories` are sliced at the cutoff.
    """
    now = F.lit(cutoff)
    orders = F.array_distinct(
        F.transform("history", lambda e: F.coalesce(e["order_id"], e["session_id"]))
    )
    spend = F.aggregate(
        "history",
        F.lit(0.0),
        lambda total, e: total + F.coalesce(e["value"].cast("double"), F.lit(0.0)),
    )
    first, last = F.col("history")[0]["event_at"], F.element_at("history", -1)["event_at"]
    return histories.withColumn("n_orders", F.size(orders)).select(
        now.alias("cutoff"),
        "user_idx",
        F.size("history").alias("n_events"),
        "n_orders",
        F.size("seen").alias("n_items"),
        F.round(spend, 2).alias("spend"),
        _days(last, now).alias("recency_days"),
        _days(first, now).alias("tenure_days"),
        F.when(F.col("n_orders") > 1, _days(first, last) / (F.col("n_orders") - 1)).alias(
            "mean_gap_days"
        ),
        activity(F.col("n_orders")).alias("activity"),
    )


def activity(n_orders: Column) -> Column:
    """Return the segment of a user with so many orders before the cutoff."""
    return F.when(n_orders <= LIGHT, "light").when(n_orders < HEAVY, "regular").otherwise("heavy")


def item_features(histories: DataFrame, items: DataFrame, cutoff: datetime) -> DataFrame:
    """Return `schema.ITEM_FEATURES`, a row per item with an event before `cutoff`.

    growth: events a day in the last 7 days over events a day in the last 28, one event added to
    each; repeat_rate: share of the item's users who acted on it on more than one day; age and
    last_event in days. Two shuffles, by user and item (partly aggregated first) and by item; no
    action.

    Parameters
    ----------
    histories : sliced at the cutoff
    items : `items_as_of` the cutoff
    """
    now = F.lit(cutoff)
    events = histories.select("user_idx", F.explode("history").alias("e")).select(
        "user_idx", F.col("e.item_idx").alias("item_idx"), F.col("e.event_at").alias("event_at")
    )
    recent = {days: F.col("event_at") >= F.lit(cutoff - timedelta(days=days)) for days in WINDOWS}
    per_user = events.groupBy("item_idx", "user_idx").agg(
        F.count(F.lit(1)).alias("n"),
        *[F.count_if(recent[days]).alias(f"n{days}") for days in WINDOWS],
        (F.to_date(F.min("event_at")) != F.to_date(F.max("event_at"))).alias("is_repeat"),
        F.min("event_at").alias("first_at"),
        F.max("event_at").alias("last_at"),
    )
    per_item = per_user.groupBy("item_idx").agg(
        F.sum("n").alias("n_events"),
        F.count(F.lit(1)).alias("n_users"),
        *[F.sum(f"n{days}").alias(f"n_events_{days}d") for days in WINDOWS],
        F.count_if("is_repeat").alias("n_repeat"),
        F.min("first_at").alias("first_at"),
        F.max("last_at").alias("last_at"),
    )
    growth = ((F.col("n_events_7d") + 1) / 7) / ((F.col("n_events_28d") + 1) / 28)
    return per_item.join(
        items.select("item_idx", "price", "category"), on="item_idx", how="left"
    ).select(
        now.alias("cutoff"),
        "item_idx",
        "n_events",
        "n_users",
        *[f"n_events_{days}d" for days in WINDOWS],
        growth.alias("growth"),
        "price",
        _days(F.col("first_at"), now).alias("age_days"),
        _days(F.col("last_at"), now).alias("last_event_days"),
        (F.col("n_repeat") / F.col("n_users")).alias("repeat_rate"),
        "category",
    )


def items_as_of(items: DataFrame, cutoff: datetime) -> DataFrame:
    """Return the catalogue before `cutoff`: per item the latest value of each column that is not
    null; of two for the same time, that of the later night.

    Rows valid from the cutoff on are not looked at. One shuffle by item, no action.
    """
    known = items.where(F.col("valid_from") < F.lit(cutoff))
    order = F.struct("valid_from", "ingest_date")
    latest = [F.max_by(c, F.when(F.col(c).isNotNull(), order)).alias(c) for c in _DESCRIBED]
    return known.groupBy("item_idx", "item_id").agg(*latest)


def changed_items(landed: DataFrame, known: DataFrame) -> DataFrame:
    """Return the rows of `landed` that say something new about their item, as `schema.ITEMS`.

    Parameters
    ----------
    landed : of one night, unique by (item_id, valid_from)
    known : of other nights; a landed row is new when a described column differs from the item's row
        before it in time (in `known` or `landed`), or it is the first. What `known` says of the same
        time comes before it, so a later night may correct it

    One shuffle by item, no action. Writing what is returned, night by night or at once, gives the
    same rows.
    """
    content = F.to_json(F.struct(*_DESCRIBED))
    names = schema.ITEMS.names
    mine = known.join(landed.select("item_id").distinct(), on="item_id", how="left_semi")
    both = (
        landed.select(*names, F.lit(True).alias("is_landed"))
        .unionByName(mine.select(*names, F.lit(False).alias("is_landed")))
        .withColumn("content", content)
    )
    in_time = Window.partitionBy("item_id").orderBy("valid_from", "is_landed", "ingest_date")
    is_new = ~F.col("content").eqNullSafe(F.lag("content").over(in_time))
    return both.withColumn("is_new", F.col("is_landed") & is_new).where("is_new").select(*names)


def _days(start: Column, end: Column) -> Column:
    return (F.unix_micros(end) - F.unix_micros(start)) / F.lit(86_400_000_000.0)
