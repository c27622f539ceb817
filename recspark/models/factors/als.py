"""ALS for implicit or explicit feedback: item factors; every user is folded in at scoring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Self

import pyarrow as pa
from pydantic import Field, model_validator
from pyspark.sql import DataFrame
from pyspark.sql.types import ArrayType, FloatType, IntegerType, LongType, StructField, StructType

from recspark import storage
from recspark.data.blocks import Array, parse_histories
from recspark.data.dataset import Dataset
from recspark.engines.als import BlockedAls, Plan
from recspark.engines.als_objective import Objective
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, Settings
from recspark.models.factors import als_mllib
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

    solver: Literal["blocked", "mllib"] = Field(
        "blocked",
        description="whose ALS: recspark's own, or Spark MLlib's for comparison. Source: "
        "benchmarks/als.py",
    )
    embedding_size: VectorSize = Field(
        64,
        description="rank: length of a factor",
    )
    reg: float = Field(
        0.1,
        gt=0,
        description="regularisation, times n^reg_exponent of a row (n: see reg_counts)",
        json_schema_extra={"tune": {"low": 0.001, "high": 1, "log": True}},
    )
    reg_exponent: float = Field(
        1.0,
        ge=0,
        le=1,
        description="nu: 1 = times the number of a row's interactions (ALS-WR, MLlib); 0 = flat",
    )
    reg_counts: Literal["observed", "all"] = Field(
        "observed",
        description="n of a row: its interactions; or these plus unobserved_weight times the length "
        "of the other side. Source: Rendle et al. 2021, equation 14",
    )
    feedback: Literal["implicit", "explicit"] = Field(
        "implicit", description="explicit: weights are ratings, and only observed pairs count"
    )
    alpha: float = Field(
        10.0,
        gt=0,
        description="confidence of an interaction is 1 + alpha * weight",
        json_schema_extra={"tune": {"low": 1, "high": 100, "log": True}},
    )
    unobserved_weight: float = Field(
        1.0,
        gt=0,
        description="confidence of a pair without interaction (alpha_0). Source: 1 in Hu, Koren and "
        "Volinsky 2008 and MLlib",
        json_schema_extra={
            "tune": {"low": 0.01, "high": 1, "log": True, "unless": {"solver": "mllib"}}
        },
    )
    iterations: int = Field(10, ge=1, description="passes over items and users. Source: MLlib")
    method: Literal["cg", "cholesky"] = Field(
        "cg", description="how blocked solves a row: conjugate gradient, or exactly"
    )
    cg_steps: int = Field(
        4,
        ge=1,
        description="steps of conjugate gradient a half-step. Source: engines/als_kernels.py",
    )
    half_life_days: HalfLifeDays = Field(
        120.0,
        description="days; an event this old counts half; null = no decay. Source: bundled data",
    )
    n_blocks: int = Field(
        4,
        ge=1,
        description="blocks of users and of items, the unit of parallel work: two to three times the "
        "cores of the cluster. Another number gives other last bits",
    )

    broadcast_mb: int = Field(
        256,
        ge=0,
        description="item factors up to this size are broadcast to every executor, beyond it each "
        "block is sent those it needs (docs/scale.md). Guess",
    )

    @model_validator(mode="after")
    def _known_to_mllib(self) -> Self:
        only = {"reg_exponent": 1.0, "reg_counts": "observed", "unobserved_weight": 1.0}
        other = [name for name, value in only.items() if getattr(self, name) != value]
        if self.solver == "mllib" and other:
            raise ValueError(f"solver mllib has no {', '.join(other)}; use solver blocked")
        return self

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(
            self.reg,
            self.alpha,
            self.unobserved_weight,
            self.reg_exponent,
            self.reg_counts,
            self.feedback,
        )


class AlsModel(FactorModel):
    """Item factors; ratings with feedback explicit."""


class Als(Algorithm[AlsSettings]):
    """Minimise sum c (p - x y)^2 + reg (n |x|^2 + n |y|^2), c = 1 + alpha * weight, p = weight > 0.

    The sum runs over all user-item pairs; n is the number of a row's interactions. `Objective` has
    the whole of it. Source: Hu, Koren and Volinsky 2008; scaled reg: Zhou et al. 2008; unobserved
    weight: Rendle et al. 2021.
    """

    settings_class = AlsSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> AlsModel:
        """See `Algorithm.fit`.

        Goes on from a checkpoint of the same fit below `options.scratch`. Driver: item-sized; user
        factors stay in the executors and are dropped.
        """
        settings = self.settings
        items = data.vocabulary()
        if settings.solver == "mllib":
            factors = als_mllib.item_factors(data, items, settings, options)
            return AlsModel(settings, data.cutoff, items, factors)
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
        frame = pairs(data, items, weights)
        with BlockedAls(frame, len(items), settings.objective, plan) as als:
            als.run()
            return AlsModel(settings, data.cutoff, items, als.item_factors())


def pairs(data: Dataset, items: Array, weigh: HistoryWeights) -> DataFrame:
    """Return `user bigint, items array<int>, weights array<float>`: what the engine works on.

    Items are local indices, ascending; weights decayed, above 0 (of ratings all). Narrow: no
    shuffle, no action.
    """
    shared = data.histories.sparkSession.sparkContext.broadcast(items)

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            start, at, weight = weigh.local(parse_histories(batch.column("history")), shared.value)
            offsets = pa.array(start, pa.int32())
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("user_idx"),
                    pa.ListArray.from_arrays(offsets, pa.array(at, pa.int32())),
                    pa.ListArray.from_arrays(offsets, pa.array(weight, pa.float32())),
                ],
                names=_PAIRS.names,
            )

    return data.histories.select("user_idx", "history").mapInArrow(run, _PAIRS)
