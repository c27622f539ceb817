"""Verdicts of the catalogue: the same as those of events."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.catalogue_checks import check_items, clean_items
from recspark.data.event_checks import count_verdicts, quarantine_of
from recspark.errors import SchemaError

pytestmark = pytest.mark.spark
NIGHT = date(2024, 5, 31)
NOON = datetime(2024, 5, 31, 12)
YEAR_20000 = 568_971_820_800_000_000


def an_item(**changes: Any) -> dict[str, Any]:
    item = dict.fromkeys(schema.RAW_ITEMS.names) | {
        "item_id": "i1",
        "item_name": "Lamp",
        "category": ["home", "light"],
        "price": 3.5,
        "text": "Lamp",
        "valid_from": NOON,
        "row": '{"raw": 1}',
    }
    return {**item, **changes}


def raw(spark: SparkSession, items: list[dict[str, Any]]) -> DataFrame:
    rows = [tuple(item[name] for name in schema.RAW_ITEMS.names) for item in items]
    return spark.createDataFrame(rows, schema.RAW_ITEMS)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"item_id": None, "price": -1.0}, "no item"),
    ({"item_id": " "}, "no item"),
    ({"valid_from": None}, "no time"),
    ({"item_name": "K\ufffdhler"}, "bad encoding: item_name"),
    ({"text": "K\ufffdhler"}, "bad encoding: text"),
    ({"category": ["home", "K\ufffdche"]}, "bad encoding: category"),
    ({"price": float("nan")}, "price not finite"),
    ({"price": float("inf")}, "price not finite"),
    ({"price": -3.0}, "price negative"),
    ({"reason": "the source says no", "item_id": None}, "the source says no"),
]
GOOD: list[dict[str, Any]] = [
    {"item_id": "g1"},
    {"item_id": "g2", "price": None, "item_name": None, "category": None, "text": None},
    {"item_id": "g3", "price": 0.0, "valid_from": datetime(1970, 1, 1)},
    {"item_id": "g4", "valid_from": datetime(2024, 6, 30)},  # holds from then on
]


def test_every_reason_and_every_copy(spark: SparkSession) -> None:
    """A bad price loses the whole row; of rows for the same time the greatest stays."""
    items = [an_item(row=f"{i:02d}", **bad) for i, (bad, _) in enumerate(BAD)]
    items += [an_item(**good) for good in GOOD]
    items += [an_item(item_id="twice", item_name=name) for name in ("Bench", None, "Chair")]
    frame = raw(spark, items).unionByName(
        raw(spark, [an_item(row="far")]).withColumn(
            "valid_from", F.timestamp_micros(F.lit(YEAR_20000))
        )
    )
    checked = check_items(frame)
    counts = count_verdicts(checked, frame)
    counts.check()
    assert (counts.n_in, counts.n_clean, counts.n_quarantined) == (18, 5, 11)
    assert counts.by_repeat == {"twice in this landing": 2}
    rows = quarantine_of(checked, NIGHT, "shop", "catalogue").collect()
    assert {row["input"] for row in rows} == {"catalogue"}
    wanted = {f"{i:02d}": reason for i, (_, reason) in enumerate(BAD)}
    assert {row["row"]: row["reason"] for row in rows} == {
        **wanted,
        "far": "time beyond the year 9999",
    }
    kept = {row["item_id"]: row["item_name"] for row in clean_items(checked).collect()}
    assert kept == {"g1": "Lamp", "g2": None, "g3": "Lamp", "g4": "Lamp", "twice": "Chair"}


def test_what_was_refused_before_is_not_refused_twice(spark: SparkSession) -> None:
    """A dump that tells no times gives the row another one every night."""
    items = [
        an_item(price=-1.0, valid_from=datetime(2024, 5, 30)),
        an_item(row="b", price=-2.0),
        an_item(item_id="i2"),
    ]
    night_before = quarantine_of(
        check_items(raw(spark, [an_item(price=-1.0)])), NIGHT, "shop", "catalogue"
    )
    checked = check_items(raw(spark, items), night_before.select("row_id"))
    found = {(row["row"], row["verdict"], row["reason"]) for row in checked.collect()}
    assert found == {
        (None, "duplicate", "already refused"),
        ("b", "quarantined", "price negative"),
        (None, "clean", None),
    }


def test_a_source_that_breaks_the_schema_is_told(spark: SparkSession) -> None:
    with pytest.raises(
        SchemaError, match=r"schema\.RAW_ITEMS; expected item_id string, found none"
    ):
        check_items(raw(spark, [an_item()]).drop("item_id"))
