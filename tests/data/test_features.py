"""Features as of a cutoff, by hand; the catalogue as it changes."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import features
from recspark.data.interactions import before

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


def night(days: int) -> date:
    return (CUT + timedelta(days=days)).date()


def items(spark: SparkSession, rows: list[tuple[str, int, str | None, float]]) -> DataFrame:
    data: list[Any] = [
        (i, int(i[1:]), name, None, price, name, None, CUT + timedelta(days=d), night(d))
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
