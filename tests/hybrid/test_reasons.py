"""Reasons of listed items: by hand, against a plain computation, and what they cost."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.blocks import Histories, QueryBlock, Ragged
from recspark.hybrid.reasons import Voice, because_column, reasons_of, with_reasons
from recspark.models.base import FitOptions
from recspark.models.items.ease import EaseModel, EaseSettings
from recspark.models.items.item_knn import ItemKNN, ItemKNNModel, ItemKNNSettings
from recspark.models.items.popular import Popular
from recspark.models.scoring import memory
from recspark.models.scoring.contributions import Contributions, strongest
from recspark.models.sequences.session_knn import SessionKNN
from recspark.testing import synth
from tests.conftest import spark_conf

CUTOFF = datetime(2024, 1, 1, tzinfo=UTC)
KEY = ["model", "user_idx", "item_idx"]
ITEMS = np.array([10, 20, 30, 40, 50], np.int32)


def queries(*histories: list[int]) -> QueryBlock:
    """Queries of users 0, 1, … whose events on these items weigh 1."""
    start = np.concatenate([[0], np.cumsum([len(items) for items in histories])])
    items = np.array([item for items in histories for item in items], np.int32)
    events = Histories(
        start, items, np.zeros(len(items), np.int64), np.ones(len(items), np.float32)
    )
    nothing = Ragged(np.zeros(len(start), np.int64), np.zeros(0, np.int32))
    return QueryBlock(np.arange(len(histories)), events, nothing)


def voice(entries: dict[tuple[int, int], float], evidence_only: bool = False) -> Voice:
    """A matrix of what item j adds to item i, by (j, i)."""
    matrix = np.zeros((5, 5), np.float32)
    for (j, i), value in entries.items():
        matrix[np.searchsorted(ITEMS, j), np.searchsorted(ITEMS, i)] = value
    model: ItemKNNModel | EaseModel
    if evidence_only:
        model = ItemKNNModel(ItemKNNSettings(half_life_days=None), CUTOFF, ITEMS, matrix)
    else:
        model = EaseModel(EaseSettings(half_life_days=None), CUTOFF, ITEMS, matrix)
    found = Voice.of(model)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["hybrid.reasons", "models.scoring.contributions"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"recspark.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_shares_by_hand() -> None:
    """Pair 0: 3, -1, 1 and 1 of the items 7, 8, 9 and 5. Pair 1: nothing speaks for it."""
    given = Contributions(
        np.array([0, 4, 6]),
        np.array([7, 8, 9, 5, 7, 8], np.int32),
        np.array([3.0, -1, 1, 1, -2, 0]),
        np.array([100.0, 0]),
    )
    assert given.totals.tolist() == [104, -2]
    start, items, share = strongest(given, 3)
    assert start.tolist() == [0, 3, 3]
    assert items.tolist() == [7, 5, 9]  # of equal contributions, the smaller item first
    assert share.tolist() == [3 / 6, 1 / 6, 1 / 6]
    start, items, _ = strongest(given, 1)
    assert (start.tolist(), items.tolist()) == ([0, 1, 1], [7])


def test_every_row_has_the_reasons_of_its_speaker() -> None:
    """Three users: by the model itself, by the better ranking source of a ranker, by the fallback."""
    voices = {
        "a": voice({(10, 40): 3, (20, 40): 1, (10, 50): 1, (20, 50): -1}),
        "b": voice({(20, 50): 2, (20, 40): 1}, evidence_only=True),
        "near": voice({(30, 40): 0.5, (10, 40): 0.25}, evidence_only=True),
    }
    speakers = {
        "a": (("a",),),
        "ranker": (("a", "b"), ("near",)),
        "sequence": (("near",),),
        "popular": (),
    }
    block = queries([10, 20], [10, 20], [30, 10], [])
    row = np.array([0, 0, 1, 1, 2, 2, 2, 3])
    item = np.array([40, 50, 40, 50, 40, 50, 40, 40], np.int32)
    models = ["a", "a", "ranker", "ranker", "sequence", "sequence", "popular", "ranker"]
    found = reasons_of(block, row, item, models, voices, speakers, 2)
    # `a` ranks 40 first (4), `b` ranks 50 first (2): each speaks for what it ranks best.
    assert found.speaker == ["a", "a", "a", "b", "near", "", "", ""]
    reasons = [
        list(zip(found.item_idx[s:e].tolist(), found.share[s:e].tolist(), strict=True))
        for s, e in zip(found.start[:-1], found.start[1:], strict=True)
    ]
    assert reasons == [
        [(10, 0.75), (20, 0.25)],
        [(10, 0.5)],  # 1 / (1 + 1): what speaks against it counts in the sum
        [(10, 0.75), (20, 0.25)],
        [(20, 1.0)],
        [(30, 2 / 3), (10, 1 / 3)],
        [],  # no own item is like 50
        [],  # popular: nobody speaks
        [],  # no history
    ]
    names = pa.table({"item_id": [f"i{i}" for i in found.item_idx], "item_name": [None] * 8})
    column = because_column(
        found, names.cast(pa.schema([("item_id", "string"), ("item_name", "string")]))
    )
    assert [None if cell is None else len(cell) for cell in column.to_pylist()] == [
        2, 1, 2, 1, 2, None, None, None,
    ]  # fmt: skip


def test_a_ranker_without_a_reason_of_its_source_asks_the_neighbours() -> None:
    """Source `a` ranks 50, but all that the user has speaks against it. Rows stay in their order."""
    voices = {
        "a": voice({(10, 50): -1, (20, 50): 1}),
        "near": voice({(10, 50): 1}, evidence_only=True),
    }
    found = reasons_of(
        queries([10], [20]), np.array([0, 1]), np.array([50, 50], np.int32), ["r", "r"], voices,
        {"r": (("a",), ("near",))}, 3,
    )  # fmt: skip
    assert found.speaker == ["near", "a"]  # the second round gives the reason of the first row
    assert (found.item_idx.tolist(), found.share.tolist()) == ([10, 20], [1.0, 1.0])


def test_items_that_no_voice_knows_have_no_reason() -> None:
    voices = {"a": voice({(10, 40): 1})}
    found = reasons_of(
        queries([10], [99]), np.array([0, 1]), np.array([77, 40], np.int32), ["a", "a"], voices,
        {"a": (("a",),)}, 3,
    )  # fmt: skip
    assert found.speaker == ["", ""]
    assert found.start.tolist() == [0, 0, 0]


def test_slices_of_users_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    matrix = {(int(j), int(i)): float(rng.normal()) for j in ITEMS for i in ITEMS}
    block = queries(*[rng.choice(ITEMS, rng.integers(0, 5)).tolist() for _ in range(50)])
    row, item = np.repeat(np.arange(50), 3), rng.choice(ITEMS, 150).astype(np.int32)
    arguments = (block, row, item, ["a"] * 150, {"a": voice(matrix)}, {"a": (("a",),)}, 2)
    found = reasons_of(*arguments)
    monkeypatch.setattr(memory, "block_bytes", lambda: 1)  # a user a slice
    sliced = reasons_of(*arguments)
    for name in ("start", "item_idx", "share"):
        assert getattr(found, name).tobytes() == getattr(sliced, name).tobytes()
    assert len(found.share) > 90


@dataclass(frozen=True)
class Listed:
    """The log, the lists of three models on it, and the same rows with reasons."""

    log: synth.Log
    lists: DataFrame
    with_because: Callable[[DataFrame], DataFrame]


def kept(frame: DataFrame) -> DataFrame:
    """The same rows, computed once: a plan without a shuffle."""
    return frame.sparkSession.createDataFrame(frame.toArrow(), frame.schema)


@pytest.fixture(scope="module")
def listed(spark: SparkSession) -> Listed:
    log = synth.power_law(60, 40)
    data, options = synth.dataset(spark, log), FitOptions()
    item_knn = ItemKNN.from_dict({"half_life_days": None, "shrink": 1.0}).fit(data, options)
    assert isinstance(item_knn, ItemKNNModel)
    models = {
        "item_knn": item_knn,
        "popular": Popular.from_dict({}).fit(data, options),
        "session_knn": SessionKNN.from_dict({}).fit(data, options),
    }
    rows = [
        model.recommend(synth.ask(data), 4).withColumn("model", F.lit(name))  # type: ignore[attr-defined]
        for name, model in models.items()
    ]
    lists = kept(reduce(DataFrame.unionByName, rows)).repartition("user_idx")
    items = range(int(log.item_idx.max()) + 1)
    names = pa.table(
        {
            "item_idx": pa.array(items, pa.int32()),
            "item_id": [f"id {i}" for i in items],
            "item_name": [f"name {i}" for i in items],
        }
    )
    speakers = {"item_knn": (("item_knn",),), "popular": (), "session_knn": (("item_knn",),)}
    queries = kept(data.histories.select("user_idx", "history"))
    speaking = Voice.of(item_knn)
    assert speaking is not None

    def with_because(rows: DataFrame) -> DataFrame:
        return with_reasons(rows, queries, {"item_knn": speaking}, speakers, names, 3)

    return Listed(log, lists, with_because)


@pytest.mark.spark
def test_rows_of_lists_against_a_plain_computation(listed: Listed) -> None:
    """Cosines of 0/1 columns, written down again: the reasons of every row that has any."""
    explained = listed.with_because(listed.lists)
    assert explained.schema["because"].dataType == schema.BECAUSE
    assert explained.columns == [*listed.lists.columns, "because"]
    rows = explained.toPandas().sort_values(KEY, ignore_index=True)
    pd.testing.assert_frame_equal(
        rows.drop(columns="because"),
        listed.lists.toPandas().sort_values(KEY, ignore_index=True)[[*explained.columns][:-1]],
    )
    users: dict[int, set[int]] = {}
    for user, item in zip(listed.log.user_idx.tolist(), listed.log.item_idx.tolist(), strict=True):
        users.setdefault(user, set()).add(item)
    n = {i: sum(i in own for own in users.values()) for i in set(listed.log.item_idx.tolist())}
    with_reasons_of = {"item_knn": 0, "session_knn": 0}
    for row in rows.itertuples():
        if row.because is None:
            assert row.model != "item_knn"
            continue
        with_reasons_of[row.model] += 1
        like = {
            j: sum({row.item_idx, j} <= own for own in users.values())
            / ((n[row.item_idx] * n[j]) ** 0.5 + 1)
            for j in users[row.user_idx]
        }
        best = [j for j in sorted(like, key=lambda j: (-round(like[j], 6), j))[:3] if like[j] > 0]
        assert [r["item_id"] for r in row.because] == [f"id {j}" for j in best]
        assert [r["item_name"] for r in row.because] == [f"name {j}" for j in best]
        expected = [like[j] / sum(like.values()) for j in best]
        assert [r["share"] for r in row.because] == pytest.approx(expected, rel=1e-4)
    assert min(with_reasons_of.values()) > 50


@pytest.mark.spark
def test_reasons_that_stand_are_kept(listed: Listed) -> None:
    """A kept row has its old reasons, though tonight's model would give others."""
    old = F.array(
        F.struct(F.lit("old").alias("item_id"), F.lit("x").alias("item_name"), F.lit(0.5))
    )
    is_kept = (F.col("model") == "item_knn") & (F.col("user_idx") % 2 == 0)
    rows = listed.lists.withColumn("because", F.when(is_kept, old.cast(schema.BECAUSE)))
    explained = listed.with_because(rows).toPandas()
    anew = listed.with_because(listed.lists).toPandas()
    merged = explained.merge(anew, on=KEY, suffixes=("", "_anew"))
    assert len(merged) == len(explained)
    for row in merged.itertuples():
        if row.model == "item_knn" and row.user_idx % 2 == 0:
            assert [tuple(r) for r in row.because] == [("old", "x", 0.5)]
        else:
            assert row.because == row.because_anew


@pytest.mark.spark
def test_reasons_cost_one_shuffle_of_the_histories(spark: SparkSession, listed: Listed) -> None:
    """Lists that are partitioned by user stay where they are. No table is small enough to be sent."""

    def exchanges(frame: DataFrame) -> int:
        plan = frame._jdf.queryExecution().executedPlan().toString()
        return plan.count("Exchange hashpartitioning")

    with spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):
        assert exchanges(listed.lists) == 1
        assert exchanges(listed.with_because(listed.lists)) == 2
        scattered = listed.lists.repartition(3)
        assert exchanges(listed.with_because(scattered)) > exchanges(scattered) + 1
