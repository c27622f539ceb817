"""What a ranker costs: its examples, its training and its lists, night after night; and its memory.

- `nights`: two nights in turn on the bundled data, 2010-12-08 and 2010-12-09, with `lambdamart` and its
  retrievers. CPU seconds and seconds of each task of the ranker, and of all others together. The second
  night finds the slices of `examples` that the first one made, and makes those that are new.
- `scoring`: 100 planted candidates with 100 features for each of 10,000, 100,000 and 1,000,000 users,
  scored by 300 trees. The peak memory of the Python workers, the JVM and the driver, and CPU seconds.

    python -m benchmarks ranking
    RECSPARK_PARTS=scoring python -m benchmarks ranking
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from benchmarks import machine
from benchmarks.memory import PeakMemory, cpu_seconds
from recspark import schema
from recspark.config import Train
from recspark.data.feature_encoding import Encoding
from recspark.engines.boosting import Boosting, grow_trees
from recspark.models.rankers.lambdamart import LambdaMartModel, LambdaMartSettings
from recspark.pipeline.run import night, open_night

NIGHTS = (date(2010, 12, 8), date(2010, 12, 9))
RANKER = "lambdamart"
MODELS = "models=[popular, own_items, user_knn, ease, als, lambdamart]"
CANDIDATES, FEATURES = 100, 100
USERS = (10_000, 100_000, 1_000_000)


def run(*, smoke: bool) -> None:
    """Print and write the figures."""
    parts = os.environ.get("RECSPARK_PARTS", "nights,scoring").split(",")
    path = machine.RESULTS / "ranking.json"
    figures = json.loads(path.read_text()) if path.exists() and not smoke else {}
    if "scoring" in parts:
        figures["scoring"] = scoring((100,) if smoke else USERS, 5 if smoke else 300, smoke=smoke)
    if "nights" in parts and not smoke:
        figures["nights"] = nights()
    if not smoke:
        measured = {name: figures[name] for name in ("nights", "scoring") if name in figures}
        machine.write("ranking", "python -m benchmarks ranking", measured)


# --------------------------------------------------------------------------------------------- nights


def nights() -> list[dict[str, Any]]:
    """Run the two nights; return a line for each."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.environ.get("RECSPARK_ROOT", folder))
        for day in NIGHTS:
            clock = TaskClock()
            context = open_night(
                "local", day, [f"paths.root={root}", MODELS], trains=True, progress=clock
            )
            night(context)
            made = context.runlog.find("examples", RANKER)
            assert made is not None
            line = {"night": str(day), "examples": made.rows_out, "tasks": clock.tasks}
            print(line, flush=True)
            lines.append(line)
            context.spark.stop()
    return lines


class TaskClock:
    """Takes the progress lines of a night: seconds and CPU seconds of each task of the ranker, and of
    the other tasks together.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, dict[str, float]] = {}
        self._begun = (0.0, 0.0)

    def __call__(self, text: str) -> None:
        now = (time.perf_counter(), cpu_seconds())
        label, ends, _ = text.partition(": ")
        if text.endswith(" ..."):
            self._begun = now
        elif ends and not text.startswith(" ") and text.endswith(" s"):
            task = label if label.endswith(RANKER) else "the others"
            sums = self.tasks.setdefault(task, {"seconds": 0.0, "cpu_seconds": 0.0})
            for name, end, begin in zip(sums, now, self._begun, strict=True):
                sums[name] = round(sums[name] + end - begin, 1)


# -------------------------------------------------------------------------------------------- scoring


def scoring(user_counts: tuple[int, ...], n_trees: int, *, smoke: bool) -> list[dict[str, Any]]:
    """Score planted pairs; return a line for each number of users."""
    lines = []
    with machine.session("ranking", smoke=smoke) as spark:
        model = planted_model(spark, n_trees)
        for n_users in user_counts:
            with PeakMemory() as memory:
                scores = model.score(planted_pairs(spark, n_users))
                scores.write.format("noop").mode("overwrite").save()
            line = {
                "users": n_users,
                "pairs": n_users * CANDIDATES,
                "features": FEATURES,
                "cpu_seconds": round(memory.cpu_seconds, 1),
                **memory.megabytes,
            }
            print(line, flush=True)
            lines.append(line)
    return lines


def planted_model(spark: SparkSession, n_trees: int) -> LambdaMartModel:
    """Return trees that were grown on pairs of 100 users; an item is relevant by two features."""
    pairs = planted_pairs(spark, 100).selectExpr(
        "*", "cast(numbers[0] + numbers[1] > 1.4 as float) AS label"
    )
    encoding = Encoding(tuple(f"number_{n}" for n in range(FEATURES)), {})
    params = {
        "objective": "rank:ndcg", "tree_method": "hist", "grow_policy": "lossguide",
        "max_depth": 0, "max_leaves": 15, "max_bin": 256, "colsample_bytree": 0.3,
    }  # fmt: skip
    boosting = Boosting(params, n_trees, Train(ranks=1))  # type: ignore[call-arg]
    trees = grow_trees(pairs, ["user_idx"], ["item_idx"], encoding, boosting)
    arrays = {"trees": np.frombuffer(trees, np.uint8)}
    return LambdaMartModel(LambdaMartSettings(), datetime(2024, 1, 1, tzinfo=UTC), encoding, arrays)


def planted_pairs(spark: SparkSession, n_users: int) -> DataFrame:
    """Return `schema.PAIRS` of `n_users` users; nothing is computed before it is read."""

    def pairs(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for user in batch.column("id").to_numpy():
                rng = np.random.default_rng(user)
                numbers = pa.array(rng.random(CANDIDATES * FEATURES, np.float32))
                starts = np.arange(CANDIDATES + 1, dtype=np.int32)
                yield pa.RecordBatch.from_arrays(
                    [
                        pa.array(np.full(CANDIDATES, user)),
                        pa.array(starts[:-1]),
                        pa.ListArray.from_arrays(pa.array(starts * FEATURES), numbers),
                        pa.ListArray.from_arrays(pa.array(starts * 0), pa.array([], pa.int32())),
                    ],
                    names=schema.PAIRS.names,
                )

    return spark.range(n_users).mapInArrow(pairs, schema.PAIRS)
