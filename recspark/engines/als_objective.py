"""The loss that ALS minimises, of user factors x and item factors y, and the terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recspark.data.blocks import Array

_CHUNK_ROWS = 4096  # rows that are converted to float64 together


@dataclass(frozen=True)
class Objective:
    """The loss over all user-item pairs (implicit feedback) or over the observed pairs (explicit).

    Implicit: sum c (p - x y)^2 over all pairs, where p is 1 if weight > 0, else 0, and c is 1 +
    alpha |weight| where observed, `unobserved_weight` elsewhere.

    Explicit: sum (weight - x y)^2 over observed pairs.

    Both add sum_u penalty_u |x_u|^2 + sum_i penalty_i |y_i|^2. The penalty of a row is reg *
    n^reg_exponent, and `reg_counts` says what n counts.

    Parameters
    ----------
    reg : > 0
    alpha : confidence per unit of weight (implicit)
    unobserved_weight : alpha_0 of Rendle et al. 2021; 1 = Hu, Koren and Volinsky 2008 and MLlib
    reg_exponent : nu; 0 = the same penalty for every row (`implicit`), 1 = ALS-WR (MLlib)
    reg_counts : `observed` = n counts the row's interactions (MLlib: those with weight > 0); `all`
        = that count plus unobserved_weight times the number of rows of the other side (Rendle et
        al. 2021, equation 14)

    To get the objective of Rendle et al., in which the observed and the unobserved term overlap,
    with their alpha_0 and lambda: set alpha = unobserved_weight = alpha_0, reg = lambda (1 +
    alpha_0) and weights 1. The factors are then theirs times sqrt(1 + alpha_0); the lists are the
    same.

    Source: Hu, Koren and Volinsky 2008, equation 3; Zhou et al. 2008 (ALS-WR); Rendle et al. 2021,
    "iALS revisited", equations 4 and 14.
    """

    reg: float
    alpha: float = 1.0
    unobserved_weight: float = 1.0
    reg_exponent: float = 1.0
    reg_counts: Literal["observed", "all"] = "observed"
    feedback: Literal["implicit", "explicit"] = "implicit"

    @property
    def implicit(self) -> bool:
        """Whether unobserved pairs count."""
        return self.feedback == "implicit"

    def penalties(self, start: Array, weight: Array, n_others: int) -> Array:
        """Return each row's factor of |x|^2, float64 (n,).

        `start` and `weight` are those of `loss`; `n_others` is the number of rows of the other
        side.
        """
        is_counted = (weight > 0) if self.implicit else np.ones(len(weight), bool)
        n_counted_before = np.concatenate([[0], np.cumsum(is_counted)])
        counts = (n_counted_before[start[1:]] - n_counted_before[start[:-1]]).astype(np.float64)
        if self.reg_counts == "all":
            counts += self.unobserved_weight * n_others
        return np.asarray(self.reg * counts**self.reg_exponent)

    def confidences(self, weight: Array) -> tuple[Array, Array]:
        """Return (c, p) of observed pairs, float64. Explicit: (1, weight)."""
        weights = weight.astype(np.float64)
        if not self.implicit:
            return np.ones(len(weights)), weights
        return 1 + self.alpha * np.abs(weights), (weights > 0).astype(np.float64)


def gramian(factors: Array) -> Array:
    """Return factors.T @ factors, float64 (d, d). Sums are taken in a fixed order."""
    rank = factors.shape[1]
    total = np.zeros((rank, rank))
    for begin in range(0, len(factors), _CHUNK_ROWS):
        chunk = factors[begin : begin + _CHUNK_ROWS].astype(np.float64)  # (b, d)
        total += chunk.T @ chunk
    return total


def loss(
    start: Array,
    indices: Array,
    weight: Array,
    user_factors: Array,
    item_factors: Array,
    objective: Objective,
) -> float:
    """Return the loss of any factors, in float64. Use it to compare these factors with other
    libraries'.

    Parameters
    ----------
    start : int64 (n + 1,); user r has entries `start[r]:start[r + 1]` of `indices` and `weight`
    indices : int32 (p,): each entry's row of `item_factors`
    weight : float32 (p,)
    user_factors : (n, d)
    item_factors : (m, d)

    Cost: p d + (n + m) d^2. Pairs that are not observed are not visited one by one: their squared
    scores sum to the sum over all pairs, which the Gramians give, minus that over observed pairs.
    """
    total = 0.0
    if objective.implicit:
        total += objective.unobserved_weight * float(
            np.sum(gramian(user_factors) * gramian(item_factors))
        )
    user_rows = np.repeat(np.arange(len(start) - 1), np.diff(start))
    confidence, target = objective.confidences(weight)
    for begin in range(0, len(indices), 16 * _CHUNK_ROWS):
        chunk = slice(begin, begin + 16 * _CHUNK_ROWS)
        x, y = user_factors[user_rows[chunk]].astype(np.float64), item_factors[indices[chunk]]
        score = np.einsum("ij,ij->i", x, y)
        total += float(np.sum(confidence[chunk] * (target[chunk] - score) ** 2))
        if objective.implicit:
            total -= objective.unobserved_weight * float(np.sum(score**2))
    by_item = np.argsort(indices, kind="stable")
    item_start = np.concatenate([[0], np.cumsum(np.bincount(indices, minlength=len(item_factors)))])
    total += _penalty(objective.penalties(start, weight, len(item_factors)), user_factors)
    return total + _penalty(
        objective.penalties(item_start, weight[by_item], len(user_factors)), item_factors
    )


def _penalty(penalties: Array, factors: Array) -> float:
    return float(penalties @ np.einsum("ij,ij->i", factors, factors, dtype=np.float64))
