"""Poisson weights, exact sums and percentile intervals, each against another way to get them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recspark.eval.significance import (
    BLOCK_USERS,
    STEP,
    percentile_interval,
    poisson_weights,
    replicate_sums,
    to_steps,
)

USERS = st.lists(st.integers(0, 2**62), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(USERS, st.integers(0, 11), st.integers(-5, 2**40))
def test_weights_equal_the_oracle(
    oracle: SimpleNamespace, users: list[int], n_replicates: int, seed: int
) -> None:
    found = poisson_weights(np.array(users), n_replicates, seed)
    want = [[oracle.poisson_weight(u, r, seed) for r in range(n_replicates)] for u in users]
    assert found.shape == (len(users), n_replicates)
    assert found.tolist() == want


def test_weights_are_poisson_and_independent() -> None:
    weights = poisson_weights(np.arange(2000), 1000, seed=1).astype(float)
    counts = np.bincount(weights.astype(int).ravel(), minlength=9)
    expected = stats.poisson.pmf(np.arange(len(counts)), 1) * weights.size
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    assert weights.max() == 8
    assert weights.mean() == pytest.approx(1, abs=4 / np.sqrt(weights.size))
    assert weights.var() == pytest.approx(1, abs=8 / np.sqrt(weights.size))
    # Neighbouring users and neighbouring replicates have nothing in common.
    limit = 5 / np.sqrt(weights.size)
    assert abs(np.corrcoef(weights[1:].ravel(), weights[:-1].ravel())[0, 1]) < limit
    assert abs(np.corrcoef(weights[:, 1:].ravel(), weights[:, :-1].ravel())[0, 1]) < limit
    other = poisson_weights(np.arange(2000), 1000, seed=2).astype(float)
    assert abs(np.corrcoef(weights.ravel(), other.ravel())[0, 1]) < limit


def test_moments_of_the_table_are_within_the_documented_error() -> None:
    from recspark.eval.significance import _POISSON

    draws = _POISSON.astype(float)
    assert draws.mean() == pytest.approx(1, abs=2e-4)
    assert draws.var() == pytest.approx(1, abs=2e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**32))
def test_sums_equal_python_integers(n_users: int, n_replicates: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, 2**39, (n_users, 3))
    weights = rng.integers(0, 9, (n_users, n_replicates))
    found = replicate_sums(weights, columns.astype(float))
    plain = [sum(map(int, column)) for column in columns.T]
    weighted = [
        [sum(int(w) * int(c) for w, c in zip(weights[:, r], column)) for column in columns.T]
        for r in range(n_replicates)
    ]
    assert found.tolist() == [plain, *weighted]


def test_sums_are_exact_at_their_limit() -> None:
    columns = np.full((BLOCK_USERS, 1), 2.0**39 - 1)
    found = replicate_sums(np.full((BLOCK_USERS, 1), 8), columns)
    assert found.tolist() == [[BLOCK_USERS * (2**39 - 1)], [8 * BLOCK_USERS * (2**39 - 1)]]
    with pytest.raises(ValueError, match="exact up to 2048"):
        replicate_sums(np.ones((BLOCK_USERS + 1, 1)), np.ones((BLOCK_USERS + 1, 1)))
    with pytest.raises(ValueError, match="128 or more"):
        replicate_sums(np.ones((1, 1)), to_steps(np.array([[128.0]])))


def test_rounding_is_within_the_documented_error() -> None:
    values = np.random.default_rng(0).random(1000)
    assert np.abs(to_steps(values) * STEP - values).max() <= 2.0**-33


def test_interval_is_that_of_sorted_replicates() -> None:
    rng = np.random.default_rng(3)
    replicates = rng.normal(size=(401, 3))
    replicates[:200, 1] = np.nan  # replicates that drew nobody
    replicates[:, 2] = np.nan
    low, high = percentile_interval(replicates)
    first, second = np.sort(replicates[:, 0]), np.sort(replicates[200:, 1])
    # 401 values: the 2.5th percentile is the value at position 10; of 201, at position 5.
    np.testing.assert_allclose(low[:2], [first[10], second[5]])
    np.testing.assert_allclose(high[:2], [first[390], second[195]])
    assert np.isnan([low[2], high[2]]).all()
    assert np.isnan(percentile_interval(np.zeros((0, 2)))).all()


def test_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    weights = poisson_weights(np.arange(300), 400, seed=9).T.astype(float)
    covered = 0
    for _ in range(200):
        sample = rng.exponential(size=300) - 1  # true mean 0, skewed
        replicates = (weights @ sample / weights.sum(axis=1))[:, None]
        low, high = percentile_interval(replicates)
        covered += low[0] <= 0 <= high[0]
    assert 0.90 <= covered / 200 <= 0.98
