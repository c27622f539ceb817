"""ALS: item factors, and users folded in as the last half-step leaves them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pyspark.ml.recommendation import ALS as MllibAls
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.data.blocks import Array, micros, parse_queries
from recspark.engines.als_kernels import fold_in
from recspark.engines.als_objective import Objective, loss
from recspark.models.base import FitOptions
from recspark.models.factors import als
from recspark.models.factors.als import Als, AlsModel, AlsSettings
from recspark.models.weights import HistoryWeights
from recspark.pipeline.tune import search_space
from recspark.testing import synth

SETTINGS = AlsSettings(
    embedding_size=6,
    reg=0.2,
    alpha=4.0,
    iterations=3,
    half_life_days=30.0,
    n_blocks=2,
    method="cholesky",
)


def mllib(pairs: DataFrame, items: Array, settings: AlsSettings) -> tuple[Array, Array]:
    """Return the factors of Spark MLlib's ALS: of the users in the order of `pairs`, of `items`."""
    ratings = pairs.select(
        F.col("user").cast("int"), F.explode(F.arrays_zip("items", "weights")).alias("pair")
    ).select("user", F.col("pair.items").alias("item"), F.col("pair.weights").alias("rating"))
    model = MllibAls(
        rank=settings.embedding_size,
        maxIter=settings.iterations,
        regParam=settings.reg,
        alpha=settings.alpha,
        implicitPrefs=True,
        numUserBlocks=settings.n_blocks,
        numItemBlocks=settings.n_blocks,
        checkpointInterval=4,  # a longer lineage overflows the stack
        seed=1,
    ).fit(ratings)
    user_idx = [row["user"] for row in pairs.select("user").collect()]
    factors = []
    for frame, ids in ((model.userFactors, user_idx), (model.itemFactors, range(len(items)))):
        by_id = {row["id"]: row["features"] for row in frame.collect()}
        zeros = [0.0] * settings.embedding_size
        factors.append(np.array([by_id.get(id_, zeros) for id_ in ids], np.float32))
        frame.unpersist()
    return factors[0], factors[1]


def rows_of(pairs: DataFrame) -> tuple[Array, Array, Array]:
    """Return start, local item and weight of the users' interactions, in the order of `pairs`."""
    rows = pairs.toArrow().to_pydict()
    start = np.concatenate([[0], np.cumsum([len(items) for items in rows["items"]])])
    item = np.concatenate(rows["items"]).astype(np.int32)
    return start, item, np.concatenate(rows["weights"]).astype(np.float32)


@pytest.mark.spark
def test_users_are_folded_in_as_mllib_solves_them(spark: SparkSession) -> None:
    data = synth.dataset(spark, synth.power_law(50, 30))
    items = data.vocabulary()
    weights = HistoryWeights.sums(data.cutoff, SETTINGS.half_life_days)
    pairs = als.pairs(data, items, weights).sort("user").persist()
    of_users, of_items = mllib(pairs, items, SETTINGS)
    model = AlsModel(SETTINGS, data.cutoff, items, of_items)
    block = synth.ask(data).toArrow().combine_chunks().to_batches()[0]
    parsed = parse_queries(block)
    scores = model.scorer().score(parsed)
    user_idx = [row["user"] for row in pairs.select("user").collect()]
    assert len(user_idx) == len(parsed)
    order = np.searchsorted(user_idx, parsed.user_idx)
    assert np.allclose(scores.users, of_users[order], rtol=1e-4, atol=1e-5)
    pairs.unpersist()


@pytest.mark.spark
def test_a_user_index_beyond_an_int_is_fitted(spark: SparkSession) -> None:
    events = synth.log([(2**31, 1, 1.0), (2**31, 2, 1.0), (5, 1, 1.0), (5, 3, 1.0)])
    assert isinstance(Als(SETTINGS).fit(synth.dataset(spark, events), FitOptions()), AlsModel)


def test_ages_are_measured_to_the_cutoff() -> None:
    model = AlsModel(SETTINGS, synth.CUTOFF, np.array([1], np.int32), np.ones((1, 6), np.float32))
    assert model.scorer().weights.as_of == micros(synth.CUTOFF)


@pytest.mark.slow
@pytest.mark.spark
def test_the_engine_reaches_the_loss_of_mllib(spark: SparkSession, tmp_path: Path) -> None:
    """One float64 function gives both losses: reg and alpha mean what they mean in MLlib."""
    spark.sparkContext.setCheckpointDir(str(tmp_path))
    data = synth.dataset(spark, synth.power_law(300, 60))
    settings = SETTINGS.model_copy(update={"iterations": 12})
    weights = HistoryWeights.sums(data.cutoff, settings.half_life_days)
    pairs = als.pairs(data, data.vocabulary(), weights).persist()
    rows = rows_of(pairs)

    def loss_of(item_factors: Array) -> float:
        users = fold_in(*rows, item_factors, settings.objective)
        return loss(*rows, users, item_factors, settings.objective)

    of_mllib = loss_of(mllib(pairs, data.vocabulary(), settings)[1])
    for method in ("cholesky", "cg"):
        fitted = Als(settings.model_copy(update={"method": method})).fit(data, FitOptions())
        assert loss_of(fitted.factors) == pytest.approx(of_mllib, rel=1e-3)
    pairs.unpersist()


@pytest.mark.slow
@pytest.mark.spark
def test_a_fit_goes_on_from_its_checkpoint(spark: SparkSession, tmp_path: Path) -> None:
    data = synth.dataset(spark, synth.power_law(30, 12))
    told: list[str] = []
    options = FitOptions(scratch=str(tmp_path), progress=told.append)
    settings = SETTINGS.model_copy(update={"iterations": 6})
    first = Als(settings).fit(data, options).factors
    again = Als(settings).fit(data, options).factors
    assert np.array_equal(first, again)
    assert "goes on after iteration 5" in told[6]
    assert len(told) == 6 + 2


def test_every_setting_of_the_objective_is_minimised_and_folded_in_with() -> None:
    """The fit and the scorer solve the same objective."""
    values = {
        "reg": 0.3,
        "alpha": 7.0,
        "unobserved_weight": 0.2,
        "reg_exponent": 0.5,
        "reg_counts": "all",
        "feedback": "explicit",
    }
    defaults = AlsSettings().objective
    assert set(values) == {field.name for field in fields(Objective)}
    assert all(getattr(defaults, name) != value for name, value in values.items())
    settings = AlsSettings(embedding_size=6, **values)  # type: ignore[arg-type]
    want = Objective(**values)  # type: ignore[arg-type]
    assert settings.objective == want
    assert AlsModel(
        settings, synth.CUTOFF, np.array([1], np.int32), np.ones((1, 6), np.float32)
    ).scorer().objective == want  # fmt: skip


def test_tuning_ranges_over_the_weight_of_what_was_not_observed() -> None:
    assert search_space("als")["unobserved_weight"] == {"low": 0.01, "high": 1, "log": True}
