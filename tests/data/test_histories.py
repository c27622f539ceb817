"""Histories: merged night by night equals made from scratch; slices at a cutoff; weights in the
row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features, Sessions
from recspark.data import histories, sessions
from recspark.data.interactions import before, decayed_item_weights, interactions, queries

pytestmark = pytest.mark.spark
T0 = datetime(2010, 12, 1, tzinfo=UTC)
FEATURES = Features(history_buckets=4)
SESSIONS = Sessions(gap_minutes=30, max_minutes=None)


def events(spark: SparkSession, rows: list[tuple[str, str, float]]) -> DataFrame:
    data: list[Any] = [
        (f"{u}{i}{h}", u, None, None, i, kind(h), T0 + timedelta(hours=h), 2.0, 1.0, None,
         (T0 + timedelta(hours=h)).date(), T0.date())
        for u, i, h in rows
    ]  # fmt: skip
    return spark.createDataFrame(data, schema.EVENTS)


def kind(hours: float) -> str:
    return "impression" if hours % 7 == 4 else "purchase"


def dictionaries(spark: SparkSession) -> tuple[DataFrame, DataFrame]:
    users = spark.createDataFrame([(f"u{n}", n, T0.date()) for n in range(9)], schema.USER_IDS)
    items = spark.createDataFrame([(f"i{n}", n, T0.date()) for n in range(9)], schema.ITEM_IDS)
    return users, items


def update(spark: SparkSession, old: DataFrame, now: DataFrame, changes: DataFrame) -> DataFrame:
    users, items = dictionaries(spark)
    made = sessions.sessions(sessions.with_session_id(now, SESSIONS))
    from_where = sessions.reopened(changes, made, SESSIONS).cache()
    redo = now.withColumn("owner", sessions.owner()).join(from_where, on="owner", how="inner")
    labelled = sessions.with_session_id(redo.where("event_at >= anchor"), SESSIONS)
    new = histories.suffixes(labelled, users, items, FEATURES).cache()
    changed = from_where.join(users.withColumnRenamed("user_id", "owner"), on="owner", how="inner")
    return histories.merged(
        old, changed.select("user_idx", "changed_at"), new.drop("changed_at"), 4
    )


def empty(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([], schema.HISTORIES)


def rows_of(frame: DataFrame) -> list[str]:
    return sorted(str(r) for r in frame.select(*schema.HISTORIES.names).collect())


def test_merging_equals_making_from_scratch(spark: SparkSession) -> None:
    """Three nights with late and removed events, against all events at once."""
    rng = np.random.default_rng(1)
    drawn = zip(rng.integers(0, 9, 180), rng.integers(0, 9, 180), rng.integers(0, 200, 180))
    rows = sorted({(f"u{u}", f"i{i}", float(h)) for u, i, h in drawn})
    night = rng.integers(0, 3, len(rows))
    state, have = empty(spark), set()
    for n in range(3):
        now = have | {r for r, k in zip(rows, night) if k == n}
        if n == 2:  # a corrected landing takes some events back, one user loses all
            now = {r for r in now if r[2] % 7 and r[0] != "u1"}
        changes = events(spark, sorted(now ^ have))
        state = update(spark, state, events(spark, sorted(now)), changes).cache()
        have = now
    everything = events(spark, sorted(have))
    assert rows_of(state) == rows_of(update(spark, empty(spark), everything, everything))
    assert "u1" not in {r[0] for r in have}
    acts = {(r[0], r[1]) for r in have if kind(r[2]) == "purchase"}
    seen = {(f"u{r['user_idx']}", f"i{i}") for r in state.collect() for i in r["seen"]}
    assert seen == acts
    types = state.select(F.explode("history.event_type")).distinct().collect()
    assert [r[0] for r in types] == ["purchase"]
    assert len(acts) < len({r[:2] for r in have})  # some items were only shown
    assert state.where("user_idx = 1").count() == 0


def test_before_slices_events_and_seen(spark: SparkSession) -> None:
    rows = events(spark, [("u1", "i1", 0), ("u1", "i2", 5), ("u2", "i3", 5)])
    made = update(spark, empty(spark), rows, rows)
    cutoff = T0 + timedelta(hours=5)  # an event at the cutoff is after it
    found = before(made, cutoff).collect()
    assert [(r["user_idx"], [e["item_idx"] for e in r["history"]], r["seen"]) for r in found] == [
        (1, [1], [1])
    ]
    kept = {r["user_idx"]: r["seen"] for r in before(made, cutoff, keep_empty=True).collect()}
    assert kept == {1: [1], 2: []}


def test_weights_decay_to_the_cutoff(spark: SparkSession) -> None:
    rows = events(spark, [("u1", "i1", 0), ("u1", "i1", 24), ("u1", "i2", 36), ("u2", "i1", 36)])
    made = update(spark, empty(spark), rows, rows)
    cutoff = T0 + timedelta(hours=48)
    mine = before(made, cutoff)
    found = {
        (r["user_idx"], r["item_idx"]): (r["weight"], r["n_events"])
        for r in interactions(mine, cutoff, 1.0).collect()
    }
    assert found[1, 1] == (pytest.approx(0.25 + 0.5), 2)
    assert found[1, 2] == (pytest.approx(0.5**0.5), 1)
    plain = {
        (r["user_idx"], r["item_idx"]): r["weight"]
        for r in interactions(mine, cutoff, None).collect()
    }
    assert plain == {(1, 1): 2.0, (1, 2): 1.0, (2, 1): 1.0}
    totals = {r["item_idx"]: r["weight"] for r in decayed_item_weights(mine, cutoff, 1.0).collect()}
    assert totals[1] == pytest.approx(0.75 + 0.5**0.5, abs=1e-9)


def test_queries_mask_seen_only_in_novel_mode(spark: SparkSession) -> None:
    rows = events(spark, [("u1", "i2", 0), ("u1", "i1", 1)])
    mine = update(spark, empty(spark), rows, rows)
    novel = queries(mine, "novel").collect()[0]
    repeat = queries(mine, "repeat").collect()[0]
    assert (novel["seen"], repeat["seen"]) == ([1, 2], [])
    assert [e["item_idx"] for e in novel["history"]] == [2, 1]
    assert queries(mine, "novel").schema == schema.QUERIES


def test_interactions_shuffle_nothing(spark: SparkSession) -> None:
    rows = events(spark, [("u1", "i2", 0)])
    table = update(spark, empty(spark), rows, rows).localCheckpoint()
    made = interactions(before(table, T0 + timedelta(days=1)), T0 + timedelta(days=1), 30.0)
    assert "Exchange" not in made._jdf.queryExecution().executedPlan().toString()


def test_event_weights_by_type(spark: SparkSession) -> None:
    frame = spark.createDataFrame([("purchase",), ("view",), ("other",)], "event_type string")
    settings = Features(event_weights={"purchase": 3.0, "view": 0.5}, other_weight=1.0)
    weights = frame.select(
        histories.event_weight(settings).alias("w"), F.col("event_type")
    ).collect()
    assert {r["event_type"]: r["w"] for r in weights} == {
        "purchase": 3.0,
        "view": 0.5,
        "other": 1.0,
    }
