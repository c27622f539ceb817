"""Dictionaries: append-only, the same integers under every partitioning."""

from __future__ import annotations

from datetime import date

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import ids
from recspark.errors import IdRangeError
from tests.conftest import spark_conf

pytestmark = pytest.mark.spark
NIGHT = date(2010, 12, 9)


def names(spark: SparkSession, values: list[str | None]) -> DataFrame:
    return spark.createDataFrame([(v,) for v in values], "user_id string")


def known(spark: SparkSession, rows: list[tuple[str, int]]) -> DataFrame:
    return spark.createDataFrame([(n, i, NIGHT) for n, i in rows], schema.USER_IDS)


def test_new_names_follow_the_known_ones_whatever_the_partitioning(spark: SparkSession) -> None:
    values = [f"u{n:03d}" for n in range(600)]
    have = known(spark, [("u050", 0), ("u010", 1)])
    made = []
    for n_partitions in (1, 3, 7):
        frame = names(spark, [*reversed(values), None, "u007", "u007"]).repartition(n_partitions)
        rows = ids.new_ids(frame, have, "user_id", "user_idx", NIGHT).collect()
        made.append({r["user_id"]: r["user_idx"] for r in rows})
        assert len(rows) == 598
    assert made[0] == made[1] == made[2]
    assert set(made[0]) == set(values) - {"u050", "u010"}
    assert sorted(made[0].values()) == list(range(2, 600))
    bucket = F.pmod(F.xxhash64("user_id"), F.lit(256))
    of_name = names(spark, values).select("user_id", bucket.alias("bucket")).collect()
    in_order = [r["user_id"] for r in sorted(of_name, key=lambda r: (r["bucket"], r["user_id"]))]
    assert sorted(made[0], key=made[0].__getitem__) == [n for n in in_order if n in made[0]]


def test_planned_anew_a_name_keeps_its_number(spark: SparkSession) -> None:
    """Between counting and writing Spark may forget what was persisted, and plan another way."""
    frame = names(spark, [f"u{n:05d}" for n in range(5000)]).repartition(4)
    partitions = "spark.sql.shuffle.partitions"
    with spark_conf(spark, {partitions: "13", "spark.sql.adaptive.enabled": "false"}):
        made = ids.new_ids(frame, known(spark, []), "user_id", "user_idx", NIGHT)
        spark.catalog.clearCache()
        spark.conf.set(partitions, "5")
        rows = made.collect()
    assert sorted(r["user_idx"] for r in rows) == list(range(5000))


@pytest.mark.parametrize(
    ("new", "before", "example"),
    [
        (["13085", "13085.0", "u1"], [], "13085"),
        (["13085.0"], ["13085", "7"], "13085"),
        (["8.00"], ["8", "13085.0"], "8"),
        (["13085"], ["13085.0"], "13085"),
        (["13085.5", "u1.0", "12"], ["13085", "9.0", "u1"], None),
        (["1"], ["13085", "13085.0"], None),  # told on the night that brought the second
    ],
)
def test_two_spellings_of_one_number_are_told(
    spark: SparkSession,
    caplog: pytest.LogCaptureFixture,
    new: list[str | None],
    before: list[str],
    example: str | None,
) -> None:
    have = known(spark, [(name, i) for i, name in enumerate(before)])
    ids.new_ids(names(spark, new), have, "user_id", "user_idx", NIGHT)
    if example is None:
        assert not caplog.records
    else:
        assert f"user_id: 1 numbers have two spellings, such as '{example}'" in caplog.text


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
