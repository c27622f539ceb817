"""A factorisation's checkpoint that is not as it was written gives way to the one before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from recspark import storage
from recspark.engines import als_checkpoint
from tests.damage import damages, put

IDENTITY = {"rank": 2}


def save(spark: SparkSession, folder: str, losses: list[float]) -> str:
    factors = {
        side: spark.sparkContext.parallelize(
            [(block, np.full((3, 2), len(losses) + block, np.float32)) for block in range(2)], 1
        )
        for side in ("users", "items")
    }
    return als_checkpoint.save(folder, losses, factors, IDENTITY)


@pytest.mark.spark
def test_every_damage_is_told_and_the_one_before_it_taken(
    spark: SparkSession, tmp_path: Path
) -> None:
    before = save(spark, str(tmp_path), [1 / 3])
    place = save(spark, str(tmp_path), [1 / 3, 0.1])

    def latest() -> tuple[tuple[str, list[float]], list[str]]:
        told: list[str] = []
        context = spark.sparkContext
        return als_checkpoint.latest(context, str(tmp_path), 9, IDENTITY, told.append), told

    assert latest() == ((place, [1 / 3, 0.1]), [])
    files = [path for path in sorted(Path(place).rglob("*")) if path.is_file()]
    assert len(files) == 6
    for number, file in enumerate(files):
        whole = file.read_bytes()
        others = [other for other in files if other != file]
        # Each tries a job: all damages of the small files, and of each block's some others.
        step = 6 if file.suffix == ".npy" else 2
        for how, content in list(damages(file, others))[number % step :: step]:
            put(file, content)
            found, told = latest()
            if file.name != storage.COMPLETE or content is None:
                assert found == (before, [1 / 3]), (file.name, how)
                assert place in told[0]
            put(file, whole)
    assert latest()[0][0] == place
