"""The words of items as numbers, by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Features
from recspark.data import training_texts

pytestmark = pytest.mark.spark
CUT = datetime(2010, 12, 10, tzinfo=UTC)
FEATURES = Features()  # type: ignore[call-arg]
ITEMS: list[Any] = [
    (3, "Red mug, red LID", ["Kitchen"], None),
    (5, "blue mug", ["Kitchen", "Gifts"], "a mug"),
    (8, None, None, "lid"),
    (9, "alone", None, None),
]
ITEM = "item_idx int, item_name string, category array<string>, text string"


def test_words_by_hand(spark: SparkSession) -> None:
    found = training_texts.words(spark.createDataFrame(ITEMS, ITEM)).collect()
    assert sorted(map(tuple, found)) == [
        (3, "category=kitchen", 1), (3, "lid", 1), (3, "mug", 1), (3, "red", 2),
        (5, "a", 1), (5, "blue", 1), (5, "category=gifts", 1), (5, "category=kitchen", 1), (5, "mug", 2),
        (8, "lid", 1), (9, "alone", 1),
    ]  # fmt: skip


def test_rows_by_hand(spark: SparkSession) -> None:
    """Words of two items, by number of items, then by name: category=kitchen, lid, mug."""
    frame = training_texts.training_texts(spark.createDataFrame(ITEMS, ITEM), CUT, FEATURES, 2)
    assert frame.schema.simpleString() == schema.TRAINING_TEXTS.simpleString()
    assert frame.rdd.getNumPartitions() == 2
    found = {row["item_idx"]: row for row in frame.collect()}
    pad = FEATURES.max_item_words
    want = {3: ([0, 1, 2], [1, 1, 0.5]), 5: ([0, 2], [1, 1]), 8: ([1], [1]), 9: ([], [])}
    assert set(found) == set(want)
    for item, (words, weights) in want.items():
        row = found[item]
        assert row["length"] == len(words)
        np.testing.assert_array_equal(row["words"], words + [-1] * (pad - len(words)))
        np.testing.assert_array_equal(row["weights"], weights + [0.0] * (pad - len(words)))


def test_what_is_kept_of_many_words(spark: SparkSession) -> None:
    """Of category=kitchen, lid, mug: two words in all, one of an item."""
    settings = Features(max_words=2, max_item_words=1)  # type: ignore[call-arg]
    frame = training_texts.training_texts(spark.createDataFrame(ITEMS, ITEM), CUT, settings, 2)
    found = {row["item_idx"]: (row["words"], row["length"]) for row in frame.collect()}
    assert found == {3: ([0], 1), 5: ([0], 1), 8: ([1], 1), 9: ([-1], 0)}
