"""Bootstrap over users with integer sums, which are the same for any order of a shuffle.

Each user gets a Poisson(1) weight per replicate, from a hash of (seed, user, replicate). The weight
is the same for every model, so the difference of two models is paired. A weight needs no shared
state. The partial sums of any partitioning add up to the same bits.

Source: Chamandy, Muralidharan, Najmi & Naidu 2012 (Poisson bootstrap of sharded units, weights by
hashing); Efron & Tibshirani 1993, ch. 13 (percentile interval).
"""

from __future__ import annotations

import math

import numpy as np

from recspark.data.blocks import Array

STEP = 2.0**-32  # per-user values are summed as whole multiples of this step
# Users in one product of `replicate_sums`. The product is exact, because float64 holds every
# partial sum: a whole number below 2^53 = 2^32 steps × values below 2^7 × weights up to 2^3 × 2^11
# users.
BLOCK_USERS = 2**11
LEVEL = 0.95  # of the bootstrap intervals

_LIMIT = 2.0**39  # a value in steps must be below: 2^7 / STEP
_LANES = 4  # 16-bit draws in a 64-bit hash
_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # increment of the splitmix64 counter


def _poisson_table() -> Array:
    """Return the Poisson(1) quantile of each 16-bit draw, uint8 (65536,)."""
    cdf = np.cumsum([math.exp(-1) / math.factorial(j) for j in range(12)])
    return np.searchsorted(cdf, (np.arange(2**16) + 0.5) / 2**16).astype(np.uint8)


_POISSON = _poisson_table()


def poisson_weights(user_idx: Array, n_replicates: int, seed: int) -> Array:
    """Return the weight of each user in each replicate, uint8 (n_users, n_replicates).

    A weight is the Poisson(1) quantile of a 16-bit draw. Mean and variance of the weights are 1
    within 2e-4, and no weight is above 8. A weight depends on (seed, user_idx, replicate) and on
    nothing else.

    Parameters
    ----------
    user_idx : int64 (n_users,)
    n_replicates : number of columns of the result
    seed : of the hash

    Cost: one hash for four weights.
    Source: splitmix64 (Steele, Lea & Flood 2014). Its finaliser is applied to seed and user, then
    to a counter that starts from the result.

    >>> poisson_weights(np.array([7, 8]), 6, seed=1)
    array([[2, 0, 1, 2, 2, 1],
           [0, 1, 0, 0, 1, 1]], dtype=uint8)
    >>> poisson_weights(np.array([8]), 3, seed=1)
    array([[0, 1, 0]], dtype=uint8)
    """
    seed_hash = _mix(np.array([seed], np.int64).astype(np.uint64) * _GAMMA)  # (1,)
    user_hash = _mix(user_idx.astype(np.uint64) + seed_hash)  # (n_users,)
    counter = np.arange(1, math.ceil(n_replicates / _LANES) + 1, dtype=np.uint64)
    hashes = _mix(user_hash[:, None] + counter * _GAMMA).astype("<u8")  # (n_users, n_hashes)
    draws = hashes.view("<u2").reshape(len(user_idx), _LANES * len(counter))
    return _POISSON[draws[:, :n_replicates]]


def to_steps(values: Array) -> Array:
    """Return `values` as whole multiples of 2^-32, float64; NaN becomes 0.

    The error of one value is at most 2^-33, and so is the error of a mean of values.

    >>> to_steps(np.array([0.5, np.nan])) * STEP
    array([0.5, 0. ])
    """
    return np.rint(np.nan_to_num(values, nan=0.0) / STEP)


def replicate_sums(weights: Array, columns: Array) -> Array:
    """Return the exact sum of each column over users: unweighted (row 0), then for each replicate.

    Parameters
    ----------
    weights : uint8 (n_users, n_replicates); at most `BLOCK_USERS` users, else ValueError
    columns : float64 (n_users, n_columns); whole numbers below 2^39 in absolute value, else
        ValueError

    Returns
    -------
    int64 (1 + n_replicates, n_columns). The order in which BLAS adds does not matter, because all
    partial sums are whole numbers that float64 holds exactly.

    >>> replicate_sums(np.array([[2, 0], [1, 1]]), np.array([[10.0], [1.0]]))
    array([[11],
           [21],
           [ 1]])
    """
    if len(columns) > BLOCK_USERS:
        raise ValueError(f"{len(columns)} users: sums are exact up to {BLOCK_USERS}")
    if np.abs(columns).max(initial=0) >= _LIMIT:
        raise ValueError("a value of 128 or more: sums would not be exact")
    ones = np.ones((len(columns), 1))
    all_weights = np.concatenate([ones, weights.astype(np.float64)], axis=1)
    return (all_weights.T @ columns).astype(np.int64)


def percentile_interval(replicates: Array) -> tuple[Array, Array]:
    """Return the lower and the upper end of the middle 95 % of each column, each (n_columns,).

    The ends are interpolated linearly between order statistics. `replicates` is float64
    (n_replicates, n_columns). A replicate that drew no user is NaN and is left out. A column with
    NaN only gives NaN.

    >>> percentile_interval(np.arange(101.0)[:, None])
    (array([2.5]), array([97.5]))
    """
    ends = np.full((2, replicates.shape[1]), np.nan)
    has_values = (~np.isnan(replicates)).any(axis=0)
    tail = 100 * (1 - LEVEL) / 2  # per cent outside the interval, on each side
    if has_values.any():
        ends[:, has_values] = np.nanpercentile(
            replicates[:, has_values], [tail, 100 - tail], axis=0
        )
    return ends[0], ends[1]


def _mix(x: Array) -> Array:
    """Return the splitmix64 finaliser of each uint64 in `x`: a hash of its 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
