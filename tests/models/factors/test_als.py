"""ALS: item factors of either solver, and users folded in as the last half-step leaves them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import micros, parse_queries
from recspark.engines.als_kernels import fold_in
from recspark.engines.als_objective import Objective, loss
from recspark.errors import ConfigError, IdRangeError
from recspark.models.base import FitOptions
from recspark.models.factors import als, als_mllib
from recspark.models.factors.als import Als, AlsModel, AlsSettings
from recspark.models.weights import HistoryWeights
from recspark.pipeline.tune import search_space
from recspark.testing import synth

SETTINGS = AlsSettings(
    solver="mllib",
    embedding_size=6,
    reg=0.2,
    alpha=4.0,
    iterations=3,
    half_life_days=30.0,
    n_blocks=2,
)
BLOCKED = SETTINGS.model_copy(update={"solver": "blocked", "method": "cholesky"})


@pytest.mark.spark
def test_users_are_those_of_mllib(spark: SparkSession) -> None:
    data = synth.dataset(spark, synth.power_law(50, 30))
    before = set(als_mllib._persisted(spark))
    theirs = als_mllib.train(als_mllib.ratings(data, SETTINGS), SETTINGS, FitOptions())
    users = {r["id"]: np.array(r["features"]) for r in theirs.userFactors.collect()}
    model = Als(SETTINGS).fit(data, FitOptions())
    items = {r["id"]: np.array(r["features"]) for r in theirs.itemFactors.collect()}
    for item, factor in zip(model.items.tolist(), model.factors, strict=True):
        assert np.array_equal(items.get(item, np.zeros(6)), factor)

    block = synth.ask(data).toArrow().combine_chunks().to_batches()[0]
    parsed = parse_queries(block)
    scores = model.scorer().score(parsed)
    assert len(users) == len(parsed)
    for user, folded in zip(parsed.user_idx.tolist(), scores.users, strict=True):
        assert np.allclose(folded, users[user], rtol=1e-4, atol=1e-5)
    for key in set(als_mllib._persisted(spark)) - before:
        als_mllib._persisted(spark)[key].unpersist()


@pytest.mark.spark
def test_checkpoints_go_to_scratch_and_are_removed(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    remove = als_mllib.storage.remove
    monkeypatch.setattr(
        als_mllib.storage,
        "remove",
        lambda uri: (seen.extend(Path(uri).rglob("part-*")), remove(uri)),
    )
    settings = SETTINGS.model_copy(update={"iterations": 11})
    data = synth.dataset(spark, synth.power_law(20, 10))
    Als(settings).fit(data, FitOptions(scratch=str(tmp_path)))
    assert seen
    assert list(tmp_path.rglob("part-*")) == []


@pytest.mark.spark
def test_user_idx_beyond_int_is_named(spark: SparkSession) -> None:
    log = synth.log([(2**31 - 1, 1, 1.0), (2**31 - 1, 2, 1.0), (5, 1, 1.0), (5, 3, 1.0)])
    assert isinstance(Als(SETTINGS).fit(synth.dataset(spark, log), FitOptions()), AlsModel)
    beyond = log + synth.log([(2**31, 1, 1.0)])
    with pytest.raises(IdRangeError, match="user_idx goes up to 2147483648"):
        Als(SETTINGS).fit(synth.dataset(spark, beyond), FitOptions())


def test_ages_are_measured_to_the_cutoff() -> None:
    model = AlsModel(SETTINGS, synth.CUTOFF, np.array([1], np.int32), np.ones((1, 6), np.float32))
    assert model.scorer().weights.as_of == micros(synth.CUTOFF)


@pytest.mark.slow
@pytest.mark.spark
def test_both_solvers_reach_one_loss(spark: SparkSession, tmp_path: Path) -> None:
    """MLlib's own objective, scored by one float64 function: same meaning of reg and alpha."""
    data = synth.dataset(spark, synth.power_law(300, 60))
    found = {}
    weights = HistoryWeights.sums(data.cutoff, SETTINGS.half_life_days)
    rows = als.pairs(data, data.vocabulary(), weights).toArrow().to_pydict()
    start = np.concatenate([[0], np.cumsum([len(items) for items in rows["items"]])])
    at = np.concatenate(rows["items"]).astype(np.int32)
    weight = np.concatenate(rows["weights"]).astype(np.float32)
    for settings in (SETTINGS, BLOCKED, BLOCKED.model_copy(update={"method": "cg"})):
        settings = settings.model_copy(update={"iterations": 12})
        factors = Als(settings).fit(data, FitOptions(scratch=str(tmp_path))).factors
        users = fold_in(start, at, weight, factors, settings.objective)
        found[settings.solver, settings.method] = loss(
            start, at, weight, users, factors, settings.objective
        )
    mllib, *ours = found.values()
    assert ours == pytest.approx([mllib, mllib], rel=1e-3)


@pytest.mark.slow
@pytest.mark.spark
def test_blocked_goes_on_from_its_checkpoint(spark: SparkSession, tmp_path: Path) -> None:
    data = synth.dataset(spark, synth.power_law(30, 12))
    told: list[str] = []
    options = FitOptions(scratch=str(tmp_path), progress=told.append)
    settings = BLOCKED.model_copy(update={"iterations": 6})
    first = Als(settings).fit(data, options).factors
    again = Als(settings).fit(data, options).factors
    assert np.array_equal(first, again)
    assert "goes on after iteration 5" in told[6]
    assert len(told) == 6 + 2


def test_mllib_refuses_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="solver mllib has no reg_exponent, unobserved_weight"):
        Als.from_dict({"solver": "mllib", "reg_exponent": 0.5, "unobserved_weight": 0.1})


def test_every_setting_of_the_objective_is_minimised_and_folded_in_with() -> None:
    """The fit and the scorer solve the same objective, which is not MLlib's."""
    values = {
        "reg": 0.3,
        "alpha": 7.0,
        "unobserved_weight": 0.2,
        "reg_exponent": 0.5,
        "reg_counts": "all",
        "feedback": "explicit",
    }
    defaults = AlsSettings(solver="blocked").objective
    assert set(values) == {field.name for field in fields(Objective)}
    assert all(getattr(defaults, name) != value for name, value in values.items())
    settings = AlsSettings(solver="blocked", embedding_size=6, **values)  # type: ignore[arg-type]
    want = Objective(**values)  # type: ignore[arg-type]
    assert settings.objective == want
    assert AlsModel(
        settings, synth.CUTOFF, np.array([1], np.int32), np.ones((1, 6), np.float32)
    ).scorer().objective == want  # fmt: skip


def test_tuning_ranges_over_the_weight_of_what_was_not_observed() -> None:
    assert search_space("als")["unobserved_weight"] == {"low": 0.01, "high": 1, "log": True}
    assert "unobserved_weight" not in search_space("als", {"solver": "mllib"})  # it has none
