"""Features of users and items, and the catalogue, as of a cutoff."""

from __future__ import annotations

from datetime import datetime, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema

WINDOWS = (7, 28, 90)  # days before the cutoff
_DESCRIBED = ("item_name", "category", "price", "text", "media")  # columns that describe an item
# Numbers of orders: light <= 2 < regular < 10 <= heavy. Guess: the quartiles of the bundled shop.
LIGHT, HEAVY = 2, 10


def user_features(histories: DataFrame, cutoff: datetime) -> DataFrame:
    """Return `schema.USER_FEATURES`, a row per user with an event before `cutoff`.

    `histories` must be sliced at the cutoff. `recency_days` counts from the last event to the
    cutoff and `tenure_days` from the first event to the cutoff. `mean_gap_days` is the mean time
    between two orders, null for one order. Events with the same `order_id` are one order; where
    that is null, events of one session are. `spend` is the sum of `value`. `activity` is light,
    regular or heavy by the number of orders. Sums run in time order. Narrow: no shuffle, no action.
    """
    cutoff_at = F.lit(cutoff)
    order_ids = F.array_distinct(
        F.transform("history", lambda event: F.coalesce(event["order_id"], event["session_id"]))
    )
    spend = F.aggregate(
        "history",
        F.lit(0.0),
        lambda total, event: total + F.coalesce(event["value"].cast("double"), F.lit(0.0)),
    )
    first_at, last_at = F.col("history")[0]["event_at"], F.element_at("history", -1)["event_at"]
    return histories.withColumn("n_orders", F.size(order_ids)).select(
        cutoff_at.alias("cutoff"),
        "user_idx",
        F.size("history").alias("n_events"),
        "n_orders",
        F.size("seen").alias("n_items"),
        F.round(spend, 2).alias("spend"),
        _days_between(last_at, cutoff_at).alias("recency_days"),
        _days_between(first_at, cutoff_at).alias("tenure_days"),
        F.when(
            F.col("n_orders") > 1, _days_between(first_at, last_at) / (F.col("n_orders") - 1)
        ).alias("mean_gap_days"),
        activity(F.col("n_orders")).alias("activity"),
    )


def activity(n_orders: Column) -> Column:
    """Return the segment of a user who has `n_orders` orders before the cutoff."""
    return F.when(n_orders <= LIGHT, "light").when(n_orders < HEAVY, "regular").otherwise("heavy")


def item_features(histories: DataFrame, items: DataFrame, cutoff: datetime) -> DataFrame:
    """Return `schema.ITEM_FEATURES`, a row per item with an event before `cutoff`.

    `growth` is the number of events per day in the last 7 days, divided by that in the last 28
    days; one event is added to each of the two counts. `repeat_rate` is the share of the item's
    users who acted on the item on more than one day. `age_days` and `last_event_days` count from
    the first and the last event to the cutoff. Two shuffles, by user and item (partly aggregated
    first) and by item; no action.

    Parameters
    ----------
    histories : sliced at the cutoff
    items : `items_as_of` the cutoff
    """
    cutoff_at = F.lit(cutoff)
    events = histories.select("user_idx", F.explode("history").alias("e")).select(
        "user_idx", F.col("e.item_idx").alias("item_idx"), F.col("e.event_at").alias("event_at")
    )
    is_in_window = {
        days: F.col("event_at") >= F.lit(cutoff - timedelta(days=days)) for days in WINDOWS
    }
    per_user = events.groupBy("item_idx", "user_idx").agg(
        F.count(F.lit(1)).alias("n"),
        *[F.count_if(is_in_window[days]).alias(f"n{days}") for days in WINDOWS],
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
        cutoff_at.alias("cutoff"),
        "item_idx",
        "n_events",
        "n_users",
        *[f"n_events_{days}d" for days in WINDOWS],
        growth.alias("growth"),
        "price",
        _days_between(F.col("first_at"), cutoff_at).alias("age_days"),
        _days_between(F.col("last_at"), cutoff_at).alias("last_event_days"),
        (F.col("n_repeat") / F.col("n_users")).alias("repeat_rate"),
        "category",
    )


def items_as_of(items: DataFrame, cutoff: datetime) -> DataFrame:
    """Return the catalogue before `cutoff`: for each item, the latest value of each column.

    Null is not a value: an older value stays where a later row has null. Of two values for the same
    time, the one of the later night counts. Rows valid from the cutoff on are left out. One shuffle
    by item, no action.
    """
    items_before = items.where(F.col("valid_from") < F.lit(cutoff))
    row_at = F.struct("valid_from", "ingest_date")
    latest_values = [
        F.max_by(name, F.when(F.col(name).isNotNull(), row_at)).alias(name) for name in _DESCRIBED
    ]
    return items_before.groupBy("item_idx", "item_id").agg(*latest_values)


def changed_items(landed: DataFrame, known: DataFrame) -> DataFrame:
    """Return the rows of `landed` that describe their item differently than before.

    Parameters
    ----------
    landed : rows of one night, unique by (item_id, valid_from)
    known : rows of other nights

    A landed row is returned where it is the first of its item, or where one of the describing
    columns differs from the item's row before it in time, in `known` or `landed`. A row of `known`
    with the same time comes before the landed row, so a later night may correct an earlier one.

    The result has `schema.ITEMS`. It is the same rows whether nights are written one by one or at
    once. One shuffle by item, no action.
    """
    content = F.to_json(F.struct(*_DESCRIBED))
    names = schema.ITEMS.names
    known_of_landed_items = known.join(
        landed.select("item_id").distinct(), on="item_id", how="left_semi"
    )
    all_rows = (
        landed.select(*names, F.lit(True).alias("is_landed"))
        .unionByName(known_of_landed_items.select(*names, F.lit(False).alias("is_landed")))
        .withColumn("content", content)
    )
    by_time = Window.partitionBy("item_id").orderBy("valid_from", "is_landed", "ingest_date")
    is_new = ~F.col("content").eqNullSafe(F.lag("content").over(by_time))
    return all_rows.withColumn("is_new", F.col("is_landed") & is_new).where("is_new").select(*names)


def _days_between(start: Column, end: Column) -> Column:
    return (F.unix_micros(end) - F.unix_micros(start)) / F.lit(86_400_000_000.0)
