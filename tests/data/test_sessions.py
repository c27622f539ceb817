"""Sessions: boundaries, Spark's own session_window, and incremental = from scratch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Sessions
from recspark.data import sessions

pytestmark = pytest.mark.spark
T0 = datetime(2010, 12, 1, 22, 0, tzinfo=UTC)


def events(
    spark: SparkSession, rows: list[tuple[str, float]], shown: set[tuple[str, float]] | None = None
) -> DataFrame:
    """Rows of (user, minutes after T0); event_id names both. Those `shown` are impressions."""
    data: list[Any] = []
    for user, minutes in rows:
        at = T0 + timedelta(minutes=minutes)
        event_id = f"{user}@{minutes:09.2f}"
        kind = "impression" if (user, minutes) in (shown or ()) else "purchase"
        data.append(
            (event_id, user, None, None, "i1", kind, at, 1.0, 1.0, None, at.date(), at.date())
        )
    return spark.createDataFrame(data, schema.EVENTS)


def session_list(frame: DataFrame) -> list[tuple[str, int, float]]:
    rows = frame.orderBy("user_id", "started_at").collect()
    return [
        (r["user_id"], r["n_events"], (r["ended_at"] - r["started_at"]).total_seconds() / 60)
        for r in rows
    ]


def make(
    spark: SparkSession,
    rows: list[tuple[str, float]],
    settings: Sessions,
    shown: set[tuple[str, float]] | None = None,
) -> DataFrame:
    return sessions.sessions(sessions.with_session_id(events(spark, rows, shown), settings))


def test_a_gap_of_exactly_the_limit_stays_in(spark: SparkSession) -> None:
    settings = Sessions(gap_minutes=30, max_minutes=None)
    found = make(spark, [("a", 0), ("a", 30), ("a", 60.02)], settings)
    assert session_list(found) == [("a", 2, 30.0), ("a", 1, 0.0)]


def test_a_session_runs_across_midnight(spark: SparkSession) -> None:
    found = make(spark, [("a", 110), ("a", 130)], Sessions(gap_minutes=30, max_minutes=None))
    row = found.collect()[0]
    assert (row["n_events"], str(row["started_date"])) == (2, "2010-12-01")
    assert row["ended_at"].day == 2


def test_the_maximum_length_cuts_a_chain_counted_from_its_start(spark: SparkSession) -> None:
    rows = [("a", float(m)) for m in range(0, 100, 10)]
    found = make(spark, rows, Sessions(gap_minutes=15, max_minutes=40))
    assert session_list(found) == [("a", 4, 30.0), ("a", 4, 30.0), ("a", 2, 10.0)]


def test_impressions_hold_a_session_together_and_are_none_of_its_items(
    spark: SparkSession,
) -> None:
    rows = [("a", 0.0), ("a", 20.0), ("a", 40.0), ("a", 200.0)]
    settings = Sessions(gap_minutes=30, max_minutes=None)
    found = make(spark, rows, settings, {("a", 20.0), ("a", 200.0)}).orderBy("started_at").collect()
    assert session_list(make(spark, rows, settings, {("a", 20.0)})) == [
        ("a", 2, 40.0),
        ("a", 1, 0.0),
    ]
    assert [(r["items"], [s["event_at"] for s in r["shown"]]) for r in found] == [
        (["i1", "i1"], [(T0 + timedelta(minutes=20)).replace(tzinfo=None)]),
        ([], [(T0 + timedelta(minutes=200)).replace(tzinfo=None)]),
    ]
    none = make(spark, rows, Sessions(gap_minutes=30, impression_types=()), {("a", 20.0)})
    assert session_list(none) == [("a", 3, 40.0), ("a", 1, 0.0)]


def test_equal_to_spark_session_window_without_a_length_limit(spark: SparkSession) -> None:
    rng = np.random.default_rng(1)
    rows = sorted({(f"u{u}", float(m)) for u in range(9) for m in rng.integers(0, 900, 60)})
    frame = events(spark, rows)
    ours = sessions.sessions(
        sessions.with_session_id(frame, Sessions(gap_minutes=17, max_minutes=None))
    )
    # session_window's end is exclusive by one gap, and an event exactly at its end joins.
    theirs = frame.groupBy("user_id", F.session_window("event_at", "17 minutes").alias("w")).agg(
        F.count(F.lit(1)).alias("n"), F.min("event_at").alias("a"), F.max("event_at").alias("b")
    )
    want = [(r["user_id"], r["n"], r["a"], r["b"]) for r in theirs.collect()]
    got = [(r["user_id"], r["n_events"], r["started_at"], r["ended_at"]) for r in ours.collect()]
    assert sorted(got) == sorted(want)
    assert len(got) > 100


def test_adding_a_user_renumbers_nobody(spark: SparkSession) -> None:
    settings = Sessions(gap_minutes=30, max_minutes=None)
    rows = [("b", 0.0), ("b", 100.0), ("c", 5.0)]
    alone = {r["session_id"] for r in make(spark, rows, settings).collect()}
    more = {r["session_id"] for r in make(spark, [("a", 1.0), *rows], settings).collect()}
    assert alone < more
    assert len(more) == 4


@pytest.mark.parametrize("max_minutes", [None, 45.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reopening_equals_making_all_again(
    spark: SparkSession, seed: int, max_minutes: float | None
) -> None:
    """Late, early and removed events: only reopened owners' endings are made again, same result."""
    settings = Sessions(gap_minutes=20, max_minutes=max_minutes)
    rng = np.random.default_rng(seed)
    rows = sorted({(f"u{u}", float(m)) for u in range(6) for m in rng.integers(0, 400, 25)})
    flags = rng.random(len(rows))
    shown = {row for row in rows if rng.random() < 0.4}
    before = [r for r, f in zip(rows, flags) if f > 0.15]
    after = [r for r, f in zip(rows, flags) if f < 0.9]
    after += [("new", 3.0), ("u0", 401.0)]
    old = make(spark, before, settings, shown).cache()
    now = events(spark, after, shown)
    changes = events(spark, sorted(set(before) ^ set(after)), shown)
    from_where = sessions.reopened(changes, old, settings)
    redo = (
        now.withColumn("owner", sessions.owner())
        .join(from_where, on="owner", how="inner")
        .where("event_at >= anchor")
    )
    new = sessions.sessions(sessions.with_session_id(redo, settings))
    kept = old.withColumn("owner", sessions.owner()).join(from_where, on="owner", how="left")
    kept = kept.where("anchor IS NULL OR started_at < anchor").select(*schema.SESSIONS.names)
    got = sorted(map(str, kept.unionByName(new).collect()))
    want = sorted(map(str, make(spark, after, settings, shown).collect()))
    assert got == want


def test_one_shuffle_by_owner(spark: SparkSession) -> None:
    frame = events(spark, [("a", 0.0), ("b", 1.0)])
    made = sessions.sessions(sessions.with_session_id(frame, Sessions()))
    plan = made._jdf.queryExecution().executedPlan().toString()
    assert plan.count("Exchange hashpartitioning") <= 2
