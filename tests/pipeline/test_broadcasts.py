"""Broadcasts: which tables are sent to every executor, and that values go when their job is over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyspark import Broadcast, SparkContext
from pyspark.sql import SparkSession

import recspark
from recspark.models.items.item_item import gram
from recspark.models.items.rp3beta import degrees_of
from recspark.models.vectors.prod2vec import steps_between_clusters
from recspark.models.weights import HistoryWeights
from recspark.pipeline.context import BROADCAST_ITEMS, RunContext
from recspark.testing import synth

# Module -> hints in it, and why each table is small. A table with a row per item, which grows with
# the shop, is hinted by `RunContext.item_sized` alone.
HINTS = {
    "data/training_texts.py": 1,  # the dictionary: features.max_words words
    "eval/gates.py": 2,  # a single count; items where the caller says that they are few
    "pipeline/context.py": 1,  # item_sized
    "pipeline/stages/evaluate.py": 1,  # the published lists of a night
}


def test_tables_of_items_are_hinted_in_one_place() -> None:
    package = Path(recspark.__file__).parent
    n_hints = {
        str(file.relative_to(package)): len(re.findall(r"F\.broadcast\(", file.read_text()))
        for file in package.rglob("*.py")
    }
    assert {name: n for name, n in n_hints.items() if n} == HINTS


@pytest.mark.spark
@pytest.mark.parametrize("n_items", [BROADCAST_ITEMS, BROADCAST_ITEMS + 1])
def test_a_table_of_items_is_hinted_up_to_a_size(spark: SparkSession, n_items: int) -> None:
    catalog: Any = SimpleNamespace(count=lambda table, version: n_items)
    context = RunContext(
        spark, catalog, *[None] * 3, {"item_ids": 3}, SimpleNamespace(outputs=lambda stages: {})
    )  # type: ignore[call-overload]
    context.__dict__["stages_read"] = frozenset()
    plan = str(context.item_sized(spark.range(3))._jdf.queryExecution().analyzed())
    assert ("broadcast" in plan) == (n_items <= BROADCAST_ITEMS)


HISTORIES = [(0, 3, 1.0), (0, 5, 1.0), (1, 3, 1.0), (1, 5, 1.0), (2, 5, 1.0)]
ITEMS = np.array([3, 5], np.int32)


@pytest.mark.spark
@pytest.mark.parametrize("run", ["gram", "degrees_of", "steps_between_clusters"])
def test_a_value_goes_when_its_job_is_over(
    spark: SparkSession, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file on the driver is gone, so the executors were told to let it go too."""
    made: list[Broadcast[Any]] = []
    send: Callable[..., Broadcast[Any]] = SparkContext.broadcast

    def noted(context: SparkContext, value: Any) -> Broadcast[Any]:
        made.append(send(context, value))
        return made[-1]

    monkeypatch.setattr(SparkContext, "broadcast", noted)
    data = synth.dataset(spark, synth.log(HISTORIES))
    weights = HistoryWeights(0, None, "sum")
    if run == "gram":
        assert gram(data.histories, ITEMS, weights).shape == (2, 2)
    elif run == "degrees_of":
        assert len(degrees_of(data.histories, ITEMS, weights)) == 2
    else:
        sentences = spark.createDataFrame(
            [(1, [3, 5], [0, 1])], "sentence_id long, items array<int>, bags array<int>"
        )
        steps_between_clusters(sentences, ITEMS, np.array([0, 1]))
    assert len(made) == 1
    assert not Path(made[0]._path).exists()
