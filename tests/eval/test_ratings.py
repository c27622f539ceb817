"""RMSE and MAE by hand: which ratings are asked, what stands for an unknown one."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config import Evaluate
from recspark.eval import ratings
from recspark.pipeline.stages import evaluate as stage

pytestmark = pytest.mark.spark
CUT = datetime(2020, 5, 1, tzinfo=UTC)


def test_ratings_of_the_horizon(spark: SparkSession) -> None:
    """New items only; the newest of two ratings; nothing from the horizon's end on."""
    users: dict[int, list[tuple[int, float, float]]] = {
        1: [(5, -3, 4), (7, 0, 2), (6, 1, 3), (7, 2, 5), (5, 3, 1), (9, 7, 1)],
        2: [(5, -3, 4)],
        3: [(8, 6.9, 2.5)],
    }
    rows: list[Any] = [
        (
            user,
            [
                (i, CUT + timedelta(days=d), "rating", float(r), float(r), "s", "o")
                for i, d, r in events
            ],
            [],
            0,
        )
        for user, events in users.items()
    ]
    frame = ratings.ratings_of(spark.createDataFrame(rows, schema.HISTORIES), CUT, 7)
    found = {row["user_idx"]: [tuple(pair) for pair in row["asked"]] for row in frame.collect()}
    assert found == {1: [(6, 3.0), (7, 5.0)], 3: [(8, 2.5)]}


def test_rows_of_the_backtest(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says 3 of item 6 and nothing of item 7, beside one that predicts no ratings."""

    def load_model(_: Any, name: str, cutoff: datetime) -> SimpleNamespace:
        assert cutoff == CUT
        return SimpleNamespace(rates=name == "mf", user_encoding=None)

    def predicted(_: Any, asked: DataFrame) -> DataFrame:
        row = asked.collect()
        assert [(r["user_idx"], [e["item_idx"] for e in r["history"]]) for r in row] == [(1, [5])]
        return spark.createDataFrame([(1, 6, 4.0, 3.0), (1, 7, 2.0, None)], schema.PREDICTED)

    monkeypatch.setattr(stage, "load_model", load_model)
    monkeypatch.setattr(stage, "predicted", predicted)
    events = [(5, -3, 4.0), (6, 1, 4.0), (7, 2, 2.0)]
    history = [(i, CUT + timedelta(days=d), "rating", r, r, "s", "o") for i, d, r in events]
    another = [(5, CUT - timedelta(days=3), "rating", 1.0, 1.0, "s", "o")]
    everyone = spark.createDataFrame([(1, history, [], 0), (2, another, [], 0)], schema.HISTORIES)
    context: Any = SimpleNamespace(
        cutoffs=SimpleNamespace(backtest=CUT),
        run_date=date(2020, 5, 7),
        config=SimpleNamespace(evaluate=Evaluate(horizon_days=7), models=("popular", "mf")),
    )
    found = stage.rating_rows(context, everyone, ["popular", "mf"])
    assert {(row.model, row.mode, row.segment, row.k, row.n_users) for row in found} == {
        ("mf", "novel", "all", 0, 1)
    }
    values = {row.metric: row.value for row in found}
    assert values == {  # errors 1 and -.5: the mean of 4 and 1 stands for the unknown one
        "rmse": pytest.approx((1.25 / 2) ** 0.5),
        "mae": 0.75,
        "n_ratings": 2.0,
        "n_unknown_ratings": 1.0,
    }


def test_errors_by_hand(spark: SparkSession) -> None:
    """Ratings before the cutoff: 1, 2, 4.5, mean 2.5. Model a errs by 1, -.5 (2.5 for null), 0.5
    (6 is cut to 4.5), b by 2 in one pair; c has none."""
    before = spark.createDataFrame([(1.0,), (2.0,), (4.5,)], "weight float")
    known = ratings.scale(before)
    assert known == ratings.Scale(2.5, 1.0, 4.5)
    of = {
        "a": [(1, 5, 3.0, 2.0), (1, 6, 2.0, None), (2, 5, 5.0, 6.0)],
        "b": [(1, 5, 3.0, 1.0)],
        "c": [],
    }
    frames = {name: spark.createDataFrame(rows, schema.PREDICTED) for name, rows in of.items()}
    found = ratings.errors(frames, known)
    assert list(found) == ["a", "b"]
    assert found["a"].rmse == pytest.approx(((1 + 0.25 + 0.25) / 3) ** 0.5, abs=1e-9)
    assert found["a"].mae == pytest.approx(2 / 3, abs=1e-9)
    assert (found["a"].n_users, found["a"].n_pairs, found["a"].n_unknown) == (2, 3, 1)
    assert found["b"] == ratings.RatingErrors(2.0, 2.0, 1, 1, 0)
    assert ratings.errors({}, known) == {}
