"""`recspark.fit`: the models of the nightly run on a frame of events, without a night."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import recspark
from recspark.errors import ConfigError, EmptyDataError, ModelError, SchemaError
from recspark.models.base import FitOptions
from recspark.models.registry import make
from recspark.testing import synth
from tests.conftest import spark_conf
from tests.contract.documented import documented

pytestmark = [pytest.mark.spark, pytest.mark.torch]
SHORT: dict[str, dict[str, Any]] = {
    "als": {"iterations": 3, "embedding_size": 8},
    "item2vec": {"epochs": 1, "min_count": 1, "n_blocks": 2},
    "multvae": {"epochs": 2, "batch_size": 32},
    "gru4rec": {"epochs": 1, "batch_size": 32},
}
ALGORITHMS = ["popular", "item_knn", "ease", "als", "item2vec", "session_knn", "multvae", "gru4rec"]
LOG, HELD = synth.hold_out_newest(synth.power_law(120, 40))
NOW = datetime(2024, 6, 1, tzinfo=UTC)


def frame(spark: SparkSession, log: synth.Log = LOG) -> DataFrame:
    """Users are whole numbers, items are texts; the times are whole seconds before `NOW`."""
    rows = [
        (int(u) * 1000 + 7, f"item {i}", NOW - timedelta(seconds=int(age * 86_400)), float(w))
        for u, i, age, w in zip(log.user_idx, log.item_idx, log.age, log.weight, strict=True)
    ]
    return spark.createDataFrame(rows, "user long, item string, time timestamp, weight double")


@pytest.fixture(scope="module")
def events(spark: SparkSession) -> DataFrame:
    return frame(spark).cache()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_kind_of_algorithm(events: DataFrame, algorithm: str) -> None:
    model = recspark.fit(algorithm, events, **SHORT.get(algorithm, {}))
    lists = model.recommend(k=5)
    assert lists.schema.simpleString() == "struct<user:bigint,item:string,rank:int,score:float>"
    rows = lists.collect()
    seen = {(row["user"], row["item"]) for row in events.collect()}
    assert rows
    assert not seen & {(row["user"], row["item"]) for row in rows}
    by_user: dict[int, list[Any]] = {}
    for row in rows:
        by_user.setdefault(row["user"], []).append(row)
    for theirs in by_user.values():
        ranked = sorted(theirs, key=lambda row: row["rank"])
        assert [row["rank"] for row in ranked] == list(range(1, len(ranked) + 1))
        scores = [row["score"] for row in ranked]
        assert scores == sorted(scores, reverse=True)
    model.close()


def test_it_is_the_model_of_the_nightly_run(spark: SparkSession, events: DataFrame) -> None:
    """The same scores as from a Dataset of the same events; integers are another's, so by name."""
    data = synth.dataset(spark, LOG)
    direct = make("ease", {"half_life_days": 30}).fit(data, FitOptions())
    want = {
        (int(r["user_idx"]) * 1000 + 7, f"item {r['item_idx']}"): r["score"]
        for r in direct.recommend(synth.ask(data), 5).collect()
    }
    days = (NOW - synth.CUTOFF.replace(tzinfo=UTC)).days
    moved = events.withColumn("time", F.col("time") - F.expr(f"INTERVAL {days} DAYS"))
    model = recspark.fit("ease", moved, cutoff=synth.CUTOFF, half_life_days=30)
    rows = model.recommend(k=5).collect()
    assert len(rows) == len(want)
    same = [(r["user"], r["item"]) in want for r in rows]
    assert np.mean(same) > 0.99  # ties at the cut go by integer
    for row in rows:
        if (row["user"], row["item"]) in want:
            assert row["score"] == pytest.approx(want[row["user"], row["item"]], rel=1e-3, abs=1e-5)


def test_users_may_be_asked_for(spark: SparkSession, events: DataFrame) -> None:
    model = recspark.fit("popular", events)
    known = events.first()["user"]  # type: ignore[index]
    for asked in ([known, 999_999], spark.createDataFrame([(known,), (999_999,)], "user long")):
        lists = {r["user"]: r["item"] for r in model.recommend(asked, k=1).collect()}
        assert set(lists) == {known, 999_999}  # popular answers cold users
    assert model.recommend([], k=1).count() == 0
    personal = recspark.fit("ease", events)
    assert {r["user"] for r in personal.recommend([known, 999_999], k=1).collect()} == {known}
    repeat = recspark.fit("item_knn", events).recommend([known], k=40, mode="repeat")
    own = {r["item"] for r in events.where(F.col("user") == known).collect()}
    assert own & {r["item"] for r in repeat.collect()}


def test_neighbours_are_named(events: DataFrame) -> None:
    rows = recspark.fit("item_knn", events).neighbours(3).collect()
    assert rows
    assert all(r["item"].startswith("item ") and r["neighbour"] != r["item"] for r in rows)
    with pytest.raises(ModelError, match="als gives no neighbours"):
        recspark.fit("als", events, **SHORT["als"]).neighbours(3)


def test_evaluation_by_hand(spark: SparkSession) -> None:
    """Five users with a and b, one each with c: popular lists what a user lacks, by its count."""
    pairs = [(u, i) for u in range(5) for i in ("a", "b")] + [(7, "a"), (8, "c"), (9, "c")]
    rows = [(u, i, NOW - timedelta(days=1)) for u, i in pairs]
    events = spark.createDataFrame(rows, "user int, item string, time timestamp")
    model = recspark.fit("popular", events, half_life_days=None)
    truth = spark.createDataFrame(
        [(7, "b"), (8, "b"), (9, "unknown"), (99, "a"), (7, "a")], "user int, item string"
    )
    metrics = model.evaluate(truth, ks=[1, 2])
    # 7 lacks b, c: hit at 1. 8 lacks a, b: a, then b. 99 is cold: a. 9 has no known item in truth.
    assert metrics["hit_rate@1"] == pytest.approx(2 / 3)
    assert metrics["hit_rate@2"] == pytest.approx(1)
    assert metrics["ndcg@2"] == pytest.approx((1 + 1 / np.log2(3) + 1) / 3)


def test_nothing_at_or_after_the_cutoff_counts(events: DataFrame) -> None:
    cutoff = NOW - timedelta(days=3)
    earlier = events.where(F.col("time") < F.lit(cutoff))
    one = recspark.fit("item_knn", events, cutoff=cutoff).recommend(k=5)
    other = recspark.fit("item_knn", earlier, cutoff=cutoff).recommend(k=5)
    assert one.exceptAll(other).count() == other.exceptAll(one).count() == 0


def test_another_time_zone_of_the_session_changes_nothing(
    spark: SparkSession, events: DataFrame
) -> None:
    def lists() -> list[tuple[Any, ...]]:
        model = recspark.fit("popular", frame(spark), half_life_days=3)
        return sorted(map(tuple, model.recommend(k=5).collect()))

    want = lists()
    with spark_conf(spark, {"spark.sql.session.timeZone": "America/New_York"}):
        assert lists() == want


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: e.drop("time"), SchemaError, "time is missing, expected timestamp; there are"),
        (lambda e: e.withColumn("user", F.lit(1.5)), SchemaError, "user is double, expected string"),
        (
            lambda e: e.withColumn("item", F.when(F.col("rank") > 2, F.col("item"))),
            SchemaError, "events: 2 rows have no item",
        ),
        (
            lambda e: e.withColumn("weight", F.lit(float("nan"))),
            SchemaError, "rows have no weight that can be read",
        ),
        (lambda e: e.where("1 = 0"), EmptyDataError, "there is no row"),
    ],
)  # fmt: skip
def test_bad_events_are_named(
    events: DataFrame, change: Any, error: type[Exception], message: str
) -> None:
    numbered = events.withColumn("rank", F.lit(3))
    first_two = events.limit(2).withColumn("rank", F.lit(1))
    with pytest.raises(error, match=message):
        recspark.fit("popular", change(numbered.unionByName(first_two)))


def test_wrong_words_are_named(events: DataFrame) -> None:
    with pytest.raises(ConfigError, match=r"no model is called 'eas'\. Did you mean 'ease'"):
        recspark.fit("eas", events)
    with pytest.raises(ConfigError, match="unknown setting 'regg'"):
        recspark.fit("ease", events, regg=3)
    with pytest.raises(EmptyDataError, match="no item has an event before"):
        recspark.fit("ease", events, cutoff=datetime(1999, 1, 1))
    with pytest.raises(ModelError, match="learns from the words of items"):
        recspark.fit("cdl", events)
    with pytest.raises(ConfigError, match="mode = 'new'"):
        recspark.fit("popular", events).recommend(mode="new")  # type: ignore[arg-type]


def test_nothing_is_left_behind(spark: SparkSession, events: DataFrame) -> None:
    context: Any = spark.sparkContext
    before = set(dict(context._jsc.getPersistentRDDs()))
    model = recspark.fit("ease", events)
    model.recommend(k=3).count()
    model.close()
    with pytest.raises(ConfigError):
        recspark.fit("ease", events, reg=-1)
    assert set(dict(context._jsc.getPersistentRDDs())) <= before


def test_a_model_that_reads_features(
    spark: SparkSession, events: DataFrame, tmp_path: Path
) -> None:
    """From another package; of a user whom the events do not have nothing is known."""
    model = recspark.fit(documented(spark, tmp_path, "segments"), events)
    known = [row["user"] for row in events.select("user").distinct().collect()]
    lists = model.recommend([10**9, *known[:3]], k=4).collect()
    assert Counter(row["user"] for row in lists) == dict.fromkeys([10**9, *known[:3]], 4)
    truth = events.select("user", "item").limit(20)
    assert 0 <= model.evaluate(truth, ks=(10,), mode="repeat")["ndcg@10"] <= 1


@pytest.mark.parametrize("name", ["words", "linear"])
def test_only_retrievers_are_fitted_on_events_alone(
    spark: SparkSession, events: DataFrame, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="is of kind (encoder|ranker), which gives no lists"):
        recspark.fit(documented(spark, tmp_path, name), events)


def test_explain_gives_the_users_own_items(spark: SparkSession) -> None:
    """By hand: who has cup and pot is shown tea, as both users of tea have cup, and one has pot."""
    at = datetime(2024, 1, 1)
    carts = {"ann": "cup pot", "bob": "cup tea pot", "eve": "cup tea", "dan": "hat"}
    rows = [(user, item, at) for user, items in carts.items() for item in items.split()]
    events = spark.createDataFrame(rows, "user string, item string, time timestamp")
    with_model = recspark.fit("item_knn", events, half_life_days=None, shrink=0.0)
    lists = with_model.recommend(["ann"], k=5)
    assert [row["item"] for row in lists.collect()] == ["tea"]
    explained = with_model.explain(lists, n=2)
    assert explained.columns == ["user", "item", "reason", "share"]
    found = {row["reason"]: row["share"] for row in explained.collect()}
    cup, pot = 2 / (3 * 2) ** 0.5, 1 / (2 * 2) ** 0.5  # cosines with tea
    assert found == pytest.approx({"cup": cup / (cup + pot), "pot": pot / (cup + pot)}, rel=1e-5)
    # Whole numbers as ids come back as whole numbers.
    numbers = spark.createDataFrame(
        [(u, i, at) for u, i in ((1, 10), (1, 20), (2, 10), (2, 20), (3, 10))],
        "user bigint, item int, time timestamp",
    )
    model = recspark.fit("ease", numbers, reg=0.5, half_life_days=None)
    [row] = model.explain(model.recommend([3], k=1)).collect()
    assert (row["user"], row["item"], row["reason"], row["share"]) == (3, 20, 10, 1.0)
    with pytest.raises(ModelError, match="popular cannot say"):
        recspark.fit("popular", events).explain(lists)
    with_model.close()
