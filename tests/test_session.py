"""Work side by side on one session."""

from __future__ import annotations

import threading

import pytest
from pyspark.sql import SparkSession

from recspark.session import together

pytestmark = pytest.mark.spark


def test_results_come_in_the_order_given_from_threads_that_overlap(spark: SparkSession) -> None:
    both = threading.Barrier(2, timeout=60)  # breaks unless both pieces run at one time

    def piece(n: int) -> int:
        both.wait()
        return spark.range(n).count()

    assert together(spark, lambda: piece(3), lambda: piece(5)) == [3, 5]


def test_the_first_error_is_raised_when_all_have_ended(spark: SparkSession) -> None:
    ended = []

    def fails(name: str) -> None:
        raise ValueError(name)

    def works() -> None:
        ended.append(spark.range(7).count())

    with pytest.raises(ValueError, match="first"):
        together(spark, lambda: fails("first"), lambda: fails("second"), works)
    assert ended == [7]


def test_a_job_description_is_inherited(spark: SparkSession) -> None:
    spark.sparkContext.setLocalProperty("recspark.test", "ours")
    try:
        seen = together(spark, lambda: spark.sparkContext.getLocalProperty("recspark.test"))
    finally:
        spark.sparkContext.setLocalProperty("recspark.test", None)  # type: ignore[arg-type]
    assert seen == ["ours"]
