"""The whole evaluation on Spark against the oracle, and against itself partitioned otherwise."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.config import Evaluate
from recspark.errors import EmptyDataError
from recspark.eval.evaluate import (
    COLD_ITEMS,
    POPULATION,
    SEGMENTS,
    MetricRow,
    catalogue,
    cold_items,
    concentration,
    evaluate,
    item_vectors,
    population,
    rows_by_user,
    truth,
)
from recspark.eval.kernel import LIST_METRICS, METRICS, Plan
from recspark.eval.metrics import TRUTH_METRICS, Catalogue
from tests.conftest import spark_conf

pytestmark = pytest.mark.spark

CUTOFF = datetime(2020, 5, 1, tzinfo=UTC)
MODELS = ("popular", "good", "silent")
SETTINGS = Evaluate(horizon_days=7, ks=(3, 1), n_bootstrap=60, seed=4)
KNOWN = tuple(range(10, 70, 3))  # items with an event before the cutoff
LATE = (5, 11, 90)


class World:
    """A small shop, as plain dicts: what the oracle reads and what Spark is given."""

    def __init__(self, n_users: int = 40, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n_users_of = {item: int(rng.integers(1, 4)) for item in KNOWN}
        self.seen: dict[int, set[int]] = {}
        self.segment: dict[int, str] = {}
        self.truth: dict[int, set[int]] = {}
        self.lists: dict[tuple[str, str, int], list[int]] = {}
        for user in range(0, 3 * n_users, 3):
            kind = ("cold", "light", "regular", "heavy")[int(rng.integers(0, 4))]
            self.segment[user] = kind
            self.seen[user] = set() if kind == "cold" else self.pick(rng, KNOWN, 6)
            if rng.random() < 0.9:  # the others have lists and no truth
                self.truth[user] = self.pick(rng, KNOWN + LATE, 5)
            for mode in schema.MODES:
                for model in ("popular", "good"):
                    if rng.random() < 0.8:  # the others have truth and no list
                        listed = [int(i) for i in rng.permutation(KNOWN + LATE)]
                        self.lists[model, mode, user] = listed[: int(rng.integers(1, 6))]
        first = next(u for u, kind in self.segment.items() if kind != "cold" and u in self.truth)
        self.truth[first] = {next(iter(self.seen[first]))}  # nothing new: not in `novel`
        self.vectors = rng.normal(size=(len(KNOWN), 8)).astype(np.float32)
        self.vectors /= np.linalg.norm(self.vectors, axis=1, keepdims=True)
        self.catalogue = Catalogue(
            np.array(KNOWN, np.int32),
            np.array([self.n_users_of[i] for i in KNOWN]),
            self.vectors,
        )

    @staticmethod
    def pick(rng: np.random.Generator, items: tuple[int, ...], most: int) -> set[int]:
        return {int(i) for i in rng.choice(items, int(rng.integers(1, most)), replace=False)}

    def cosine(self, a: int, b: int) -> float:
        left, right = (self.vectors[KNOWN.index(i)].astype(float) for i in (a, b))
        return float(left @ right)

    def frames(self, spark: SparkSession, partitions: int = 2) -> tuple[DataFrame, DataFrame]:
        rows = [
            (model, mode, user, item, rank)
            for (model, mode, user), listed in self.lists.items()
            for rank, item in enumerate(listed, 1)
        ]
        lists = spark.createDataFrame(
            rows, "model string, mode string, user_idx long, item_idx int, rank int"
        )
        truths = spark.createDataFrame(
            [(user, sorted(items)) for user, items in self.truth.items()],
            "user_idx long, items array<int>",
        )
        users = spark.createDataFrame(
            [(u, sorted(self.seen[u]), k) for u, k in self.segment.items() if k != "cold"],
            "user_idx long, seen array<int>, activity string",
        )
        mixed = lists.repartition(partitions, "item_idx")
        return mixed, population(truths, users).repartition(partitions, "items")

    def population(self, mode: str, segment: str) -> dict[int, set[int]]:
        found = {}
        for user, items in self.truth.items():
            left = {i for i in items if i in KNOWN} - (
                self.seen[user] if mode == "novel" else set()
            )
            if left and self.segment[user] in SEGMENTS[segment]:
                found[user] = left
        return found


def run(world: World, lists: DataFrame, users: DataFrame, **changes: Any) -> list[MetricRow]:
    return evaluate(
        lists,
        users,
        world.catalogue,
        SETTINGS.model_copy(update=changes),
        run_date=date(2020, 5, 7),
        kind="backtest",
        cutoff=CUTOFF,
        models=MODELS,
    )


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def rows(spark: SparkSession, world: World) -> list[MetricRow]:
    return run(world, *world.frames(spark))


def by_key(rows: list[MetricRow]) -> dict[tuple[str, str, str, str, int], MetricRow]:
    found = {(r.model, r.mode, r.segment, r.metric, r.k): r for r in rows}
    assert len(found) == len(rows)
    return found


def test_every_figure_equals_the_oracle(
    world: World, rows: list[MetricRow], oracle: SimpleNamespace
) -> None:
    found = by_key(rows)
    checked = 0
    for mode in schema.MODES:
        for segment in SEGMENTS:
            users = world.population(mode, segment)
            assert users  # the world has all kinds
            weights = {
                u: [1] + [oracle.poisson_weight(u, r, SETTINGS.seed) for r in range(60)]
                for u in users
            }
            for k in SETTINGS.ks:
                means: dict[tuple[str, str], np.ndarray] = {}
                for model in MODELS:
                    sums, counts = (
                        defaultdict(lambda: np.zeros(61)),
                        defaultdict(lambda: np.zeros(61)),
                    )
                    covered = set()
                    for user, target in users.items():
                        listed = world.lists.get((model, mode, user), [])
                        covered |= {i for i in listed[:k] if i in KNOWN}
                        figures = oracle.list_figures(
                            listed, target, k, world.n_users_of, world.cosine
                        )
                        for metric, value in figures.items():
                            if value is not None:
                                sums[metric] += value * np.array(weights[user])
                                counts[metric] += np.array(weights[user])
                    for metric in METRICS:
                        row = found[model, mode, segment, metric, k]
                        assert row.n_users == counts[metric][0]
                        with np.errstate(invalid="ignore", divide="ignore"):
                            mean = means[model, metric] = sums[metric] / counts[metric]
                        same_number(row.value, mean[0])
                        diffs = mean - means["popular", metric]
                        same_number(row.diff, diffs[0])
                        usable = diffs[1:][~np.isnan(diffs[1:])]
                        ends = np.percentile(usable, [2.5, 97.5]) if len(usable) else [np.nan] * 2
                        same_number(row.ci_low, ends[0])
                        same_number(row.ci_high, ends[1])
                        assert row.baseline == "popular"
                        checked += 1
                    row = found[model, mode, segment, "coverage", k]
                    assert (row.value, row.n_users) == (len(covered) / len(KNOWN), len(users))
                    assert row.ci_low is None
                    assert row.ci_high is None
    assert checked + 2 * len(SEGMENTS) * 2 * len(MODELS) + 6 == len(rows)


def same_number(found: float | None, want: float) -> None:
    assert (found is None) == math.isnan(want)
    if found is not None:
        assert found == pytest.approx(want, abs=1e-9)


def test_population_is_counted(world: World, rows: list[MetricRow]) -> None:
    found = by_key(rows)
    for mode in schema.MODES:
        everyone, cold = world.population(mode, "all"), world.population(mode, "cold")
        late = sum(item in LATE for items in world.truth.values() for item in items)
        counts = {
            "n_users": len(everyone),
            "n_cold_users": len(cold),
            "n_cold_items_in_truth": late,
        }
        for metric, n in counts.items():
            row = found[POPULATION, mode, "all", metric, 0]
            assert (row.value, row.n_users, row.diff) == (n, len(everyone), None)
        assert everyone.keys() == cold.keys() | world.population(mode, "warm").keys()
    assert len(world.population("novel", "all")) < len(world.population("repeat", "all"))


def test_items_without_events_have_rows_of_their_own(spark: SparkSession, world: World) -> None:
    """The truth is those items alone, in mode novel; what else is listed keeps its rank."""
    lists, users = world.frames(spark)
    late = np.array(sorted(LATE), np.int32)
    head: dict[str, Any] = {"run_date": date(2020, 5, 7), "kind": "backtest", "cutoff": CUTOFF}
    rows = cold_items(lists, users, late, SETTINGS, COLD_ITEMS, **head, models=MODELS)
    assert {(row.segment, row.mode, row.baseline) for row in rows} == {
        ("cold_items", "novel", None)
    }
    truth = {user: items & {*LATE} for user, items in world.truth.items() if items & {*LATE}}
    found = {(row.model, row.metric, row.k): row for row in rows}
    assert found[POPULATION, "n_users", 0].value == len(truth)
    assert found[POPULATION, "n_items", 0].value == len(LATE)
    for model, k in itertools.product(MODELS, SETTINGS.ks):
        hits = [
            any(item in items for item in world.lists.get((model, "novel", user), [])[:k])
            for user, items in truth.items()
        ]
        row = found[model, "hit_rate", k]
        assert (row.value, row.n_users) == (pytest.approx(np.mean(hits)), len(truth))
    assert {row.metric for row in rows if row.k} == {*TRUTH_METRICS, "coverage"}
    nobody = users.withColumn("items", F.array(F.lit(KNOWN[0])))
    assert cold_items(lists, nobody, late, SETTINGS, COLD_ITEMS, **head, models=MODELS) == []


def test_a_model_without_lists_scores_zero(rows: list[MetricRow]) -> None:
    silent = [row for row in rows if row.model == "silent"]
    assert silent
    for row in silent:
        assert row.value is None if row.metric in LIST_METRICS else row.value == 0


def test_partitioning_changes_no_bit(
    spark: SparkSession, world: World, rows: list[MetricRow]
) -> None:
    for partitions in (1, 7):
        changed = {
            "spark.sql.adaptive.enabled": "false",
            "spark.sql.shuffle.partitions": str(partitions),
        }
        with spark_conf(spark, changed):
            assert run(world, *world.frames(spark, partitions)) == rows


def test_rows_fit_the_table(spark: SparkSession, rows: list[MetricRow]) -> None:
    assert MetricRow._fields == tuple(schema.METRICS.names)
    frame = spark.createDataFrame(rows, schema.METRICS)
    assert frame.count() == len(rows)


def test_without_baseline_or_replicates_there_is_no_interval(
    spark: SparkSession, world: World, rows: list[MetricRow]
) -> None:
    plain = run(world, *world.frames(spark), n_bootstrap=0)
    assert [r[:13] for r in plain] == [r[:13] for r in rows]
    assert all(r.ci_low is None and r.ci_high is None for r in plain)
    alone = run(world, *world.frames(spark), baseline="another", n_bootstrap=0)
    assert [r.value for r in alone] == [r.value for r in rows]
    assert all(r.baseline is None and r.diff is None for r in alone)


def test_above_the_limit_a_hash_sample_is_scored(spark: SparkSession) -> None:
    world = World(n_users=300, seed=1)
    found = []
    for partitions, seed in ((1, 4), (5, 4), (1, 5)):
        sampled = run(
            world, *world.frames(spark, partitions), max_eval_users=100, n_bootstrap=0, seed=seed
        )
        found.append(sampled)
    assert found[0] == found[1] != found[2]
    n_users = by_key(found[0])[POPULATION, "repeat", "all", "n_users", 0].value
    assert n_users == pytest.approx(100, abs=30)


def test_lists_are_shuffled_once(spark: SparkSession, world: World) -> None:
    lists, users = world.frames(spark)
    lists, users = lists.localCheckpoint(), users.localCheckpoint()
    plan = Plan(MODELS, schema.MODES, (3,), world.catalogue, 0, 1)
    frame = rows_by_user(lists, users, plan)
    tree = frame._jdf.queryExecution().executedPlan().toString()
    assert tree.count("Exchange") == 1


def test_an_unknown_segment_fails_by_name(spark: SparkSession, world: World) -> None:
    lists, users = world.frames(spark)
    with pytest.raises(PySparkException, match="no segment is called whale"):
        run(world, lists, users.withColumn("segment", F.lit("whale")))


def test_truth_is_the_horizon_and_nothing_else(spark: SparkSession) -> None:
    end = CUTOFF + timedelta(days=7)
    step = timedelta(microseconds=1)
    events = [
        (1, 5, CUTOFF - step),
        (1, 7, CUTOFF),
        (1, 3, end - step),
        (1, 7, end - step),
        (1, 9, end),
        (2, 4, CUTOFF + step),
        (3, 4, end),
    ]
    history = F.collect_list(F.struct("item_idx", "event_at")).alias("history")
    frame = (
        spark.createDataFrame(events, "user_idx long, item_idx int, event_at timestamp")
        .groupBy("user_idx")
        .agg(history)
    )
    for cutoff in (CUTOFF, CUTOFF.replace(tzinfo=None)):
        found = truth(frame, cutoff, 7)
        assert found.dtypes == [("user_idx", "bigint"), ("items", "array<int>")]
        assert sorted(map(tuple, found.collect())) == [(1, [3, 7]), (2, [4])]


def test_catalogue_is_sorted_and_never_empty(spark: SparkSession) -> None:
    frame = spark.createDataFrame([(7, 2), (3, 5)], "item_idx int, n_users long")
    found = catalogue(frame)
    assert (found.items.tolist(), found.n_users.tolist(), found.vectors) == ([3, 7], [5, 2], None)
    with pytest.raises(EmptyDataError, match="no item has an event before the cutoff"):
        catalogue(frame.where("false"))


def test_item_vectors_keep_cosines(spark: SparkSession) -> None:
    rng = np.random.default_rng(2)
    taste = rng.random((500, 4)) ** 3
    bought = rng.random((500, 30)) < (taste @ rng.random((4, 30))) * 0.25
    bought[:, 29] = False
    seen = [np.flatnonzero(row).astype(np.int32) for row in bought]
    users = spark.createDataFrame(
        pa.table({"user_idx": np.arange(500) * 1001, "seen": pa.array(seen, pa.list_(pa.int32()))})
    )
    vocabulary = np.arange(1, 30, dtype=np.int32)  # item 0 is not eligible, 29 nobody bought
    found = item_vectors(users, vocabulary, dims=256)
    again = item_vectors(users.repartition(5, "user_idx"), vocabulary, dims=256)
    assert found.dtype == np.float32
    assert found.tobytes() == again.tobytes()
    assert (found[-1] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(found[:-1], axis=1), 1, rtol=1e-6)
    columns = bought[:, 1:29].astype(float)
    columns /= np.linalg.norm(columns, axis=0)
    error = (found[:-1] @ found[:-1].T - columns.T @ columns)[np.triu_indices(28, 1)]
    assert abs(error.mean()) < 0.05  # pairs share the hash, so their errors are not independent
    assert error.std() == pytest.approx(1 / 16, rel=0.35)


def test_concentration_counts_the_lists_of_each_item(spark: SparkSession, world: World) -> None:
    """Against plain Python: over all lists of a model, also of users without truth."""
    rows = concentration(
        world.frames(spark, 5)[0],
        50,
        SETTINGS,
        run_date=date(2020, 5, 8),
        kind="backtest",
        cutoff=CUTOFF,
        models=MODELS,
    )
    found = {(row.model, row.mode, row.k, row.metric): row for row in rows}
    models = {model for (model, _, _), items in world.lists.items() if items}
    assert len(found) == len(rows) == 3 * 2 * 2 * len(models & {*MODELS})
    for model, mode, k in {(row.model, row.mode, row.k) for row in rows}:
        lists = [
            items[:k]
            for (m, o, _), items in world.lists.items()
            if (m, o) == (model, mode) and items
        ]
        counts = sorted(
            (sum(item in items for items in lists) for item in range(100)), reverse=True
        )
        counts = counts[:50]  # the catalogue has 50 items
        ascending = counts[::-1]
        by_hand = {
            "top20_share": sum(counts[:20]) / sum(counts),
            "most_listed_share": counts[0] / len(lists),
            "gini": sum((2 * i - 51) * x for i, x in enumerate(ascending, 1)) / (50 * sum(counts)),
        }
        for metric, value in by_hand.items():
            row = found[model, mode, k, metric]
            assert row.value == pytest.approx(value)
            assert (row.n_users, row.segment, row.diff) == (len(lists), "all", None)


def test_workers_map_the_vectors_of_a_catalogue(
    spark: SparkSession, world: World, rows: list[MetricRow], tmp_path: Path
) -> None:
    """What is sent to a worker names the file; the figures are those of vectors in memory."""
    items = spark.createDataFrame([(item, 1) for item in range(2000)], "item_idx int, n_users long")
    users = spark.createDataFrame([(1, [3, 5]), (2, [5])], "user_idx long, seen array<int>")
    in_memory, mapped = (catalogue(items, users, folder) for folder in ("", str(tmp_path)))
    sent = pickle.dumps(mapped)
    assert len(sent) < len(pickle.dumps(in_memory)) - 2000 * 64 * 4 + 1000
    vectors = pickle.loads(sent).vectors
    assert isinstance(vectors, np.memmap)
    np.testing.assert_array_equal(vectors, in_memory.vectors)

    storage.write_array(str(tmp_path / "world.npy"), world.vectors)
    of_file = storage.read_array(str(tmp_path / "world.npy"), mmap=True)
    with_file = copy.copy(world)
    with_file.catalogue = dataclasses.replace(world.catalogue, vectors=of_file)
    assert run(with_file, *world.frames(spark)) == rows
