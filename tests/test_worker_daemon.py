"""Spark's Python workers: what recspark changes in them, and only there; how they are forked."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import zipfile
import zipimport
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


@contextmanager
def new_workers(spark: SparkSession, setting: str, value: str) -> Iterator[None]:
    """Give tasks another environment, so that Spark starts a daemon of its own for their workers.

    `setting` below spark.sql.execution.pyspark.udf: one that no other test uses for this.
    """
    name = f"spark.sql.execution.pyspark.udf.{setting}"
    spark.conf.set(name, value)
    try:
        yield
    finally:
        spark.conf.unset(name)


def test_a_worker_keeps_its_zip_directories(spark: SparkSession) -> None:
    def caches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import recspark.data.blocks  # noqa: F401  as every task of ours does

        (zips,) = [p for p in sys.path if p.endswith("pyspark.zip")]
        directory = zipimport._zip_directory_cache[zips]  # type: ignore[attr-defined]
        importlib.invalidate_caches()
        same = zipimport._zip_directory_cache[zips] is directory  # type: ignore[attr-defined]
        list(batches)
        yield pa.RecordBatch.from_pydict({"same": [same]})

    (row,) = spark.range(1).repartition(1).mapInArrow(caches, "same boolean").collect()
    assert row["same"]  # to read the directories again takes 0.1 to 0.2 s
    assert "pyspark.worker" not in sys.modules  # and the driver is left alone


def test_a_worker_does_not_walk_its_modules_after_every_task(spark: SparkSession) -> None:
    def collect(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import recspark.engines.als_kernels  # noqa: F401  with numba and scipy

        frozen = gc.get_freeze_count()
        gc.collect()
        seen = len(gc.get_objects())
        list(batches)
        yield pa.RecordBatch.from_pydict({"frozen": [frozen], "seen": [seen]})

    rows = spark.range(1).repartition(1).mapInArrow(collect, "frozen long, seen long")
    # Another test's task may have imported torch after the second freeze.
    with new_workers(spark, "hideTraceback.enabled", "true"):
        (row,) = rows.collect()
    assert row["frozen"] > 50_000
    assert row["seen"] < 20_000
    assert gc.get_freeze_count() == 0


def test_a_worker_is_forked_with_its_imports_made(spark: SparkSession) -> None:
    def ask(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        there = {"pandas", "numba", "recspark.engines.als"} <= set(sys.modules)
        frozen = gc.get_freeze_count()
        list(batches)
        yield pa.RecordBatch.from_pydict({"there": [there], "frozen": [frozen]})

    rows = spark.range(2).repartition(2).mapInArrow(ask, "there boolean, frozen long").collect()
    assert all(row["there"] for row in rows)
    # Pages stay shared: no collection writes them.
    assert all(row["frozen"] > 100_000 for row in rows)


def test_a_worker_freezes_once_more_after_its_first_task(spark: SparkSession) -> None:
    def ask(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        list(batches)
        # Objects that outlive the task, as those of an import do.
        vars(sys).setdefault("kept_by_a_test", []).extend([[] for _ in range(1000)])
        yield pa.RecordBatch.from_pydict({"pid": [os.getpid()], "frozen": [gc.get_freeze_count()]})

    counts: dict[int, list[int]] = {}
    rows = spark.range(1).repartition(1).mapInArrow(ask, "pid long, frozen long")
    with new_workers(spark, "faulthandler.enabled", "true"):
        for _ in range(8):
            for row in rows.collect():
                counts.setdefault(row["pid"], []).append(row["frozen"])
    in_first_task, *later = max(counts.values(), key=len)
    assert len(later) >= 2
    assert in_first_task < later[0]
    assert len(set(later)) == 1


def test_a_worker_of_sparks_own_daemon_keeps_its_zip_directories_too() -> None:
    """As on a cluster that gets recspark by `--py-files`."""
    code = (
        "import pyspark.worker, zipimport; before = zipimport.zipimporter.invalidate_caches; "
        "import recspark; print(zipimport.zipimporter.invalidate_caches is before)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.split() == ["False"]


def test_a_module_shipped_later_is_found(spark: SparkSession, tmp_path: Path) -> None:
    def ask(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import recspark.data.blocks  # noqa: F401

        list(batches)
        answer = importlib.import_module("shipped_later").ANSWER
        yield pa.RecordBatch.from_pydict({"answer": [answer]})

    archive = tmp_path / "later.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("shipped_later.py", "ANSWER = 42\n")
    spark.sparkContext.addPyFile(str(archive))
    rows = spark.range(1).repartition(1).mapInArrow(ask, "answer long").collect()
    assert [row["answer"] for row in rows] == [42]
