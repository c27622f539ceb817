"""Item factors by Spark MLlib's ALS: `solver: mllib` of model `als`, kept for comparison."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import storage
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.interactions import interactions
from recspark.errors import IdRangeError
from recspark.models.base import FitOptions
from recspark.models.scoring import topk

MAX_ID = 2**31 - 1  # MLlib's ALS takes 32-bit ids


class MllibSettings(Protocol):
    """Those of the settings of `als` that MLlib knows too."""

    embedding_size: int
    iterations: int
    reg: float
    alpha: float
    feedback: Literal["implicit", "explicit"]
    half_life_days: float | None
    n_blocks: int


def item_factors(
    data: Dataset, items: Array, settings: MllibSettings, options: FitOptions
) -> Array:
    """Return the factors of `items` (item_idx, ascending), float32 (n_items, embedding_size).

    Raises IdRangeError above 2^31 - 1 users. Checkpoints every tenth iteration below
    `options.scratch`. Driver: item-sized; user factors stay in the executors and are dropped.
    """
    largest = data.histories.agg(F.max("user_idx")).collect()[0][0]
    if largest is not None and largest > MAX_ID:
        raise IdRangeError(
            f"als: user_idx goes up to {largest}, MLlib's ids up to {MAX_ID}; use solver: blocked"
        )
    spark = data.histories.sparkSession
    before = set(_persisted(spark))
    try:
        model = train(ratings(data, settings), settings, options)
        rows = model.itemFactors.toArrow()
    finally:
        for key, rdd in _persisted(spark).items():
            if key not in before:
                rdd.unpersist()
        if options.scratch:
            storage.remove(_checkpoints(options))
    factors = np.zeros((len(items), settings.embedding_size), np.float32)
    values = rows.column("features").combine_chunks().flatten().to_numpy()
    at = topk.local_index(items, rows.column("id").to_numpy())
    factors[at] = values.reshape(len(at), -1)
    return factors


def ratings(data: Dataset, settings: MllibSettings) -> DataFrame:
    """Return `user int, item int, rating float`: decayed weights above 0 (explicit: all), in the order
    ALS needs.

    Each of MLlib's user blocks comes from one partition, sorted: its sums have one order. One
    shuffle, no action.
    """
    n = settings.n_blocks
    return (
        interactions(data.histories, data.cutoff, settings.half_life_days)
        .where("true" if settings.feedback == "explicit" else "weight > 0")
        .select(
            F.col("user_idx").cast("int").alias("user"),
            F.col("item_idx").alias("item"),
            F.col("weight").alias("rating"),
        )
        .repartition(n, F.pmod("user", F.lit(n)))
        .sortWithinPartitions("user", "item")
    )


def train(ratings: DataFrame, settings: MllibSettings, options: FitOptions) -> ALSModel:
    """Return MLlib's model, its factors persisted. The last half-step was that of the users.

    Above 2 blocks, MLlib adds partial sums in the order tasks end: the last bits may differ.
    """
    if options.scratch:
        ratings.sparkSession.sparkContext.setCheckpointDir(_checkpoints(options))
    als = ALS(
        rank=settings.embedding_size,
        maxIter=settings.iterations,
        regParam=settings.reg,
        alpha=settings.alpha,
        implicitPrefs=settings.feedback == "implicit",
        numUserBlocks=settings.n_blocks,
        numItemBlocks=settings.n_blocks,
        checkpointInterval=10 if options.scratch else -1,
        seed=options.seed,
    )
    return als.fit(ratings)


def _checkpoints(options: FitOptions) -> str:
    return storage.join(storage.absolute(options.scratch), "als")


def _persisted(spark: SparkSession) -> dict[int, Any]:
    """Return the persisted RDDs of the session, by id (JVM objects)."""
    context: Any = spark.sparkContext
    return dict(context._jsc.getPersistentRDDs())
