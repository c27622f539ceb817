"""Features as of a cutoff, by hand; the catalogue as it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import features
from recspark.data.interactions import before
from recspark.pipeline.stages import build_features

pytestmark = pytest.mark.spark
CUT = datetime(2010, 12, 10, tzinfo=UTC)


def histories(spark: SparkSession, users: dict[int, list[tuple[int, float, str]]]) -> DataFrame:
    """user -> (item, days before the cutoff, order), oldest first."""
    data: list[Any] = []
    for user, events in users.items():
        rows = [
            (item, CUT - timedelta(days=days), "purchase", 1.0, 2.5, f"s{order}", order)
            for item, days, order in events
        ]
        data.append((user, rows, sorted({r[0] for r in rows}), 0))
    return spark.createDataFrame(data, schema.HISTORIES)


def test_user_features_by_hand(spark: SparkSession) -> None:
    frame = histories(
        spark, {1: [(5, 30, "a"), (6, 30, "a"), (5, 10, "b")], 2: [(5, 2, "c"), (7, -1, "d")]}
    )
    found = {r["user_idx"]: r for r in features.user_features(before(frame, CUT), CUT).collect()}
    one = found[1]
    assert (one["n_events"], one["n_orders"], one["n_items"], one["spend"]) == (3, 2, 2, 7.5)
    assert (one["recency_days"], one["tenure_days"], one["mean_gap_days"]) == (10, 30, 20)
    assert (found[2]["n_items"], found[2]["mean_gap_days"], found[2]["activity"]) == (
        1,
        None,
        "light",
    )


def test_item_features_by_hand(spark: SparkSession) -> None:
    frame = histories(
        spark,
        {1: [(5, 30, "a"), (5, 3, "b")], 2: [(5, 5, "c"), (6, 5, "c")], 3: [(6, -2, "x")]},
    )
    items = spark.createDataFrame(
        [(5, 1.25, ["toys"])], "item_idx int, price double, category array<string>"
    )
    found = {
        r["item_idx"]: r for r in features.item_features(before(frame, CUT), items, CUT).collect()
    }
    five = found[5]
    assert (five["n_events"], five["n_users"], five["n_events_7d"], five["n_events_90d"]) == (
        3,
        2,
        2,
        3,
    )
    assert five["growth"] == pytest.approx((3 / 7) / (3 / 28))
    assert (five["repeat_rate"], five["price"], five["category"]) == (0.5, 1.25, ["toys"])
    assert (five["age_days"], five["last_event_days"]) == (30, 3)
    assert (found[6]["n_users"], found[6]["price"]) == (1, None)


Event = tuple[int, float, float | None, str, str | None]


def log_frame(spark: SparkSession, events_of_users: Mapping[int, Iterable[Event]]) -> DataFrame:
    """user -> (item, days before the cutoff, value, session, order), oldest first."""
    data: list[Any] = []
    for user, events in events_of_users.items():
        rows = [
            (item, CUT - timedelta(days=days), "purchase", 1.0, value, session, order)
            for item, days, value, session, order in events
        ]
        data.append((user, rows, sorted({row[0] for row in rows}), 0))
    return spark.createDataFrame(data, schema.HISTORIES)


def test_orders_of_a_user_by_hand(spark: SparkSession) -> None:
    log = log_frame(
        spark,
        {
            # Order a has items 5 and 6, b has 5 and 7, c has 5: five pairs, of which item 5 in b
            # and in c are repeats. Order b reaches into the last 90 days, c into the last 28.
            1: [
                (5, 100, 1.0, "s1", "a"),
                (6, 100, None, "s1", "a"),
                (5, 100, 2.0, "s1", "a"),
                (5, 91, 4.0, "s2", "b"),
                (7, 89, 1.0, "s2", "b"),
                (5, 28, 1.0, "s3", "c"),
                (5, -1, 50.0, "s4", "d"),
            ],
            # Without order ids, sessions count. No event has a value.
            2: [(15, 29, None, "s", None), (15, 28.5, None, "t", None), (1, 3, None, "t", None)],
            # Item 5 in order 15 is another pair than item 51 in order 5.
            3: [(5, 90, 0.0, "s", "15"), (51, 90, 0.0, "s", "5")],
        },
    )
    names = ("order_size", "repeat_share", "mean_value", "n_orders_28d", "n_orders_90d")
    rows = features.user_features(before(log, CUT), CUT).collect()
    by_user = {row["user_idx"]: tuple(row[name] for name in names) for row in rows}
    assert by_user == {
        1: (5 / 3, 2 / 5, 9 / 6, 1, 2),
        2: (3 / 2, 1 / 3, None, 1, 2),
        3: (1.0, 0.0, 0.0, 0, 2),
    }


def test_popularity_and_new_users_by_hand(spark: SparkSession) -> None:
    days_of_users = {1: (30, 3), 2: (5,), 3: (20, 2, 1), 4: (14,), 5: (28,)}
    log = log_frame(
        spark,
        {
            user: [(5, days, 1.0, "s", None) for days in (*past_days, -1)]
            for user, past_days in days_of_users.items()
        },
    )
    no_items = items(spark, [])
    [row] = features.item_features(before(log, CUT), no_items, CUT).collect()
    ages = [days for past_days in days_of_users.values() for days in past_days]
    popularity = {
        half_life: sum(0.5 ** (age / half_life) for age in ages)
        for half_life in (3, 7, 14, 30, 60, 120)
    }
    for half_life, expected in popularity.items():
        value = row[f"popularity_{half_life}d"]
        assert value == pytest.approx(expected, rel=0, abs=len(ages) * 2**-33)
        assert (value * 2**32).is_integer()
    expected_trend = (popularity[7] / 7 + 1 / 30) / (popularity[30] / 30 + 1 / 30)
    assert row["trend"] == pytest.approx(expected_trend, rel=1e-8)
    assert (row["new_users_14d"], row["new_users_28d"]) == (2, 4)
    assert (row["price"], row["price_change"]) == (None, None)


def test_the_trend_of_an_item_that_sells_evenly_is_one(spark: SparkSession) -> None:
    """Items 1 and 2 sell daily and every tenth day, 3 more and more, 4 no longer, 5 long ago."""
    ages_of_items: dict[int, Iterable[float]] = {
        1: np.arange(1500) + 0.5,
        2: 10.0 * np.arange(150) + 5,
        3: np.arange(10) + 0.5,
        4: np.arange(60, 90) + 0.5,
        5: np.arange(900, 990) + 0.5,
    }
    log = log_frame(
        spark,
        {
            item: [(item, float(age), 1.0, "s", None) for age in sorted(ages, reverse=True)]
            for item, ages in ages_of_items.items()
        },
    )
    rows = features.item_features(before(log, CUT), items(spark, []), CUT).collect()
    trend = {row["item_idx"]: row["trend"] for row in rows}
    assert trend[1] == pytest.approx(1, abs=1e-3)
    assert trend[2] == pytest.approx(1, abs=0.05)
    assert trend[3] > 1.5
    assert trend[4] < 0.3
    assert trend[5] == pytest.approx(1, abs=1e-6)


def test_the_price_changes_by_what_it_was_28_days_before(spark: SparkSession) -> None:
    catalogue = items(
        spark,
        [
            ("i5", -60, "a", 1.0), ("i5", -29, "a", 2.0), ("i5", -28, "a", 3.0),
            ("i5", -1, "a", 5.0), ("i5", 0, "a", 9.0),
            ("i6", -10, "new", 4.0),
            ("i7", -40, "free before", 0.0), ("i7", -2, "free before", 4.0),
            ("i8", -40, "free", 4.0), ("i8", -2, "free", 0.0),
            ("i9", -40, "as before", 4.0),
        ],
    )  # fmt: skip
    log = log_frame(spark, {1: [(item, 1, 1.0, "s", None) for item in (5, 6, 7, 8, 9, 10)]})
    rows = features_of_the_night(log, catalogue, "item_features").collect()
    price_change = {row["item_idx"]: row["price_change"] for row in rows}
    assert price_change == {5: 2.5, 6: None, 7: None, 8: None, 9: 1.0, 10: None}


def features_of_the_night(log: DataFrame, catalogue: DataFrame, table: str) -> DataFrame:
    """The rows of `table` as of `CUT`, as stage build_features makes them of all events."""
    context: Any = SimpleNamespace(read=lambda name: {"items": catalogue}[name])
    rows = build_features._FEATURE_ROWS[table](context, before(log, CUT), CUT)
    return rows.select(*schema_of(table).names)


def schema_of(table: str) -> Any:
    return {"user_features": schema.USER_FEATURES, "item_features": schema.ITEM_FEATURES}[table]


def random_log(seed: int) -> dict[int, list[Event]]:
    """120 users with events on few items, before the cutoff, at the cutoff and after it."""
    generator = np.random.default_rng(seed)
    events_of_users: dict[int, list[Event]] = {}
    for user in range(120):
        past_ages = np.sort(generator.exponential(40, 12))[::-1]
        ages = [*past_ages, 0.0, *-np.sort(generator.exponential(5, 3))]
        events_of_users[user] = [
            (
                int(generator.integers(6)),
                float(age),
                float(generator.gamma(2.0)),
                f"s{n // 3}",
                f"o{n // 2}" if generator.random() < 0.5 else None,
            )
            for n, age in enumerate(ages)
        ]
    return events_of_users


CATALOGUE = [
    (f"i{item}", days, f"item {item} of day {days}", 1.0 + (7 * item - days) % 11)
    for item in range(6)
    for days in (-60, -28, -27, -1, 0, 3)
]


def bits(rows: DataFrame) -> list[str]:
    return sorted(repr(row) for row in rows.collect())


@pytest.mark.parametrize("table", ["user_features", "item_features"])
def test_features_have_the_same_bits_in_any_order(spark: SparkSession, table: str) -> None:
    log, catalogue = log_frame(spark, random_log(1)), items(spark, CATALOGUE)
    expected = bits(features_of_the_night(log.coalesce(1), catalogue, table))
    assert len(expected) == {"user_features": 120, "item_features": 6}[table]
    for n_partitions, seed in ((2, 1), (7, 2)):
        shuffled_log = log.orderBy(F.rand(seed)).repartition(n_partitions)
        shuffled_catalogue = catalogue.orderBy(F.rand(seed)).repartition(n_partitions)
        assert bits(features_of_the_night(shuffled_log, shuffled_catalogue, table)) == expected


@pytest.mark.parametrize("table", ["user_features", "item_features"])
def test_features_do_not_change_with_anything_at_or_after_the_cutoff(
    spark: SparkSession, table: str
) -> None:
    """Item, value, session, order, price and text of all rows at or after the cutoff differ."""

    def scrambled(event: Event) -> Event:
        item, days, value, _, _ = event
        return event if days > 0 else (item + 1, days, 99.0 + (value or 0.0), "scrambled", None)

    log = random_log(2)
    scrambled_log = {user: [scrambled(event) for event in events] for user, events in log.items()}
    scrambled_catalogue = [
        row if row[1] < 0 else (row[0], row[1], "scrambled", 100.0 + row[3]) for row in CATALOGUE
    ]
    assert scrambled_log != log
    assert scrambled_catalogue != CATALOGUE
    rows = features_of_the_night(log_frame(spark, log), items(spark, CATALOGUE), table)
    scrambled_rows = features_of_the_night(
        log_frame(spark, scrambled_log), items(spark, scrambled_catalogue), table
    )
    assert bits(scrambled_rows) == bits(rows)
    # Every feature has values here, so none is equal because it is null everywhere.
    n_values = rows.agg(*[F.count(name).alias(name) for name in rows.columns]).collect()[0].asDict()
    assert {name for name, n in n_values.items() if not n} <= {"category"}


def night(days: int) -> date:
    return (CUT + timedelta(days=days)).date()


def items(spark: SparkSession, rows: Sequence[tuple[str, int, str | None, float]]) -> DataFrame:
    data: list[Any] = [
        (
            i,
            int(i[1:]),
            name,
            None,
            price,
            name,
            None,
            CUT + timedelta(days=d),
            night(d),
            *[None] * 3,
        )
        for i, d, name, price in rows
    ]
    return spark.createDataFrame(data, schema.ITEMS)


def test_the_name_is_the_latest_before_the_cutoff(spark: SparkSession) -> None:
    frame = items(
        spark,
        [
            ("i1", -9, "old", 1.0),
            ("i1", -3, "new", 2.0),
            ("i1", -1, None, 3.0),
            ("i1", 0, "after", 4.0),
        ],
    )
    row = features.items_as_of(frame, CUT).collect()[0]
    assert (row["item_name"], row["price"]) == ("new", 3.0)


def test_the_latest_row_that_says_so_decides_what_is_available(spark: SparkSession) -> None:
    def row(item: int, day: int, available: bool | None, begin: int | None, end: int | None) -> Any:
        moments = [None if d is None else CUT + timedelta(days=d) for d in (begin, end)]
        valid_from = CUT + timedelta(days=day)
        return (f"i{item}", item, *[None] * 5, valid_from, night(day), available, *moments)

    rows = [
        row(1, -9, False, None, None), row(1, -5, True, None, None), row(1, -2, None, None, None),
        row(2, -9, True, None, None), row(2, -1, False, None, None), row(2, 0, True, None, None),
        row(3, -9, True, None, -5), row(3, -1, True, None, None),  # the end was taken back
        row(4, -9, True, 0, 1), row(5, -9, True, 1, None), row(6, -9, True, None, 0),
        row(7, -9, None, None, None), row(8, -9, False, -1, 1),
    ]  # fmt: skip
    frame = spark.createDataFrame(rows, schema.ITEMS)
    found = {r["item_idx"]: r["available"] for r in features.items_as_of(frame, CUT).collect()}
    assert found == {1: True, 2: False, 3: True, 4: True, 5: False, 6: False, 7: None, 8: False}
    assert features.says_availability(frame)
    assert not features.says_availability(frame.where("item_idx IN (7) OR available"
                                                      " AND available_from IS NULL"
                                                      " AND available_until IS NULL"))  # fmt: skip


def test_the_catalogue_night_by_night_equals_at_once(spark: SparkSession) -> None:
    rows = [("i1", 0, "a", 1.0), ("i1", 1, "a", 1.0), ("i1", 2, "b", 1.0), ("i1", 3, "a", 1.0),
            ("i2", 1, "x", 1.0), ("i2", 3, "x", 2.0)]  # fmt: skip
    at_once = features.changed_items(items(spark, rows), items(spark, []))
    state = items(spark, [])
    for day in range(4):
        landed = items(spark, [r for r in rows if r[1] == day])
        state = state.unionByName(features.changed_items(landed, state)).localCheckpoint()
    want = sorted(str(r) for r in at_once.collect())
    assert sorted(str(r) for r in state.collect()) == want
    assert len(want) == 5
    again = items(spark, [r for r in rows if r[1] == 1])
    elsewhere = state.where(F.col("ingest_date") != F.lit(night(1)))
    assert features.changed_items(again, elsewhere).count() == 1  # what that night said, once more


def test_a_later_night_may_correct_what_holds_since_the_same_time(spark: SparkSession) -> None:
    """A catalogue whose `valid_from` never moves: a new content counts, the same one does not."""
    told = items(spark, [("i1", 0, "Lmap", 1.0), ("i2", 0, "Chair", 1.0)])
    now = items(spark, [("i1", 0, "Lamp", 1.0), ("i2", 0, "Chair", 1.0)])
    now = now.withColumn("ingest_date", F.lit(night(5)))
    new = features.changed_items(now, told)
    assert [(r["item_id"], r["item_name"]) for r in new.collect()] == [("i1", "Lamp")]
    for rows in (told.unionByName(new), new.unionByName(told)):
        found = features.items_as_of(rows, CUT + timedelta(days=1)).collect()
        assert {r["item_id"]: r["item_name"] for r in found} == {"i1": "Lamp", "i2": "Chair"}
