"""Memory of top-N over a large catalogue: what one executor holds, JVM and Python workers together.

An ALS artifact of a million items in a local folder, so that workers map its file and share the pages;
users are folded in from their histories. A real executor: a process of its own, two cores, its
Python workers forked by recspark's daemon.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psutil
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from benchmarks import machine
from benchmarks.memory import held
from recspark import schema
from recspark.models import artifacts
from recspark.models.factors.als import AlsModel, AlsSettings
from recspark.models.registry import model_spec

_EXECUTOR = "org.apache.spark.executor.CoarseGrainedExecutorBackend"
_CUTOFF = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Size:
    """Lists of k of `items`, for users with 20 events each."""

    items: int = 1_000_000
    users: int = 20_000
    rank: int = 64
    k: int = 100
    heap: str = "1g"
    cores: int = 2


def run(*, smoke: bool) -> None:
    """Measure the size of the target, or a small one."""
    figures = measure(Size(20_000, 400, 16, 20) if smoke else Size())
    print(figures)
    if not smoke:
        machine.write("topn_memory", "python -m benchmarks topn_memory", figures)


def measure(size: Size) -> dict[str, Any]:
    """Return seconds and the peak memory of the executor's processes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARK_WORKER_DIR"] = folder
        settings = [
            f"master=local-cluster[1,{size.cores},1024]",
            f"conf={{spark.executor.memory: {size.heap}, spark.ui.showConsoleProgress: 'false', "
            "spark.python.daemon.module: recspark.worker_daemon}",
        ]
        with machine.session("topn_memory", settings, env="cluster") as spark:
            factors = np.random.default_rng(1).standard_normal((size.items, size.rank), np.float32)
            items = np.arange(size.items, dtype=np.int32)
            als = AlsSettings(embedding_size=size.rank, half_life_days=None)
            artifacts.save(AlsModel(als, _CUTOFF, items, factors), f"{folder}/als")
            del factors
            model = artifacts.load(f"{folder}/als", model_spec("als"))
            queries(spark, size, 100).write.parquet(f"{folder}/warm")
            queries(spark, size, size.users).write.parquet(f"{folder}/queries")
            lists(model.recommend(spark.read.parquet(f"{folder}/warm"), size.k))
            with executor_memory() as peak:
                begun = time.perf_counter()
                n_rows = lists(model.recommend(spark.read.parquet(f"{folder}/queries"), size.k))
                seconds = time.perf_counter() - begun
    assert n_rows == size.users * size.k, n_rows
    return {**asdict(size), "seconds": seconds, **peak, "load": os.getloadavg()[0]}


def queries(spark: SparkSession, size: Size, n: int) -> DataFrame:
    """Queries of n users; an event in five is on one of the first hundredth of items."""
    item = f"CAST(pmod(xxhash64(id, x), IF(x % 5 = 0, {size.items // 100}, {size.items})) AS int)"
    event = (
        f"named_struct('item_idx', {item}, 'event_at', timestamp '2025-12-01 00:00:00', 'event_type', "
        "'view', 'weight', 1.0f, 'value', 1.0f, 'session_id', 's', 'order_id', 'o')"
    )
    history = f"CAST(transform(sequence(0, 19), x -> {event}) AS {schema.HISTORY.simpleString()})"
    rows = spark.range(n).selectExpr(
        "id AS user_idx",
        f"{history} AS history",
    )
    seen = F.array_distinct(F.transform("history", lambda event: event["item_idx"]))
    return rows.withColumn("seen", seen).repartition(8, "user_idx")


def lists(found: DataFrame) -> int:
    """Make the lists; return the number of their rows."""
    return found.agg(F.count(F.lit(1)), F.sum("score")).collect()[0][0]


@contextmanager
def executor_memory() -> Iterator[dict[str, Any]]:
    """Give the most that the executor's processes held at once, sampled four times a second, MB.

    `resident` counts a shared page in each process, `proportional` once.
    """
    peak = {
        "executor_proportional_mb": 0, "executor_resident_mb": 0, "jvm_mb": 0, "workers_mb": 0
    }  # fmt: skip
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            for name, value in sample().items():
                peak[name] = max(peak[name], value >> 20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def sample() -> dict[str, int]:
    """Return what the executor below this process holds now, bytes."""
    now = dict.fromkeys(
        ("executor_proportional_mb", "executor_resident_mb", "jvm_mb", "workers_mb"), 0
    )
    for process in psutil.Process().children(recursive=True):
        try:
            if _EXECUTOR not in process.cmdline():
                continue
            tree = [process, *process.children(recursive=True)]
            resident = sum(p.memory_info().rss for p in tree)
        except psutil.Error:
            continue
        jvm = held(process)
        workers = sum(held(p) for p in tree[1:])
        now["jvm_mb"] += jvm
        now["workers_mb"] += workers
        now["executor_proportional_mb"] += jvm + workers
        now["executor_resident_mb"] += resident
    return now


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topn_memory", description=__doc__)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    print("RESULT", json.dumps(measure(Size(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
