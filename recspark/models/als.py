"""ALS for implicit feedback: item factors by Spark MLlib; every user is folded in at scoring."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

import numpy as np
from pydantic import Field
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import storage
from recspark.data.blocks import Array, QueryBlock, micros
from recspark.data.dataset import Dataset
from recspark.data.interactions import interactions
from recspark.errors import IdRangeError
from recspark.models import topk
from recspark.models.base import FitOptions, Recommender, RecommenderModel, Settings
from recspark.models.item_item import HistoryWeights

MAX_ID = 2**31 - 1  # MLlib's ALS takes 32-bit ids
_BLOCK_BYTES = 16 << 20  # factors gathered at once while users are folded in


class AlsSettings(Settings):
    """Settings of `Als`."""

    embedding_size: int = Field(
        64,
        ge=1,
        description="rank: length of a factor",
        json_schema_extra={"tune": {"choices": [32, 64, 128]}},
    )
    reg: float = Field(
        0.1,
        gt=0,
        description="regularisation, times the number of a row's interactions (ALS-WR)",
        json_schema_extra={"tune": {"low": 0.001, "high": 1, "log": True}},
    )
    alpha: float = Field(
        10.0,
        gt=0,
        description="confidence of an interaction is 1 + alpha * weight",
        json_schema_extra={"tune": {"low": 1, "high": 100, "log": True}},
    )
    iterations: int = Field(10, ge=1, description="passes over items and users. Source: MLlib")
    half_life_days: float | None = Field(
        120.0,
        gt=0,
        description="days; an event this old counts half; null = no decay. Source: bundled data",
        json_schema_extra={"tune": {"low": 20, "high": 400, "log": True}},
    )
    n_blocks: int = Field(
        2,
        ge=1,
        description="blocks of users and of items, MLlib's unit of parallel work. Above 2, MLlib "
        "adds partial sums in the order tasks end: the last bits of a refit may differ",
    )


class AlsModel(RecommenderModel):
    """`factors` float32 (n_items, embedding_size). Users are folded in, none is stored."""

    def __init__(
        self, settings: AlsSettings, cutoff: datetime, items: Array, factors: Array
    ) -> None:
        super().__init__(settings, cutoff, items)
        self.factors = factors
        self._settings = settings

    def scorer(self) -> topk.Scorer:
        """See `RecommenderModel`."""
        settings = self._settings
        return AlsScorer(
            _weights(settings, self.cutoff),
            self.items,
            topk.Shared(self.factors),
            settings.reg,
            settings.alpha,
        )

    def arrays(self) -> dict[str, Array]:
        """See `RecommenderModel`."""
        return {"factors": self.factors}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RecommenderModel`."""
        assert isinstance(settings, AlsSettings)
        return cls(settings, cutoff, items, arrays["factors"])


@dataclass(frozen=True)
class AlsScorer:
    """Folds the users of a block in, and multiplies."""

    weights: HistoryWeights
    items: Array
    factors: topk.Shared
    reg: float
    alpha: float

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        start, items, weights = self.weights.local(block.history, self.items)
        factors = np.asarray(self.factors.array)
        users = fold_in(start, items, weights, factors, self.reg, self.alpha)
        return topk.DotScores(users, factors, None, np.diff(start) > 0)


class Als(Recommender[AlsSettings]):
    """Minimise sum c (p - x y)^2 + reg (n |x|^2 + n |y|^2), c = 1 + alpha * weight, p = weight > 0.

    The sum runs over all user-item pairs; n is the number of a row's interactions. Source: Hu,
    Koren and Volinsky 2008; scaled reg: Zhou et al. 2008; MLlib's ALS, which this wraps.
    """

    settings_class = AlsSettings

    def fit(self, data: Dataset, options: FitOptions) -> AlsModel:
        """See `Recommender.fit`.

        Raises IdRangeError above 2^31 - 1 users. Checkpoints every tenth iteration below
        `options.scratch`. Driver: item-sized; user factors stay in the executors and are dropped.
        """
        settings = self.settings
        items = data.vocabulary()
        largest = data.histories.agg(F.max("user_idx")).collect()[0][0]
        if largest is not None and largest > MAX_ID:
            raise IdRangeError(
                f"als: user_idx goes up to {largest}, MLlib's ids up to {MAX_ID}; use another model"
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
        return AlsModel(settings, data.cutoff, items, factors)


def ratings(data: Dataset, settings: AlsSettings) -> DataFrame:
    """Return `user int, item int, rating float`: decayed weights above 0, in the order ALS needs.

    Each of MLlib's user blocks comes from one partition, sorted: its sums have one order. One
    shuffle, no action.
    """
    n = settings.n_blocks
    return (
        interactions(data.histories, data.cutoff, settings.half_life_days)
        .where("weight > 0")
        .select(
            F.col("user_idx").cast("int").alias("user"),
            F.col("item_idx").alias("item"),
            F.col("weight").alias("rating"),
        )
        .repartition(n, F.pmod("user", F.lit(n)))
        .sortWithinPartitions("user", "item")
    )


def train(ratings: DataFrame, settings: AlsSettings, options: FitOptions) -> ALSModel:
    """Return MLlib's model, its factors persisted. The last half-step was that of the users."""
    if options.scratch:
        ratings.sparkSession.sparkContext.setCheckpointDir(_checkpoints(options))
    als = ALS(
        rank=settings.embedding_size,
        maxIter=settings.iterations,
        regParam=settings.reg,
        alpha=settings.alpha,
        implicitPrefs=True,
        numUserBlocks=settings.n_blocks,
        numItemBlocks=settings.n_blocks,
        checkpointInterval=10 if options.scratch else -1,
        seed=options.seed,
    )
    return als.fit(ratings)


def fold_in(
    start: Array, items: Array, weights: Array, factors: Array, reg: float, alpha: float
) -> Array:
    """Return the factors of users given those of items, float32 (n, d): the ALS half-step.

    Parameters
    ----------
    start : int64 (n + 1,); row r has `start[r]:start[r + 1]` of
    items : local, int32 (p,), and weights : float32 (p,), above 0
    factors : float32 (m, d)

    x = (Y^T Y + alpha Y^T W Y + reg n I)^-1 Y^T (1 + alpha w), in float64, one solve a row. A row's
    answer depends on that row alone: rows are padded to a power of two, so a row's sums have one
    order. A row without items gives 0. Source: Hu, Koren and Volinsky 2008, equation 4.
    """
    wide = factors.astype(np.float64)
    size = wide.shape[1]
    gram = wide.T @ wide
    lengths = np.diff(start)
    padded = np.where(lengths > 0, 2 ** np.ceil(np.log2(np.maximum(lengths, 1))), 0).astype(int)
    out = np.zeros((len(lengths), size), np.float32)
    for width in np.unique(padded[padded > 0]):
        rows = np.flatnonzero(padded == width)
        step = max(1, _BLOCK_BYTES // (8 * size * width))
        for begin in range(0, len(rows), step):
            chosen = rows[begin : begin + step]
            inside = np.arange(width) < lengths[chosen, None]  # (b, width)
            at = np.where(inside, start[chosen, None] + np.arange(width), 0)
            near = wide[items[at]]  # (b, width, d)
            extra = np.where(inside, alpha * weights[at].astype(np.float64), 0)  # c - 1
            normal = gram + near.transpose(0, 2, 1) @ (near * extra[:, :, None])  # (b, d, d)
            normal += reg * lengths[chosen, None, None] * np.eye(size)
            right = np.where(inside, 1 + extra, 0)[:, None, :] @ near  # (b, 1, d)
            out[chosen] = np.linalg.solve(normal, right.transpose(0, 2, 1))[:, :, 0]
    return out


def _weights(settings: AlsSettings, cutoff: datetime) -> HistoryWeights:
    return HistoryWeights(micros(cutoff), settings.half_life_days, "sum")


def _checkpoints(options: FitOptions) -> str:
    return storage.join(storage.absolute(options.scratch), "als")


def _persisted(spark: SparkSession) -> dict[int, Any]:
    """Return the persisted RDDs of the session, by id (JVM objects)."""
    context: Any = spark.sparkContext
    return dict(context._jsc.getPersistentRDDs())
