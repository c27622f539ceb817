"""The ladder answers every user it can, without doubles, and says which step gave what."""

from __future__ import annotations

import re

import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.errors import ModelError, SchemaError
from recspark.hybrid import ladder

pytestmark = pytest.mark.spark

Row = tuple[int, int, int, float]


def lists(spark: SparkSession, *rows: Row) -> DataFrame:
    return spark.createDataFrame(list(rows), schema.RECOMMENDED)


def users(spark: SparkSession, *wanted: int) -> DataFrame:
    return spark.createDataFrame([(u,) for u in wanted], schema.columns(user_idx=schema.LONG))


def steps(spark: SparkSession) -> list[tuple[str, DataFrame]]:
    return [
        ("ease", lists(spark, (1, 10, 1, 0.9), (1, 11, 2, 0.8), (1, 12, 3, 0.1), (2, 10, 1, 0.5))),
        ("knn", lists(spark, (2, 10, 1, 7.0), (2, 13, 2, 6.0), (9, 10, 1, 5.0))),
        (
            "popular",
            lists(spark, *[(u, i, i - 9, 20.0 - i) for u in (1, 2, 3, 9) for i in (10, 11, 12)]),
        ),
    ]


EXPECTED = [
    (1, 10, 1, 0.9, "ease", "champion"),
    (1, 11, 2, 0.8, "ease", "champion"),
    (1, 12, 3, 0.1, "ease", "champion"),
    (2, 10, 1, 0.5, "ease", "champion"),
    (2, 13, 2, 6.0, "knn", "fallback:knn"),
    (2, 11, 3, 9.0, "popular", "fallback:popular"),
    (3, 10, 1, 10.0, "popular", "fallback:popular"),
    (3, 11, 2, 9.0, "popular", "fallback:popular"),
    (3, 12, 3, 8.0, "popular", "fallback:popular"),
]


def rows(filled: DataFrame) -> list[tuple]:
    assert filled.schema.simpleString() == ladder.FILLED.simpleString()
    found = [tuple(r) for r in filled.collect()]
    # Only an item of a kept list has reasons.
    assert {b[0]["item_id"] for *_, source, b in found if source == "unchanged"} <= {"own"}
    assert {b for *_, source, b in found if source != "unchanged"} <= {None}
    return [
        (u, i, r, round(s, 4), m, source)
        for u, i, r, s, m, source, _ in sorted(found, key=lambda x: (x[0], x[2]))
    ]


@pytest.mark.parametrize("n_partitions", [1, 5])
def test_each_step_fills_what_is_open(spark: SparkSession, n_partitions: int) -> None:
    given = [(m, frame.repartition(n_partitions)) for m, frame in steps(spark)]
    # User 4 is in no list; user 9 is not asked for.
    assert rows(ladder.fill(given, users(spark, 1, 2, 3, 4), 3)) == EXPECTED


def test_lists_that_still_hold_go_first(spark: SparkSession) -> None:
    last = lists(spark, (3, 20, 1, 2.0), (3, 11, 2, 1.0), (8, 20, 1, 2.0)).selectExpr(
        "*",
        "'ease' AS model",
        "array(named_struct('item_id', 'own', 'item_name', 'a', 'share', float(1))) AS because",
    )
    want = [row for row in EXPECTED if row[0] != 3] + [
        (3, 20, 1, 2.0, "ease", "unchanged"),
        (3, 11, 2, 1.0, "ease", "unchanged"),
        (3, 10, 3, 10.0, "popular", "fallback:popular"),
    ]
    assert rows(ladder.fill(steps(spark), users(spark, 1, 2, 3), 3, last)) == want


def test_shorter_lists_are_the_beginning_of_longer_ones(spark: SparkSession) -> None:
    short = rows(ladder.fill(steps(spark), users(spark, 1, 2, 3), 2))
    assert short == [row for row in EXPECTED if row[2] <= 2]


def test_one_shuffle_and_no_job(spark: SparkSession) -> None:
    spark.sparkContext.setJobGroup("ladder", "plan only")
    try:
        filled = ladder.fill(steps(spark), users(spark, 1, 2, 3), 3)
        assert spark.sparkContext.statusTracker().getJobIdsForGroup("ladder") == []
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)
    plan = filled._jdf.queryExecution().executedPlan().toString()
    assert len(re.findall(r"\bExchange ", plan)) == 1


def test_wrong_input_is_named(spark: SparkSession) -> None:
    with pytest.raises(ModelError, match="ladder of 0 models"):
        ladder.fill([], users(spark, 1), 3)
    with pytest.raises(ModelError, match="k = 0"):
        ladder.fill(steps(spark), users(spark, 1), 0)
    bad = [("ease", steps(spark)[0][1].drop("score"))]
    with pytest.raises(SchemaError, match=r"lists of 'ease': missing columns \['score'\]"):
        ladder.fill(bad, users(spark, 1), 3)
