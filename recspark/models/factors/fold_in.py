"""Folds users in: computes a user's vector from the user's items, with the item vectors fixed.

At scoring no user has a vector. A user u gets the vector that minimises u's part of the training's
objective: the loss of u's weighted items against the items of the catalogue, plus reg / 2 |u|^2.
The minimum is found by conjugate gradient, with a preconditioner and with step lengths from the
curvature of the loss, for all rows (users) of a block at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from scipy import sparse

from recspark.data.blocks import Array

Kind = Literal["softmax", "bpr", "squared"]

# Rows of a block. Every block has this many: the bits of a row of a BLAS product depend on the
# shape of the product.
_BLOCK = 256
# Steps of conjugate gradient. On MovieLens, with 32 and 64 dimensions, the ranking of items no
# longer changes after 2 to 3 steps.
_STEPS = 8
# Most items in the softmax's sum; a larger catalogue is sampled, by how often training draws an
# item.
_MAX_ITEMS = 8192
MAX_DRAWN = 128  # most items that BPR compares each event with
_LEAST_REG = 1e-6  # the smallest reg
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Rows:
    """A block of R = `_BLOCK` users (rows); rows after the last user are empty.

    `matrix` : the weights of the users' items, CSR (R, n_items), with P entries; `vectors` (P, D)
    and `bias` (P,) : the vector and the bias of each entry's item
    """

    matrix: sparse.csr_matrix
    vectors: Array
    bias: Array

    @cached_property
    def weight(self) -> Array:
        """The sum of each row's weights, (R,)."""
        return self.sums(np.ones((len(self.bias), 1)))[:, 0]

    @cached_property
    def row_of_entry(self) -> Array:
        """The row that each entry belongs to, (P,)."""
        return np.repeat(np.arange(_BLOCK), np.diff(self.matrix.indptr))

    def sums(self, values: Array) -> Array:
        """Return the weighted sum (R, d) of `values`, (P, d), over each row's entries, in order."""
        n_entries = len(values)
        csr_arrays = (self.matrix.data, np.arange(n_entries), self.matrix.indptr)
        return np.asarray(sparse.csr_matrix(csr_arrays, shape=(_BLOCK, n_entries)) @ values)

    def scores(self, users: Array) -> Array:
        """Return the score of each entry's item for its user, without the item's bias, (P,)."""
        return np.asarray(np.einsum("pd,pd->p", users[self.row_of_entry], self.vectors))


@dataclass(frozen=True)
class Point:
    """The loss of each row at the vectors of its user."""

    value: Array  # (R,)
    gradient: Array  # (R, D)
    curvature: Callable[[Array], Array]  # directions d (R, D) -> second derivative along d (R,)


class _Loss(Protocol):
    """A loss of users' vectors.

    `spread` (D, D) : about the second derivative of the loss of a user whose weights sum to 1.
    """

    spread: Array

    def evaluate(self, users: Array, rows: Rows) -> Point: ...


class Folding:
    """Folds users in, for item vectors and biases that were trained with one of three losses.

    Parameters
    ----------
    kind : the loss of an item of the user; a user's loss is its weighted sum over the user's items.
        softmax: -log softmax of the item's score among all items. bpr: -log sigmoid(the item's
        score - another item's score), the mean over other items as training draws them. squared:
        (1 - score)^2, plus the mean of score^2 over items as training draws them
    factors : (n_items, D), the item vectors
    bias : (n_items,), the bias in an item's score; `squared` ignores it
    drawn : (n_items,), the probability that training draws each item
    reg : reg of the user's vector, as in training

    All computations are in float64. The vector of a row depends on no other row, to the bit. Cost:
    a block of 256 users takes `_STEPS` times four products with at most `_MAX_ITEMS` items.
    """

    def __init__(self, kind: Kind, factors: Array, bias: Array, drawn: Array, reg: float) -> None:
        self._factors, self._bias = factors.astype(np.float64), bias.astype(np.float64)
        self._reg = max(reg, _LEAST_REG)
        drawn = drawn.astype(np.float64) / drawn.sum(dtype=np.float64)
        loss_classes: dict[Kind, type[_Softmax | _Bpr | _Squared]]
        loss_classes = {"softmax": _Softmax, "bpr": _Bpr, "squared": _Squared}
        self._loss: _Loss = loss_classes[kind](self._factors, self._bias, drawn)
        self._spread, self._basis = np.linalg.eigh(self._loss.spread)  # (D,), (D, D)

    def __call__(self, start: Array, items: Array, weights: Array) -> Array:
        """Return the vector of each row, float32 (n, D); 0 for an empty row.

        Row r has the entries `start[r]:start[r + 1]` of `items` (local indices) and `weights`.
        """
        n = len(start) - 1
        vectors = np.zeros((n, self._factors.shape[1]), np.float32)
        for begin in range(0, n, _BLOCK):
            end = min(n, begin + _BLOCK)
            entries = slice(start[begin], start[end])
            # The CSR row starts of the block; rows after the last user are empty.
            pointers = np.full(_BLOCK + 1, start[end] - start[begin], np.int64)
            pointers[: end - begin] = start[begin:end] - start[begin]
            csr_arrays = (weights[entries].astype(np.float64), items[entries], pointers)
            matrix = sparse.csr_matrix(csr_arrays, shape=(_BLOCK, len(self._factors)))
            rows = Rows(matrix, self._factors[items[entries]], self._bias[items[entries]])
            vectors[begin:end] = self._solve(rows)[: end - begin]
        return vectors

    def _solve(self, rows: Rows) -> Array:
        """Return the vectors of a block, (R, D): the best points of `_STEPS` steps from 0.

        Each row keeps its best point so far, and tries `best + step`. If the loss is lower there,
        the row moves and takes a new conjugate direction; if not, it tries half of the step.
        """
        # The diagonal of the preconditioner in the eigenbasis of `spread`, (R, D).
        preconditioner = 1 / (rows.weight[:, None] * np.maximum(self._spread, 0) + self._reg)
        users = np.zeros((_BLOCK, self._factors.shape[1]))
        best, best_value = users, np.full(_BLOCK, np.inf)
        step = direction = best_gradient = np.zeros_like(users)
        best_norm = np.zeros(_BLOCK)  # best_gradient . preconditioned best_gradient
        for _ in range(_STEPS):
            point = self._penalised(self._loss.evaluate(users, rows), users)
            is_better = point.value <= best_value
            # Where the loss rose, the step was too long: try half of it, again from `best`.
            step = np.where(is_better[:, None], step, step / 2)
            best_value = np.where(is_better, point.value, best_value)
            best = np.where(is_better[:, None], users, best)
            gradient = point.gradient
            scaled_gradient = (gradient @ self._basis) * preconditioner @ self._basis.T  # (R, D)
            gradient_change = np.einsum("rd,rd->r", gradient - best_gradient, scaled_gradient)
            # The formula of Polak and Ribiere, cut off below 0; it is 0 at the first step.
            momentum = np.maximum(gradient_change, 0) / np.where(best_norm > 0, best_norm, np.inf)
            new_direction = -scaled_gradient + momentum[:, None] * direction
            slope = np.einsum("rd,rd->r", gradient, new_direction)
            # If the new direction does not go down, use the preconditioned gradient alone.
            new_direction = np.where((slope < 0)[:, None], new_direction, -scaled_gradient)
            slope = -np.abs(np.einsum("rd,rd->r", gradient, new_direction))
            step_length = -slope / np.maximum(point.curvature(new_direction), _TINY)
            step = np.where(is_better[:, None], step_length[:, None] * new_direction, step)
            direction = np.where(is_better[:, None], new_direction, direction)
            best_gradient = np.where(is_better[:, None], gradient, best_gradient)
            best_norm = np.where(
                is_better, np.einsum("rd,rd->r", gradient, scaled_gradient), best_norm
            )
            users = best + step
        last_point = self._penalised(self._loss.evaluate(users, rows), users)
        return np.where((last_point.value <= best_value)[:, None], users, best)

    def _penalised(self, point: Point, users: Array) -> Point:
        reg = self._reg
        return Point(
            point.value + reg / 2 * np.einsum("rd,rd->r", users, users),
            point.gradient + reg * users,
            lambda d: point.curvature(d) + reg * np.einsum("rd,rd->r", d, d),
        )


# The loss of an item of the user: log(sum of exp(score) over M items) - score. Where the M items
# are a sample, exp(score) counts as often as the item stands for others: log(n_represented) is
# part of the offset. The biases of the user's items are constants and left out.
class _Softmax:
    def __init__(self, factors: Array, bias: Array, drawn: Array) -> None:
        sampled, n_represented = sample(drawn, _MAX_ITEMS)  # (M,), (M,)
        self._vectors = factors[sampled]  # (M, D)
        self._offset = bias[sampled] + np.log(n_represented)  # (M,)
        probability: Array = np.exp(self._offset - self._offset.max())  # (M,)
        probability = probability / probability.sum()
        mean = probability @ self._vectors  # (D,)
        self.spread = (self._vectors * probability[:, None]).T @ self._vectors - np.outer(
            mean, mean
        )

    def evaluate(self, users: Array, rows: Rows) -> Point:
        scores = users @ self._vectors.T + self._offset  # (R, M)
        max_score = scores.max(axis=1, keepdims=True)  # (R, 1)
        np.exp(scores - max_score, out=scores)
        total = scores.sum(axis=1, keepdims=True)  # (R, 1)
        probability = np.divide(scores, total, out=scores)  # (R, M)
        item_sums = rows.sums(rows.vectors)  # (R, D)
        log_sum = (max_score + np.log(total))[:, 0]  # (R,)

        def curvature(d: Array) -> Array:
            change = d @ self._vectors.T  # (R, M)
            mean_change = np.einsum("rm,rm->r", probability, change)
            return np.asarray(
                rows.weight
                * (np.einsum("rm,rm,rm->r", probability, change, change) - mean_change**2)
            )

        return Point(
            rows.weight * log_sum - np.einsum("rd,rd->r", users, item_sums),
            rows.weight[:, None] * (probability @ self._vectors) - item_sums,
            curvature,
        )


# The loss of an item of the user: -log sigmoid(score - score of a drawn item), the mean over
# M items.
class _Bpr:
    def __init__(self, factors: Array, bias: Array, drawn: Array) -> None:
        sampled, n_represented = sample(drawn, MAX_DRAWN)  # (M,), (M,)
        share = drawn[sampled] * n_represented  # (M,)
        self._share = share / share.sum()
        self._vectors, self._bias = factors[sampled], bias[sampled]  # (M, D), (M,)
        mean = self._share @ self._vectors  # (D,)
        spread = (self._vectors * self._share[:, None]).T @ self._vectors - np.outer(mean, mean)
        # The slope of a sigmoid at 0, 1/4, times the covariance of the difference of two drawn
        # vectors.
        self.spread = spread / 2

    def evaluate(self, users: Array, rows: Rows) -> Point:
        row = rows.row_of_entry  # (P,)
        score = rows.scores(users) + rows.bias  # (P,)
        deficit = (users @ self._vectors.T + self._bias)[row] - score[:, None]  # (P, M)
        loss = np.logaddexp(0, deficit) @ self._share  # (P,)
        error_probability = 0.5 * (1 + np.tanh(0.5 * deficit))  # (P, M): sigmoid, without overflow
        pull = error_probability * self._share  # (P, M)
        steepness = pull * (1 - error_probability)  # (P, M)
        gradient = pull @ self._vectors - pull.sum(axis=1, keepdims=True) * rows.vectors  # (P, D)

        def curvature(d: Array) -> Array:
            change = (d @ self._vectors.T)[row] - rows.scores(d)[:, None]  # (P, M)
            return rows.sums(np.einsum("pm,pm,pm->p", steepness, change, change)[:, None])[:, 0]

        return Point(rows.sums(loss[:, None])[:, 0], rows.sums(gradient), curvature)


# The loss of an item of the user: (1 - score)^2 + the mean of score^2 over items as they are drawn.
class _Squared:
    def __init__(self, factors: Array, bias: Array, drawn: Array) -> None:
        self._second_moment = (factors * drawn[:, None]).T @ factors  # (D, D)
        self.spread = 2 * self._second_moment

    def evaluate(self, users: Array, rows: Rows) -> Point:
        residual = 1 - rows.scores(users)  # (P,)
        half_drawn_gradient = users @ self._second_moment  # (R, D)
        drawn_loss = rows.weight * np.einsum("rd,rd->r", half_drawn_gradient, users)  # (R,)

        def curvature(d: Array) -> Array:
            drawn_curvature = rows.weight * np.einsum("rd,rd->r", d @ self._second_moment, d)
            return np.asarray(2 * (rows.sums(rows.scores(d)[:, None] ** 2)[:, 0] + drawn_curvature))

        return Point(
            rows.sums(residual[:, None] ** 2)[:, 0] + drawn_loss,
            2 * rows.weight[:, None] * half_drawn_gradient
            - 2 * rows.sums(residual[:, None] * rows.vectors),
            curvature,
        )


def sample(share: Array, size: int) -> tuple[Array, Array]:
    """Return at most `size` items, int64 (M,), and how many items each of them stands for, (M,).

    `share` (n_items,) : how often each item is drawn, in proportion. If there are at most `size`
    items, all are returned, and each stands for itself. Otherwise the cumulative sum of `share` is
    cut into `size` equal steps, and the item at the middle of each step is taken. The sample is
    always the same, and an item occurs as often as `size` draws by `share` would have it on
    average. A sum of x over all items is then estimated by the sum of x over the sample, times how
    many items each stands for.

    >>> sample(np.array([0.5, 0.25, 0.25]), 3)
    (array([0, 1, 2]), array([1., 1., 1.]))
    >>> sample(np.array([0.5, 0.25, 0.125, 0.125]), 2)
    (array([0, 1]), array([1., 2.]))
    """
    if len(share) <= size:
        return np.arange(len(share)), np.ones(len(share))
    cumulative = np.cumsum(share)
    middles = (np.arange(size) + 0.5) / size * cumulative[-1]
    sampled, n_hits = np.unique(np.searchsorted(cumulative, middles), return_counts=True)
    return sampled, n_hits * cumulative[-1] / (size * share[sampled])
