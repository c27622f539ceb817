"""A film rated again: the newest rating stands for it, of whatever sign, in everything that is made
of histories."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import torch
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config import Features
from recspark.data.blocks import Histories
from recspark.data.histories import event_weight
from recspark.data.interactions import before, decayed_item_weights, interactions
from recspark.data.training_rows import training_bags, training_item_bags
from recspark.eval.ratings import ratings_of
from recspark.models.neural import entries
from recspark.models.weights import HistoryWeights
from recspark.train.feed import Batch

pytestmark = pytest.mark.spark
CUT = datetime(2024, 6, 1, tzinfo=UTC)
EXPLICIT = Features(explicit=True, max_training_items=4, max_training_users=4)  # type: ignore[call-arg]
Ratings = list[tuple[int, float | None]]  # (item, rating) from the oldest on, an hour apart


def histories(spark: SparkSession, users: dict[int, Ratings], start: datetime) -> DataFrame:
    data: list[Any] = [
        (
            user,
            [
                (item, start + timedelta(hours=n), "rating", stars, stars, "s", None)
                for n, (item, stars) in enumerate(rated)
            ],
            sorted({item for item, _ in rated}),
            0,
        )
        for user, rated in users.items()
    ]
    return spark.createDataFrame(data, schema.HISTORIES)


USERS: dict[int, Ratings] = {
    1: [(5, 3.0), (6, -2.0), (5, 4.0), (7, None)],  # rated 3, then 4; seen without a rating
    2: [(5, 0.0), (6, 2.0), (6, None)],  # thumbs down; looked at once more
    3: [(7, None)],
}
STANDS = {1: {5: 4.0, 6: -2.0}, 2: {5: 0.0, 6: 2.0}}


def test_every_table_takes_the_newest_rating(spark: SparkSession) -> None:
    mine = before(histories(spark, USERS, CUT - timedelta(days=9)), CUT, ratings=True).cache()
    assert {row["user_idx"]: row["seen"] for row in mine.collect()} == {
        1: [5, 6, 7],
        2: [5, 6],
        3: [7],
    }
    pairs: dict[int, dict[int, float]] = {}
    counts = {}
    for row in interactions(mine, CUT, None).collect():
        pairs.setdefault(row["user_idx"], {})[row["item_idx"]] = row["weight"]
        counts[row["user_idx"], row["item_idx"]] = row["n_events"]
    assert pairs == STANDS
    assert counts == {(1, 5): 2, (1, 6): 1, (2, 5): 1, (2, 6): 2}
    bags = {
        row["user_idx"]: dict(zip(row["items"][: row["length"]], row["weights"]))
        for row in training_bags(mine, CUT, EXPLICIT, 1).collect()
    }
    assert bags == STANDS
    of_items = {
        row["item_idx"]: dict(zip(row["users"][: row["length"]], row["weights"]))
        for row in training_item_bags(mine, CUT, EXPLICIT, 1).collect()
    }
    assert of_items == {5: {1: 4.0, 2: 0.0}, 6: {1: -2.0, 2: 2.0}}
    sums = {r["item_idx"]: r["weight"] for r in decayed_item_weights(mine, CUT, None).collect()}
    assert sums == {5: 4.0, 6: 0.0}


def test_what_is_predicted_is_the_newest_rating(spark: SparkSession) -> None:
    """In the horizon the last one with a value; a film that was only seen before is asked for."""
    users: dict[int, Ratings] = {
        1: [(9, 2.0), (8, None), (5, 3.0), (5, 4.0), (5, None), (9, 5.0), (8, -1.0), (6, None)],
        2: [(9, 2.0), (8, None), (6, None)],
    }
    cutoff = CUT - timedelta(hours=6)  # after two events
    frame = histories(spark, users, cutoff - timedelta(hours=2))
    asked = ratings_of(frame, cutoff, 1).collect()
    assert [(row["user_idx"], [tuple(r) for r in row["asked"]]) for row in asked] == [
        (1, [(5, 4.0), (8, -1.0)])
    ]


def test_the_newest_rating_of_any_history(spark: SparkSession) -> None:
    """Against plain Python, for two hundred users at once."""
    rng = np.random.default_rng(1)
    users = {
        user: [
            (int(rng.integers(4)), None if rng.random() < 0.3 else float(rng.integers(-3, 4)))
            for _ in range(rng.integers(1, 12))
        ]
        for user in range(200)
    }
    start = CUT - timedelta(hours=8)  # so that some events lie after the cutoff
    found = before(histories(spark, users, start), CUT, ratings=True).collect()
    assert len(found) == 200
    for row in found:
        earlier = users[row["user_idx"]][:8]
        newest = {item: n for n, (item, stars) in enumerate(earlier) if stars is not None}
        want = [stars if newest.get(item) == n else None for n, (item, stars) in enumerate(earlier)]
        assert [event["weight"] for event in row["history"]] == want
        assert [event["value"] for event in row["history"]] == [stars for _, stars in earlier]


def test_an_event_without_a_value_is_no_rating(spark: SparkSession) -> None:
    events = spark.createDataFrame(
        [("rating", 3.0), ("rating", -1.0), ("rating", None), ("tag", 2.0), ("view", 5.0)],
        "event_type string, value double",
    )
    kinds = {"rating": 1.0, "view": 0.0}
    explicit = Features(explicit=True, event_weights=kinds, other_weight=0.5)  # type: ignore[call-arg]
    weights = [row[0] for row in events.select(event_weight(explicit)).collect()]
    assert weights == [3.0, -1.0, None, 1.0, None]


def test_models_of_ratings_learn_from_those_of_0_and_below() -> None:
    history = Histories(
        np.array([0, 3]),
        np.array([3, 5, 8], np.int32),
        np.arange(3, dtype=np.int64),
        np.array([-2, np.nan, 0], np.float32),
    )
    items = np.array([3, 5, 8], np.int32)
    _, at, weights = HistoryWeights.sums(CUT, None, ratings=True).local(history, items)
    assert (at.tolist(), weights.tolist()) == ([0, 2], [-2.0, 0.0])
    _, at, _ = HistoryWeights.sums(CUT, None).local(history, items)
    assert at.tolist() == []
    tensors = {
        "items": torch.tensor([[3, 8, -1]], dtype=torch.int32),
        "weights": torch.tensor([[-2.0, 0.0, 0.0]]),
    }
    rows, local, values = entries(
        Batch(tensors, torch.ones(1)), torch.from_numpy(items).long(), ratings=True
    )
    assert (rows.tolist(), local.tolist(), values.tolist()) == ([0, 0], [0, 2], [-2.0, 0.0])
