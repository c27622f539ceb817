"""Dictionaries: append-only, the same integers under every partitioning."""

from __future__ import annotations

from datetime import date

import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.data import ids
from recspark.errors import IdRangeError

pytestmark = pytest.mark.spark
NIGHT = date(2010, 12, 9)


def names(spark: SparkSession, values: list[str | None]) -> DataFrame:
    return spark.createDataFrame([(v,) for v in values], "user_id string")


def known(spark: SparkSession, rows: list[tuple[str, int]]) -> DataFrame:
    return spark.createDataFrame([(n, i, NIGHT) for n, i in rows], schema.USER_IDS)


@pytest.mark.parametrize("n_partitions", [1, 3, 7])
def test_new_names_follow_in_order_of_name(spark: SparkSession, n_partitions: int) -> None:
    values = [f"u{n:03d}" for n in range(200)]
    frame = names(spark, [*reversed(values), None, "u007", "u007"]).repartition(n_partitions)
    have = known(spark, [("u050", 0), ("u010", 1)])
    got = {
        r["user_id"]: r["user_idx"]
        for r in ids.new_ids(frame, have, "user_id", "user_idx", NIGHT).collect()
    }
    rest = [v for v in values if v not in ("u050", "u010")]
    assert got == {name: 2 + position for position, name in enumerate(rest)}


def test_nothing_new_gives_no_rows(spark: SparkSession) -> None:
    assert (
        ids.new_ids(
            names(spark, ["a"]), known(spark, [("a", 0)]), "user_id", "user_idx", NIGHT
        ).count()
        == 0
    )


def test_items_beyond_an_int_are_a_named_error(spark: SparkSession) -> None:
    frame = spark.createDataFrame([("x",), ("y",)], "item_id string")
    have = spark.createDataFrame([("a", 2**31 - 2, NIGHT)], schema.ITEM_IDS)
    with pytest.raises(IdRangeError, match="do not fit an int"):
        ids.new_ids(frame, have, "item_id", "item_idx", NIGHT)


def test_the_plan_has_no_single_partition_window(spark: SparkSession) -> None:
    made = ids.new_ids(names(spark, ["a", "b"]), known(spark, []), "user_id", "user_idx", NIGHT)
    assert "SinglePartition" not in made._jdf.queryExecution().executedPlan().toString()
