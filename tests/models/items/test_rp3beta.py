"""RP3beta follows its formula: probabilities of three steps, by hand and over a whole graph."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array
from recspark.models.base import FitOptions
from recspark.models.items.rp3beta import Rp3Beta, degrees_of
from recspark.models.weights import HistoryWeights
from recspark.testing import synth

pytestmark = pytest.mark.spark


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 0.6), (0.7, 0.9)])
def test_a_matrix_is_the_steps_of_the_paper(spark: SparkSession, alpha: float, beta: float) -> None:
    log = synth.power_law(60, 30)
    data = synth.dataset(spark, log)
    model = Rp3Beta.from_dict({"alpha": alpha, "beta": beta}).fit(data, FitOptions())
    users, items = np.unique(log.user_idx), np.unique(log.item_idx)
    x = np.zeros((len(users), len(items)))
    x[np.searchsorted(users, log.user_idx), np.searchsorted(items, log.item_idx)] = 1
    to_user = (x / x.sum(axis=0)).T ** alpha  # (n_items, n_users): from an item to its users
    to_item = (x / x.sum(axis=1, keepdims=True)) ** alpha  # (n_users, n_items)
    want = to_user @ to_item / x.sum(axis=0) ** beta
    np.fill_diagonal(want, 0)
    assert np.array_equal(model.items, items)
    np.testing.assert_allclose(model.matrix, want, rtol=2e-3, atol=1e-6)
    if alpha == 1 and beta == 0:  # they are probabilities: with the way back they add up to 1
        back = (to_user @ to_item).diagonal()
        np.testing.assert_allclose(model.matrix.sum(axis=1), 1 - back, atol=1e-3)


def test_a_weight_of_nothing_is_no_edge_and_times_do_not_count(spark: SparkSession) -> None:
    """An event that weighs 0 is no step; five on one item are one."""
    log = synth.log([(1, 1, 1.0), (1, 1, 2.0), (1, 2, 1.0), (2, 1, 50.0), (2, 3, 1.0)])
    quiet = synth.Log(log.user_idx, log.item_idx, log.age, np.array([1, 1, 1, 1, 0], np.float32))
    data = synth.dataset(spark, quiet)
    items = data.vocabulary()
    assert degrees_of(data.histories, items, HistoryWeights(0, None, "last")).tolist() == [2, 1, 0]
    model = Rp3Beta.from_dict({"beta": 0.0}).fit(data, FitOptions())
    # From 1: to user 1 or 2; user 1 has two items, user 2 only this one.
    np.testing.assert_allclose(model.matrix, [[0, 0.25, 0], [0.5, 0, 0], [0, 0, 0]], atol=1e-4)


def test_steps_follow_weights(spark: SparkSession) -> None:
    """A half-life of ten days: user 1 turns to what is new; the weights of the paper's formula."""
    log = synth.log([(1, 1, 0.0001), (1, 2, 10.0), (2, 1, 10.0), (2, 3, 0.0001)])
    data = synth.dataset(spark, log)
    model = Rp3Beta.from_dict({"beta": 0.0, "half_life_days": 10.0}).fit(data, FitOptions())
    x = np.array([[1, 0.5, 0], [0.5, 0, 1]])
    want = (x / x.sum(axis=0)).T @ (x / x.sum(axis=1, keepdims=True))
    np.fill_diagonal(want, 0)
    np.testing.assert_allclose(model.matrix, want, atol=1e-3)


def test_an_item_of_long_ago_keeps_its_steps(spark: SparkSession) -> None:
    """Fifteen half-lives old, all of it: probabilities do not depend on how old everything is."""

    def matrix(age: float) -> Array:
        log = synth.log([(1, 1, age), (1, 2, age), (2, 1, age), (3, 2, 0.001), (3, 3, 0.001)])
        settings = {"beta": 0.0, "half_life_days": 1.0}
        return Rp3Beta.from_dict(settings).fit(synth.dataset(spark, log), FitOptions()).matrix

    np.testing.assert_allclose(matrix(15.0)[0], matrix(0.001)[0], rtol=0.02, atol=1e-4)


def test_beta_holds_popular_items_back(spark: SparkSession) -> None:
    """One item of all users and one of a few: both follow the same item; beta turns their order."""
    events = [(u, 1, 1.0) for u in range(60)] + [(u, 2, 1.0) for u in range(30)]
    events += [(u, 3, 1.0) for u in range(6)]
    data = synth.dataset(spark, synth.log(events))

    def from_third(beta: float) -> tuple[float, float]:
        matrix = Rp3Beta.from_dict({"beta": beta}).fit(data, FitOptions()).matrix
        return float(matrix[1, 0]), float(matrix[1, 2])  # from item 2 to 1, and to 3

    popular, rare = from_third(0.0)
    assert popular > 3 * rare
    popular, rare = from_third(1.0)
    assert popular < rare
