"""The Gram matrix is exact whatever the order; EASE and item kNN follow their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array, Histories, micros
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models.base import FitOptions
from recspark.models.items import ease, item_item
from recspark.models.items.ease import Ease, EaseSettings
from recspark.models.items.item_item import gram, keep_nearest, trend_factors
from recspark.models.items.item_knn import ItemKNN, ItemKNNSettings, similarities
from recspark.models.items.rp3beta import Rp3Beta
from recspark.models.weights import HistoryWeights
from recspark.testing import synth

AS_OF = micros(synth.CUTOFF)


def by_hand(log: synth.Log, half_life: float | None) -> tuple[Array, Array]:
    """Items and X (users x items), each entry the weight of the user's last event on the item."""
    users, items = np.unique(log.user_idx), np.unique(log.item_idx)
    x = np.zeros((len(users), len(items)))
    for user, item, age in zip(log.user_idx, log.item_idx, log.age, strict=True):
        at = np.searchsorted(users, user), np.searchsorted(items, item)
        x[at] = max(x[at], 1.0 if half_life is None else 0.5 ** (age / half_life))
    return items, x


@pytest.mark.spark
@pytest.mark.parametrize("half_life", [None, 20.0])
def test_gram_is_exact_in_any_order(
    spark: SparkSession, half_life: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = synth.power_law(80, 40)
    items, x = by_hand(log, half_life)
    rounded = np.rint(x.astype(np.float32).astype(float) * 2**14) / 2**14
    weights = HistoryWeights(AS_OF, half_life, "last")
    expected = rounded.T @ rounded  # whole numbers of 2^-28: exact
    found = []
    for n_partitions, band in ((1, 8 << 20), (3, 8 * 40 * 7), (7, 1)):
        monkeypatch.setattr(item_item, "_BAND_BYTES", band)
        frame = synth.histories(spark, log, n_partitions)
        found.append(gram(frame, items, weights))
        assert np.array_equal(found[-1], expected)
    assert np.abs(expected - x.T @ x).max() < 80 * 2 * 2.0**-15


@pytest.mark.spark
def test_gram_refuses_sums_that_are_not_exact(spark: SparkSession) -> None:
    log = synth.log([(1, 1, 1.0), (2, 1, 1.0)])
    weights = HistoryWeights(AS_OF, None, "last")
    items = np.array([1], np.int32)
    fits = synth.Log(log.user_idx, log.item_idx, log.age, np.array([2**12, 2**11], np.float32))
    assert gram(synth.histories(spark, fits, 1), items, weights)[0, 0] == 2**24 + 2**22
    heavy = synth.Log(log.user_idx, log.item_idx, log.age, np.array([2**13, 1], np.float32))
    with pytest.raises(Exception, match=r"lower features\.event_weights"):
        gram(synth.histories(spark, heavy, 1), items, weights)


def test_history_weights_leave_out_unknown_items_and_zero_weights() -> None:
    history = Histories(
        start=np.array([0, 3, 3, 5]),
        item_idx=np.array([7, 3, 9, 3, 4], np.int32),
        event_at=np.full(5, AS_OF),
        weight=np.array([1, 2, 1, 0, 5], np.float32),
    )
    start, items, weights = HistoryWeights(AS_OF, None, "last").local(history, np.array([3, 4, 9]))
    assert start.tolist() == [0, 2, 2, 3]
    assert items.tolist() == [0, 2, 1]
    assert weights.tolist() == [2, 1, 5]


def test_ease_is_the_best_linear_model_without_a_diagonal() -> None:
    """Steck 2019, equation 8; and each column solves its own ridge regression."""
    rng = np.random.default_rng(3)
    x = (rng.random((50, 12)) < 0.3) * rng.random((50, 12))
    reg = 2.5
    b = ease._weights(x.T @ x, reg)
    p = np.linalg.inv(x.T @ x + reg * np.eye(12))
    expected = np.eye(12) - p / np.diag(p)
    assert np.allclose(b, expected, atol=1e-6)
    for i in range(12):
        rest = np.arange(12) != i
        a = x[:, rest]
        ridge = np.linalg.solve(a.T @ a + reg * np.eye(11), a.T @ x[:, i])
        assert np.allclose(b[rest, i], ridge, atol=1e-6)


def test_ease_names_a_matrix_without_an_inverse() -> None:
    with pytest.raises(ModelError, match="not positive definite"):
        ease._weights(-np.eye(3), 0.5)


@pytest.mark.spark
def test_models_fit_what_their_formulas_say(spark: SparkSession) -> None:
    log = synth.power_law(60, 30)
    items, x = by_hand(log, 15.0)
    data = synth.dataset(spark, log)
    linear = Ease(EaseSettings(reg=3.0, half_life_days=15.0)).fit(data, FitOptions())
    assert np.array_equal(linear.items, items)
    assert np.allclose(linear.matrix, ease._weights(x.T @ x, 3.0), atol=1e-4)
    near = ItemKNN(ItemKNNSettings(shrink=0.5, half_life_days=15.0, n_neighbours=4)).fit(
        data, FitOptions()
    )
    cosine = similarities(x.T @ x, 0.5)
    keep_nearest(cosine, 4)
    assert np.allclose(near.matrix, cosine, atol=1e-3)
    assert ((near.matrix > 0).sum(axis=0) <= 4).all()

    # A user's scores are the weighted rows of the matrix, with the model's own decay.
    best = linear.recommend(synth.ask(data, "repeat"), 1).toArrow().to_pylist()
    scores = x @ linear.matrix.astype(float)
    users = np.unique(log.user_idx)
    for row in best:
        mine = scores[np.searchsorted(users, row["user_idx"])]
        assert row["score"] == pytest.approx(mine.max(), rel=1e-5)
        assert items[mine.argmax()] == row["item_idx"]


@pytest.mark.spark
@pytest.mark.parametrize("model", [Ease, ItemKNN])
def test_a_large_catalogue_is_refused_before_any_work(spark: SparkSession, model: type) -> None:
    data = synth.dataset(spark, synth.power_law(40, 30))
    n = data.items.count()
    small = model.from_dict({"max_items": n - 1})
    with pytest.raises(CatalogueTooLargeError, match=rf"{n} items .* max_items is {n - 1}"):
        small.fit(data, FitOptions())
    assert model.from_dict({"max_items": n}).fit(data, FitOptions()).items.size == n


@pytest.mark.spark
def test_only_items_with_evidence_are_neighbours(spark: SparkSession) -> None:
    """Two pairs that never meet: kNN lists only the partner; `row j` speaks for others."""
    events = [(u, i, 1.0) for u in range(4) for i in ((1, 2) if u % 2 else (5, 9))]
    model = ItemKNN(ItemKNNSettings(half_life_days=None)).fit(
        synth.dataset(spark, synth.log(events)), FitOptions()
    )
    rows = sorted(tuple(r)[:3] for r in model.neighbours(3).collect())
    assert rows == [(1, 1, 2), (2, 1, 1), (5, 1, 9), (9, 1, 5)]
    with pytest.raises(ModelError, match="k = 0"):
        model.neighbours(0)


MODELS_WITH_TREND = pytest.mark.parametrize("model", [Ease, ItemKNN, Rp3Beta])


@pytest.mark.spark
def test_the_trend_of_an_item_by_hand(spark: SparkSession) -> None:
    """Half-lives of 5 and 30 days; events without a positive weight do not count."""
    log = synth.log(
        [(1, 2, 5.0), (2, 2, 30.0), (1, 4, 60.0), (2, 6, 5.0), (3, 6, 1.0), (3, 8, 9000.0)]
        + [(2, 12, 1.0)]  # an item outside the vocabulary
    )
    log.weight[:] = [1, 2, 1, 4, -9, 1, 1]
    trend = trend_factors(synth.dataset(spark, log), np.array([2, 4, 6, 8, 9], np.int32), 5.0)
    after_5_days = 0.5 ** (1 / 6)  # what is left of a weight, at a half-life of 30 days
    expected = [
        (6 * (0.5 + 2 / 64) + 3) / (after_5_days + 2 / 2 + 3),
        (6 / 2**12 + 3) / (1 / 4 + 3),
        (6 * 4 * 0.5 + 3) / (4 * after_5_days + 3),
        1,  # its only event is of long ago
        1,  # no event
    ]
    assert trend == pytest.approx(expected, rel=1e-8)


@pytest.mark.spark
def test_an_item_that_sells_evenly_has_a_trend_near_1(spark: SparkSession) -> None:
    """Items with 8 events, 2 events and half an event per day; one only rises, one only falls."""
    ages = {
        1: np.arange(1 / 16, 400, 1 / 8),
        2: np.arange(1 / 4, 400, 1 / 2),
        3: np.arange(1.0, 400, 2),
        4: np.arange(1 / 16, 3, 1 / 8),
        5: np.arange(20, 60, 1 / 8),
    }
    log = synth.log([(0, item, float(age)) for item in ages for age in ages[item]])
    trend = trend_factors(synth.dataset(spark, log), np.arange(1, 6, dtype=np.int32), 5.0)
    assert np.abs(trend[:3] - 1).max() < 0.02
    assert 3 < trend[3] < 6
    assert 0 < trend[4] < 0.2


@pytest.mark.spark
@MODELS_WITH_TREND
def test_scores_are_multiplied_by_the_trend(spark: SparkSession, model: type) -> None:
    """Each entry, negative ones too, in a matrix that is otherwise that of the default setting."""
    log = synth.power_law(60, 30)
    data = synth.dataset(spark, log)
    plain = model.from_dict({}).fit(data, FitOptions())
    with_trend = model.from_dict({"trend_days": 5}).fit(data, FitOptions())
    trend = trend_factors(data, plain.items, 5.0).astype(np.float32)
    assert trend.min() < 0.8
    assert trend.max() > 1.2
    assert np.array_equal(with_trend.matrix, plain.matrix * trend)
    assert ((plain.matrix < 0).any()) == (model is Ease)

    # The lists have these scores: those of the default setting times the trend of the item.
    n_items = len(plain.items)
    lists, plain_lists = (
        fitted.recommend(synth.ask(data, "repeat"), n_items).toArrow().to_pylist()
        for fitted in (with_trend, plain)
    )
    plain_scores = {(row["user_idx"], row["item_idx"]): row["score"] for row in plain_lists}
    assert len(lists) == len(plain_scores) > 0
    trend_by_item = dict(zip(plain.items.tolist(), trend.tolist(), strict=True))
    for row in lists:
        plain_score = plain_scores[row["user_idx"], row["item_idx"]]
        expected = plain_score * trend_by_item[row["item_idx"]]
        assert row["score"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.spark
@MODELS_WITH_TREND
def test_without_trend_days_no_trend_is_computed(
    spark: SparkSession, model: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = synth.dataset(spark, synth.power_law(20, 12))
    monkeypatch.setattr(item_item, "trend_factors", None)  # a call would be a TypeError
    assert model.from_dict({}).settings.trend_days is None
    assert model.from_dict({}).fit(data, FitOptions()).matrix.any()
    with pytest.raises(TypeError):
        model.from_dict({"trend_days": 5}).fit(data, FitOptions())


@pytest.mark.spark
@MODELS_WITH_TREND
def test_an_item_that_rises_goes_up_in_the_lists(spark: SparkSession, model: type) -> None:
    """Items 2 and 3 follow item 1. More users have item 2, but those of item 3 came last."""
    events = [(user, 1, 50.0) for user in range(21)]
    events += [(user, 2, 45.0) for user in range(12)]
    events += [(user, 3, 1.0) for user in range(12, 20)]
    data = synth.dataset(spark, synth.log(events))

    def list_of_user_20(trend_days: float | None) -> list[int]:
        fitted = model.from_dict({"trend_days": trend_days}).fit(data, FitOptions())
        queries = synth.ask(data).where("user_idx = 20")
        return [row["item_idx"] for row in fitted.recommend(queries, 2).orderBy("rank").collect()]

    assert list_of_user_20(None) == [2, 3]
    assert list_of_user_20(5.0) == [3, 2]


@pytest.mark.spark
def test_the_trend_has_the_same_bits_in_any_order(spark: SparkSession) -> None:
    log = synth.power_law(80, 40)
    log.weight[:] = np.random.default_rng(2).uniform(0.1, 2, len(log.weight))
    items = np.unique(log.item_idx)
    shuffled = log.only(np.random.default_rng(3).permutation(len(log.age)))
    trends = [
        trend_factors(synth.dataset(spark, events, n_partitions), items, 5.0).tobytes()
        for events, n_partitions in ((log, 1), (shuffled, 3), (shuffled, 7))
    ]
    assert len(set(trends)) == 1
