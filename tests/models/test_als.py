"""ALS: MLlib's item factors, and users folded in as MLlib's last half-step leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array, micros, parse_queries
from recspark.errors import IdRangeError
from recspark.models import als
from recspark.models.als import Als, AlsModel, AlsSettings, fold_in
from recspark.models.base import FitOptions
from recspark.testing import synth

SETTINGS = AlsSettings(
    embedding_size=6, reg=0.2, alpha=4.0, iterations=3, half_life_days=30.0, n_blocks=2
)


def random_rows(seed: int, lengths: Array, n_items: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    items = [np.sort(rng.choice(n_items, n, replace=False)) for n in lengths]
    start = np.concatenate([[0], np.cumsum(lengths)])
    weights = rng.uniform(0.01, 3, start[-1]).astype(np.float32)
    return start, np.concatenate(items).astype(np.int32), weights


def test_fold_in_solves_the_normal_equations() -> None:
    """Hu, Koren and Volinsky 2008, equation 4, written out with a full confidence matrix."""
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((40, 5)).astype(np.float32)
    lengths = np.array([1, 0, 2, 3, 40, 17])
    start, items, weights = random_rows(2, lengths, 40)
    found = fold_in(start, items, weights, factors, 0.3, 2.0)
    y = factors.astype(float)
    for row, n in enumerate(lengths):
        mine = slice(start[row], start[row + 1])
        confidence, preference = np.ones(40), np.zeros(40)
        confidence[items[mine]] += 2.0 * weights[mine]
        preference[items[mine]] = 1
        left = y.T @ np.diag(confidence) @ y + 0.3 * n * np.eye(5)
        expected = np.linalg.solve(left, y.T @ (confidence * preference)) if n else np.zeros(5)
        assert np.allclose(found[row], expected, rtol=1e-5, atol=1e-7)


def test_fold_in_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((300, 16)).astype(np.float32)
    lengths = rng.integers(0, 200, 64)
    start, items, weights = random_rows(5, lengths, 300)
    whole = fold_in(start, items, weights, factors, 0.1, 10.0)
    monkeypatch.setattr(als, "_BLOCK_BYTES", 1)
    assert np.array_equal(fold_in(start, items, weights, factors, 0.1, 10.0), whole)
    for row in range(64):
        part = slice(start[row], start[row + 1])
        alone = fold_in(np.array([0, lengths[row]]), items[part], weights[part], factors, 0.1, 10.0)
        assert np.array_equal(alone[0], whole[row])


@pytest.mark.spark
def test_users_are_those_of_mllib(spark: SparkSession) -> None:
    data = synth.dataset(spark, synth.power_law(50, 30))
    before = set(als._persisted(spark))
    theirs = als.train(als.ratings(data, SETTINGS), SETTINGS, FitOptions())
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
    for key in set(als._persisted(spark)) - before:
        als._persisted(spark)[key].unpersist()


@pytest.mark.spark
def test_checkpoints_go_to_scratch_and_are_removed(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    remove = als.storage.remove
    monkeypatch.setattr(
        als.storage, "remove", lambda uri: (seen.extend(Path(uri).rglob("part-*")), remove(uri))
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
