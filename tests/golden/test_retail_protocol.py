"""On the real shop, the figures of the scorer that shares no code with recspark."""

from __future__ import annotations

import importlib.util
from datetime import UTC, date, datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Evaluate
from recspark.data.features import activity
from recspark.eval.evaluate import MetricRow, catalogue, evaluate, population, truth

pytestmark = pytest.mark.spark

SCORER = Path(__file__).parents[3] / "shared" / "tools" / "score_retail.py"
CUTOFF = datetime(2010, 11, 25, tzinfo=UTC)
K = 10
# targets.md, "popular, all time" (by users): NDCG, recall, hit rate and users.
TARGETS = {"novel": (0.0305, 0.0203, 0.184, 712), "repeat": (0.0977, None, None, 803)}


@pytest.fixture(scope="module")
def scorer() -> ModuleType:
    if not SCORER.exists():
        pytest.skip(f"{SCORER} is not here: the independent scorer lies beside the checkout")
    spec = importlib.util.spec_from_file_location("score_retail", SCORER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sales(scorer: ModuleType) -> pd.DataFrame:
    found = scorer.sales(scorer.RAW)
    assert len(found) == 406_295
    return found.assign(
        user_idx=found.user_id.astype("int64"),
        item_idx=found.item_id.astype("category").cat.codes.astype("int32"),
    )


@pytest.fixture(scope="module")
def lists(sales: pd.DataFrame) -> pd.DataFrame:
    """Two models for every user before the cutoff: items by users, and by events, both modes."""
    before = sales[sales.event_at < CUTOFF.replace(tzinfo=None)]
    names = sales.drop_duplicates("item_idx").set_index("item_idx").item_id
    counts = {
        "popular": before.groupby("item_idx").user_idx.nunique(),
        "by_events": before.groupby("item_idx").size(),
    }
    seen = before.groupby("user_idx").item_idx.agg(set)
    rows = []
    for model, count in counts.items():
        order = sorted(count.index, key=lambda item: (-count[item], item))
        for mode in ("novel", "repeat"):
            for user, mine in seen.items():
                left = (item for item in order if mode == "repeat" or item not in mine)
                rows += [(model, mode, user, next(left), rank) for rank in range(1, K + 1)]
    found = pd.DataFrame(rows, columns=["model", "mode", "user_idx", "item_idx", "rank"])
    found = found.astype({"user_idx": "int64", "item_idx": "int32", "rank": "int32"})
    return found.assign(user_id=found.user_idx.astype(str), item_id=found.item_idx.map(names))


@pytest.fixture(scope="module")
def rows(spark: SparkSession, sales: pd.DataFrame, lists: pd.DataFrame) -> list[MetricRow]:
    events = as_frame(
        spark, sales[["user_idx", "item_idx"]].assign(event_at=sales.event_at.dt.tz_localize("UTC"))
    )
    before = events.where(F.col("event_at") < F.lit(CUTOFF))
    users = before.groupBy("user_idx").agg(
        F.array_sort(F.collect_set("item_idx")).alias("seen"),
        activity(F.count_distinct(F.to_date("event_at"))).alias("activity"),
    )
    pairs = before.select("user_idx", "item_idx").distinct()
    items = pairs.groupBy("item_idx").agg(F.count(F.lit(1)).alias("n_users"))
    histories = events.groupBy("user_idx").agg(
        F.collect_list(F.struct("item_idx", "event_at")).alias("history")
    )
    return evaluate(
        as_frame(spark, lists[["model", "mode", "user_idx", "item_idx", "rank"]]),
        population(truth(histories, CUTOFF, 15), users),
        catalogue(items, pairs.groupBy("user_idx").agg(F.collect_set("item_idx").alias("seen"))),
        Evaluate(horizon_days=15, ks=(K,), n_bootstrap=100),
        run_date=date(2010, 12, 9),
        kind="backtest",
        cutoff=CUTOFF,
        models=["popular", "by_events"],
    )


def as_frame(spark: SparkSession, table: pd.DataFrame) -> DataFrame:
    return spark.createDataFrame(pa.Table.from_pandas(table, preserve_index=False))


@pytest.mark.parametrize("mode", ["novel", "repeat"])
@pytest.mark.parametrize("model", ["popular", "by_events"])
def test_warm_users_score_as_the_independent_scorer_says(
    scorer: ModuleType,
    sales: pd.DataFrame,
    lists: pd.DataFrame,
    rows: list[MetricRow],
    model: str,
    mode: str,
) -> None:
    mine = lists[(lists.model == model) & (lists["mode"] == mode)]
    want = scorer.score(mine, sales, mode == "novel", K)
    found = {r.metric: r for r in rows if (r.model, r.mode, r.segment) == (model, mode, "warm")}
    assert want["users_with_short_list"] == want["seen_items_listed"] == 0
    for metric in ("ndcg", "recall", "hit_rate"):
        assert found[metric].value == pytest.approx(want[f"{metric}@{K}"], abs=1e-9)
        assert found[metric].n_users == want["users"]


@pytest.mark.parametrize("mode", ["novel", "repeat"])
def test_popular_scores_as_the_targets_say(rows: list[MetricRow], mode: str) -> None:
    found = {r.metric: r for r in rows if (r.model, r.mode, r.segment) == ("popular", mode, "warm")}
    ndcg, recall, hit_rate, n_users = TARGETS[mode]
    assert found["ndcg"].value == pytest.approx(ndcg, abs=5e-5)
    assert found["ndcg"].n_users == n_users
    if recall is not None:
        assert found["recall"].value == pytest.approx(recall, abs=5e-5)
        assert found["hit_rate"].value == pytest.approx(hit_rate, abs=5e-4)


def test_list_metrics_are_what_popular_lists_must_show(rows: list[MetricRow]) -> None:
    found = {
        r.metric: r for r in rows if (r.model, r.mode, r.segment) == ("popular", "repeat", "warm")
    }
    assert found["coverage"].value == pytest.approx(10 / 3_995, rel=0.01)  # the same ten for all
    assert found["popularity_bias"].value > 0.998
    interval = next(
        r
        for r in rows
        if (r.model, r.mode, r.segment, r.metric) == ("by_events", "novel", "warm", "ndcg")
    )
    assert interval.ci_low < interval.diff < interval.ci_high
    assert np.isfinite([interval.ci_low, interval.ci_high]).all()
