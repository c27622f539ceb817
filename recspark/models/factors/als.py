"""ALS for implicit or explicit feedback.

The model keeps item factors only: every user is folded in at scoring.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import pyarrow as pa
from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql.types import ArrayType, FloatType, IntegerType, LongType, StructField, StructType

from recspark import storage
from recspark.data.blocks import Array, parse_histories
from recspark.data.dataset import Dataset
from recspark.engines.als import BlockedAls, Plan
from recspark.engines.als_objective import Objective
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, Settings
from recspark.models.factors.factor_model import FactorModel
from recspark.models.setting_types import HalfLifeDays, VectorSize
from recspark.models.weights import HistoryWeights

_PAIRS = StructType(
    [
        StructField("user", LongType()),
        StructField("items", ArrayType(IntegerType())),
        StructField("weights", ArrayType(FloatType())),
    ]
)


class AlsSettings(Settings):
    """Settings of `Als`."""

    embedding_size: VectorSize = Field(
        64,
        description="length of the factor (vector) of an item and of a user; also called rank",
    )
    reg: float = Field(
        0.1,
        gt=0,
        description="regularisation; for each row (user or item) it is multiplied by "
        "n^reg_exponent, with n as in reg_counts",
        json_schema_extra={"tune": {"low": 0.001, "high": 1, "log": True}},
    )
    reg_exponent: float = Field(
        1.0,
        ge=0,
        le=1,
        description="exponent of n in the regularisation of a row (nu). 1 = in proportion to n "
        "(ALS-WR, MLlib), 0 = the same for every row",
    )
    reg_counts: Literal["observed", "all"] = Field(
        "observed",
        description="n of a row: observed = the number of its interactions; all = that plus "
        "unobserved_weight times the number of all items (for a user) or all users (for an item). "
        "Source: Rendle et al. 2021, equation 14",
    )
    feedback: Literal["implicit", "explicit"] = Field(
        "implicit",
        description="implicit = all user-item pairs count, and a weight is a confidence. explicit "
        "= weights are ratings, and only observed pairs count",
    )
    alpha: float = Field(
        10.0,
        gt=0,
        description="implicit: the confidence of an interaction is 1 + alpha * weight",
        json_schema_extra={"tune": {"low": 1, "high": 100, "log": True}},
    )
    unobserved_weight: float = Field(
        1.0,
        gt=0,
        description="implicit: the confidence of a pair without interaction (alpha_0). Source: 1 "
        "in Hu, Koren and Volinsky 2008 and MLlib",
        json_schema_extra={"tune": {"low": 0.01, "high": 1, "log": True}},
    )
    iterations: int = Field(10, ge=1, description="passes over items and users. Source: MLlib")
    method: Literal["cg", "cholesky"] = Field(
        "cg",
        description="how the factor of a row is computed: cg = by conjugate gradient, cholesky = "
        "exactly",
    )
    cg_steps: int = Field(
        4,
        ge=1,
        description="steps of conjugate gradient per row and half-step. Source: "
        "engines/als_kernels.py",
    )
    half_life_days: HalfLifeDays = Field(
        120.0,
        description="days; an event this old counts half; null = no decay. Source: bundled data",
    )
    n_blocks: int = Field(
        4,
        ge=1,
        description="number of blocks of users, and of items. A block is the unit of parallel "
        "work: set two to three times the cores of the cluster. Another number gives other last "
        "bits",
    )

    broadcast_mb: int = Field(
        256,
        ge=0,
        description="item factors of up to this size are broadcast to every executor; of larger "
        "ones, each block is sent those that it needs (docs/scale.md). Guess",
    )

    @property
    def objective(self) -> Objective:
        """The objective that these settings minimise."""
        return Objective(
            self.reg,
            self.alpha,
            self.unobserved_weight,
            self.reg_exponent,
            self.reg_counts,
            self.feedback,
        )


class AlsModel(FactorModel):
    """Fitted item factors. With feedback `explicit`, scores can be ratings: see `rates`."""


class Als(Algorithm[AlsSettings]):
    """Minimise sum c (p - x y)^2 + reg (n |x|^2 + n |y|^2) over user factors x and item factors y.

    The sum runs over all user-item pairs, with c = 1 + alpha * weight and p = 1 where weight > 0,
    else 0. n is the number of interactions of the user or item. This is the objective with the
    default settings; `Objective` has it in full.

    Source: Hu, Koren and Volinsky 2008; regularisation scaled by n: Zhou et al. 2008; unobserved
    weight: Rendle et al. 2021.
    """

    settings_class = AlsSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> AlsModel:
        """See `Algorithm.fit`.

        If `options.scratch` holds a checkpoint of the same fit, the fit continues from it. The
        driver holds data per item, none per user: user factors stay in the executors and are
        dropped.
        """
        settings = self.settings
        items = data.vocabulary()
        plan = Plan(
            rank=settings.embedding_size,
            iterations=settings.iterations,
            n_blocks=settings.n_blocks,
            seed=options.seed,
            method=settings.method,
            cg_steps=settings.cg_steps,
            broadcast_bytes=settings.broadcast_mb << 20,
            scratch=storage.absolute(storage.join(options.scratch, "als"))
            if options.scratch
            else "",
            progress=options.progress,
        )
        ratings = settings.feedback == "explicit"
        weights = HistoryWeights.sums(data.cutoff, settings.half_life_days, ratings=ratings)
        weighted_items = pairs(data, items, weights)
        with BlockedAls(weighted_items, len(items), settings.objective, plan) as als:
            als.run()
            return AlsModel(settings, data.cutoff, items, als.item_factors())


def pairs(data: Dataset, items: Array, weights: HistoryWeights) -> DataFrame:
    """Return `user bigint, items array<int>, weights array<float>`: the input of the engine.

    The items are local indices, ascending. The weights are decayed. Items that weigh 0 or less are
    left out, except if the weights are ratings. Narrow: no shuffle, no action.
    """
    shared = data.histories.sparkSession.sparkContext.broadcast(items)

    def weigh_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            start, local, weight = weights.local(
                parse_histories(batch.column("history")), shared.value
            )
            offsets = pa.array(start, pa.int32())
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("user_idx"),
                    pa.ListArray.from_arrays(offsets, pa.array(local, pa.int32())),
                    pa.ListArray.from_arrays(offsets, pa.array(weight, pa.float32())),
                ],
                names=_PAIRS.names,
            )

    return data.histories.select("user_idx", "history").mapInArrow(weigh_batches, _PAIRS)
