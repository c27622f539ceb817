"""Features of users and items, and the catalogue, as of a cutoff."""

from __future__ import annotations

from datetime import datetime, timedelta

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema

WINDOWS = (7, 28, 90)  # days before the cutoff
ORDER_WINDOWS = (28, 90)  # days before the cutoff, of `n_orders_28d` and `n_orders_90d`
NEW_USER_WINDOWS = (14, 28)  # days before the cutoff, of `new_users_14d` and `new_users_28d`
HALF_LIVES = (3, 7, 14, 30, 60, 120)  # days, of `popularity_3d` and so on
PRICE_CHANGE_DAYS = 28  # `price_change` compares with the price this many days before the cutoff
_DESCRIBED = ("item_name", "category", "price", "text", "media")  # columns that describe an item
_AVAILABILITY = tuple(schema.AVAILABILITY)
_STEPS_PER_EVENT = float(2**32)  # a sum over users counts steps, so that it is exact in any order
# Numbers of orders: light <= 2 < regular < 10 <= heavy. Guess: the quartiles of the bundled shop.
LIGHT, HEAVY = 2, 10


def user_features(histories: DataFrame, cutoff: datetime) -> DataFrame:
    """Return `schema.USER_FEATURES`, a row per user with an event before `cutoff`.

    `histories` must be sliced at the cutoff. `recency_days` counts from the last event to the
    cutoff and `tenure_days` from the first event to the cutoff. `mean_gap_days` is the mean time
    between two orders, null for one order. Events with the same `order_id` are one order; where
    that is null, events of one session are. `n_orders_28d` and `n_orders_90d` count the orders
    with an event in these days before the cutoff. `order_size` is the mean number of different
    items per order. `repeat_share` is the share of the pairs (order, item) whose item is in an
    earlier order of the user too. `spend` is the sum of `value`, rounded to 2 decimals.
    `mean_value` is that sum before rounding, divided by `n_events`; null where no event has a
    value. `activity` is light, regular or heavy by the number of orders. Sums run in time order.
    Narrow: no shuffle, no action.

    Example: order 1 has the items A, B and A, and order 2 has A. Then `n_orders` is 2, `order_size`
    is 1.5 (3 pairs in 2 orders), and `repeat_share` is 1/3 (A in order 2).
    """
    cutoff_at = F.lit(cutoff)
    order_ids = F.array_distinct(F.transform("history", _order_of))
    # One text per pair (order, item): Spark finds distinct texts by a hash set, but distinct
    # structs by comparing every two of them.
    pairs = F.array_distinct(
        F.transform(
            "history",
            lambda event: F.concat_ws(":", event["item_idx"].cast("string"), _order_of(event)),
        )
    )

    def n_orders_since(days: int) -> Column:
        begin = F.lit(cutoff - timedelta(days=days))
        events = F.filter("history", lambda event: event["event_at"] >= begin)
        return F.size(F.array_distinct(F.transform(events, _order_of)))

    spend = F.aggregate(
        "history",
        F.lit(0.0),
        lambda total, event: total + F.coalesce(event["value"].cast("double"), F.lit(0.0)),
    )
    first_at, last_at = F.col("history")[0]["event_at"], F.element_at("history", -1)["event_at"]
    has_value = F.exists("history", lambda event: event["value"].isNotNull())
    with_totals = histories.withColumns(
        {"n_orders": F.size(order_ids), "n_pairs": F.size(pairs), "total_value": spend}
    )
    # Each item has one pair that is no repeat: the pair with the first order that holds the item.
    n_repeated_pairs = F.col("n_pairs") - F.size("seen")
    return with_totals.select(
        cutoff_at.alias("cutoff"),
        "user_idx",
        F.size("history").alias("n_events"),
        "n_orders",
        *[n_orders_since(days).alias(f"n_orders_{days}d") for days in ORDER_WINDOWS],
        F.size("seen").alias("n_items"),
        (F.col("n_pairs") / F.col("n_orders")).alias("order_size"),
        (n_repeated_pairs / F.col("n_pairs")).alias("repeat_share"),
        F.round("total_value", 2).alias("spend"),
        F.when(has_value, F.col("total_value") / F.size("history")).alias("mean_value"),
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


def item_features(
    histories: DataFrame,
    items: DataFrame,
    cutoff: datetime,
    older_items: DataFrame | None = None,
) -> DataFrame:
    """Return `schema.ITEM_FEATURES`, a row per item with an event before `cutoff`.

    `growth` is the number of events per day in the last 7 days, divided by that in the last 28
    days; one event is added to each of the two counts. `popularity_3d` and so on are decayed
    numbers of events: each event counts 0.5 ** (age / half-life), and the name has the half-life in
    days. `trend` is (popularity_7d / 7 + 1 / 30) / (popularity_30d / 30 + 1 / 30). For an item that
    was sold evenly for long, a popularity is proportional to its half-life, so `trend` is about 1
    however often the item sells. It is above 1 for rising sales and below 1 for falling sales, and
    goes back to 1 where the last sale is long ago. The term 1 / 30 adds one event to
    `popularity_30d`. `new_users_14d` and `new_users_28d` count the users whose first event on the
    item lies in these days before the cutoff. `price_change` is the price before the cutoff,
    divided by the price `PRICE_CHANGE_DAYS` earlier; null where one of the two is missing or 0.
    `repeat_rate` is the share of the item's users who acted on the item on more than one day.
    `age_days` and `last_event_days` count from the first and the last event to the cutoff.

    In a popularity, each event is rounded to 2^-32 and summed as an integer, so the sum does not
    depend on the order of a shuffle; the error is at most 2^-33 per event. Two shuffles, by user
    and item (partly aggregated first) and by item, and one join by item for each catalogue; no
    action.

    Parameters
    ----------
    histories : sliced at the cutoff
    items : `items_as_of` the cutoff
    older_items : `items_as_of` the moment `PRICE_CHANGE_DAYS` before the cutoff; None = older
        prices are not known
    """
    cutoff_at = F.lit(cutoff)
    events = histories.select("user_idx", F.explode("history").alias("e")).select(
        "user_idx", F.col("e.item_idx").alias("item_idx"), F.col("e.event_at").alias("event_at")
    )
    is_in_window = {
        days: F.col("event_at") >= F.lit(cutoff - timedelta(days=days)) for days in WINDOWS
    }
    age_days = _days_between(F.col("event_at"), cutoff_at)
    decayed_steps = {  # of one event, at most 2^32
        days: F.rint(
            F.pow(F.lit(0.5), age_days / F.lit(float(days))) * F.lit(_STEPS_PER_EVENT)
        ).cast("bigint")
        for days in HALF_LIVES
    }
    per_user = events.groupBy("item_idx", "user_idx").agg(
        F.count(F.lit(1)).alias("n"),
        *[F.count_if(is_in_window[days]).alias(f"n{days}") for days in WINDOWS],
        *[F.sum(decayed_steps[days]).alias(f"steps{days}") for days in HALF_LIVES],
        (F.to_date(F.min("event_at")) != F.to_date(F.max("event_at"))).alias("is_repeat"),
        F.min("event_at").alias("first_at"),
        F.max("event_at").alias("last_at"),
    )

    def popularity(days: int) -> Column:
        # A decimal holds the steps of any number of users; a bigint holds those of 2^31 events.
        steps = F.sum(F.col(f"steps{days}").cast("decimal(20,0)"))
        return steps.cast("double") / F.lit(_STEPS_PER_EVENT)

    per_item = per_user.groupBy("item_idx").agg(
        F.sum("n").alias("n_events"),
        F.count(F.lit(1)).alias("n_users"),
        *[F.sum(f"n{days}").alias(f"n_events_{days}d") for days in WINDOWS],
        *[popularity(days).alias(f"popularity_{days}d") for days in HALF_LIVES],
        *[
            F.count_if(F.col("first_at") >= F.lit(cutoff - timedelta(days=days))).alias(
                f"new_users_{days}d"
            )
            for days in NEW_USER_WINDOWS
        ],
        F.count_if("is_repeat").alias("n_repeat"),
        F.min("first_at").alias("first_at"),
        F.max("last_at").alias("last_at"),
    )
    growth = ((F.col("n_events_7d") + 1) / 7) / ((F.col("n_events_28d") + 1) / 28)
    trend = (F.col("popularity_7d") / 7 + 1 / 30) / (F.col("popularity_30d") / 30 + 1 / 30)
    described = per_item.join(
        items.select("item_idx", "price", "category"), on="item_idx", how="left"
    )
    if older_items is None:
        with_prices = described.withColumn("older_price", F.lit(None).cast("double"))
    else:
        older_prices = older_items.select("item_idx", F.col("price").alias("older_price"))
        with_prices = described.join(older_prices, on="item_idx", how="left")
    has_prices = (F.col("price") != 0) & (F.col("older_price") != 0)
    return with_prices.select(
        cutoff_at.alias("cutoff"),
        "item_idx",
        "n_events",
        "n_users",
        *[f"n_events_{days}d" for days in WINDOWS],
        growth.alias("growth"),
        *[f"popularity_{days}d" for days in HALF_LIVES],
        trend.alias("trend"),
        *[f"new_users_{days}d" for days in NEW_USER_WINDOWS],
        "price",
        F.when(has_prices, F.col("price") / F.col("older_price")).alias("price_change"),
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

    `available` says whether the item may be listed at the cutoff, by the latest row that says
    anything about it; null where no row does.
    """
    items_before = items.where(F.col("valid_from") < F.lit(cutoff))
    row_at = F.struct("valid_from", "ingest_date")
    latest_values = [
        F.max_by(name, F.when(F.col(name).isNotNull(), row_at)).alias(name) for name in _DESCRIBED
    ]
    has_availability = F.col("available").isNotNull()
    latest = F.max_by(F.struct(*_AVAILABILITY), F.when(has_availability, row_at))
    cutoff_at = F.lit(cutoff)
    has_begun = F.coalesce(F.col("latest.available_from") <= cutoff_at, F.lit(True))
    has_not_ended = F.coalesce(F.col("latest.available_until") > cutoff_at, F.lit(True))
    return (
        items_before.groupBy("item_idx", "item_id")
        .agg(*latest_values, latest.alias("latest"))
        .withColumn("available", F.col("latest.available") & has_begun & has_not_ended)
        .drop("latest")
    )


def says_availability(items: DataFrame) -> bool:
    """Return whether any row of the table `items` may make an item unavailable. One small job."""
    return not items.where(
        ~F.col("available")
        | F.col("available_from").isNotNull()
        | F.col("available_until").isNotNull()
    ).isEmpty()


def catalogues_as_of(items: DataFrame, cutoff: datetime) -> tuple[DataFrame, DataFrame]:
    """Return the two catalogues that `item_features` reads: before `cutoff`, and before the moment
    `PRICE_CHANGE_DAYS` earlier.

    `items` is the table. See `items_as_of` for the columns. One shuffle by item for each of the
    two, no action.
    """
    older_cutoff = cutoff - timedelta(days=PRICE_CHANGE_DAYS)
    return items_as_of(items, cutoff), items_as_of(items, older_cutoff)


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
    content = F.to_json(F.struct(*_DESCRIBED, *_AVAILABILITY))
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


def _order_of(event: Column) -> Column:
    return F.coalesce(event["order_id"], event["session_id"])


def _days_between(start: Column, end: Column) -> Column:
    return (F.unix_micros(end) - F.unix_micros(start)) / F.lit(86_400_000_000.0)
