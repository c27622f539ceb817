"""A user's vector by the loss that item vectors were trained with, items given.

Users who have no vector (all of them, at scoring) get the one that minimises their part of the
training's objective: the loss of their weighted items against those of the catalogue, and
reg / 2 |u|^2. By conjugate gradient with a preconditioner and a step as long as the loss is curved, all
rows of a block at once.
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

_BLOCK = 256  # rows at once, always: BLAS answers for a row as its shape decides
_STEPS = 8  # where the ranking of items stands still: 2 to 3 (MovieLens, 32 and 64 dimensions)
_MAX_ITEMS = 8192  # told apart by the softmax; of more items, a sample by how often they are drawn
MAX_DRAWN = 128  # told apart from each event by BPR
_LEAST_REG = 1e-6
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Rows:
    """A block of `_BLOCK` users; those after the last one are empty.

    `matrix` : their weights, CSR (R, n_items); `vectors` (P, D) and `bias` (P,) of its entries
    """

    matrix: sparse.csr_matrix
    vectors: Array
    bias: Array

    @cached_property
    def weight(self) -> Array:
        """Weights, summed, (R,)."""
        return self.sums(np.ones((len(self.bias), 1)))[:, 0]

    @cached_property
    def of_entry(self) -> Array:
        """The row of each entry, (P,)."""
        return np.repeat(np.arange(_BLOCK), np.diff(self.matrix.indptr))

    def sums(self, values: Array) -> Array:
        """Return the weighted sums (R, d) of what each entry has, (P, d), in their order."""
        n = len(values)
        entries = (self.matrix.data, np.arange(n), self.matrix.indptr)
        return np.asarray(sparse.csr_matrix(entries, shape=(_BLOCK, n)) @ values)

    def scores(self, users: Array) -> Array:
        """Return each entry's score without its bias, (P,)."""
        return np.asarray(np.einsum("pd,pd->p", users[self.of_entry], self.vectors))


@dataclass(frozen=True)
class Point:
    """The loss at some users' vectors: its value (R,), gradient (R, D), and curvature along d (R,)."""

    value: Array
    gradient: Array
    curvature: Callable[[Array], Array]


class _Loss(Protocol):
    """A loss of users' vectors; `spread` (D, D): about how it is curved, for each unit of weight."""

    spread: Array

    def at(self, users: Array, rows: Rows) -> Point: ...


class Folding:
    """What training leaves of the items, ready to fold users in.

    Parameters
    ----------
    kind : the loss. softmax: -log softmax of each event among all items; bpr: -log sigmoid(its score -
        another's), the mean over items as drawn; squared: (1 - score)^2 of it, and the mean of
        score^2 as drawn. Times the event's weight, summed
    factors : (n_items, D); bias : (n_items,), of a score; squared has none
    drawn : (n_items,), probability that training draws an item
    reg : of the user's vector, as in training

    Everything is float64. A row's answer depends on that row alone, to the bit. Cost: a block of 256
    users takes `_STEPS` times four products with at most `_MAX_ITEMS` items.
    """

    def __init__(self, kind: Kind, factors: Array, bias: Array, drawn: Array, reg: float) -> None:
        self._factors, self._bias = factors.astype(np.float64), bias.astype(np.float64)
        self._reg = max(reg, _LEAST_REG)
        drawn = drawn.astype(np.float64) / drawn.sum(dtype=np.float64)
        makers: dict[Kind, type[_Softmax | _Bpr | _Squared]]
        makers = {"softmax": _Softmax, "bpr": _Bpr, "squared": _Squared}
        self._loss: _Loss = makers[kind](self._factors, self._bias, drawn)
        self._spread, self._basis = np.linalg.eigh(self._loss.spread)  # (D,), (D, D)

    def __call__(self, start: Array, items: Array, weights: Array) -> Array:
        """Return vectors, float32 (n, D), of rows `start[r]:start[r + 1]`; 0 where they are empty."""
        n = len(start) - 1
        out = np.zeros((n, self._factors.shape[1]), np.float32)
        for begin in range(0, n, _BLOCK):
            end = min(n, begin + _BLOCK)
            part = slice(start[begin], start[end])
            pointers = np.full(_BLOCK + 1, start[end] - start[begin], np.int64)
            pointers[: end - begin] = start[begin:end] - start[begin]
            entries = (weights[part].astype(np.float64), items[part], pointers)
            matrix = sparse.csr_matrix(entries, shape=(_BLOCK, len(self._factors)))
            rows = Rows(matrix, self._factors[items[part]], self._bias[items[part]])
            out[begin:end] = self._solve(rows)[: end - begin]
        return out

    def _solve(self, rows: Rows) -> Array:
        """Return the vectors of a block, (R, D): the best point of `_STEPS` steps from 0."""
        scale = 1 / (rows.weight[:, None] * np.maximum(self._spread, 0) + self._reg)  # (R, D)
        users = np.zeros((_BLOCK, self._factors.shape[1]))
        best, least = users, np.full(_BLOCK, np.inf)
        step = direction = before = np.zeros_like(users)
        slope = np.zeros(_BLOCK)
        for _ in range(_STEPS):
            point = self._penalised(self._loss.at(users, rows), users)
            better = point.value <= least
            # Where the loss rose, the step was too long: half of it from where it began.
            step = np.where(better[:, None], step, step / 2)
            least = np.where(better, point.value, least)
            best = np.where(better[:, None], users, best)
            gradient = point.gradient
            scaled = (gradient @ self._basis) * scale @ self._basis.T  # (R, D)
            turned = np.einsum("rd,rd->r", gradient - before, scaled)
            # Polak and Ribiere's, never negative; 0 at the first step.
            momentum = np.maximum(turned, 0) / np.where(slope > 0, slope, np.inf)
            new = -scaled + momentum[:, None] * direction
            down = np.einsum("rd,rd->r", gradient, new)
            new = np.where((down < 0)[:, None], new, -scaled)
            down = -np.abs(np.einsum("rd,rd->r", gradient, new))
            length = -down / np.maximum(point.curvature(new), _TINY)
            step = np.where(better[:, None], length[:, None] * new, step)
            direction = np.where(better[:, None], new, direction)
            before = np.where(better[:, None], gradient, before)
            slope = np.where(better, np.einsum("rd,rd->r", gradient, scaled), slope)
            users = best + step
        last = self._penalised(self._loss.at(users, rows), users)
        return np.where((last.value <= least)[:, None], users, best)

    def _penalised(self, point: Point, users: Array) -> Point:
        reg = self._reg
        return Point(
            point.value + reg / 2 * np.einsum("rd,rd->r", users, users),
            point.gradient + reg * users,
            lambda d: point.curvature(d) + reg * np.einsum("rd,rd->r", d, d),
        )


class _Softmax:
    def __init__(self, factors: Array, bias: Array, drawn: Array) -> None:
        kept, times = sample(drawn, _MAX_ITEMS)  # (M,), (M,)
        self._vectors = factors[kept]  # (M, D)
        self._offset = bias[kept] + np.log(times)  # (M,)
        share: Array = np.exp(self._offset - self._offset.max())  # (M,)
        share = share / share.sum()
        mean = share @ self._vectors  # (D,)
        self.spread = (self._vectors * share[:, None]).T @ self._vectors - np.outer(mean, mean)

    def at(self, users: Array, rows: Rows) -> Point:
        scores = users @ self._vectors.T + self._offset  # (R, M)
        top = scores.max(axis=1, keepdims=True)  # (R, 1)
        np.exp(scores - top, out=scores)
        total = scores.sum(axis=1, keepdims=True)  # (R, 1)
        share = np.divide(scores, total, out=scores)  # (R, M)
        wanted = rows.sums(rows.vectors)  # (R, D)
        log_sum = (top + np.log(total))[:, 0]  # (R,)

        def curvature(d: Array) -> Array:
            along = d @ self._vectors.T  # (R, M)
            mean = np.einsum("rm,rm->r", share, along)
            return np.asarray(
                rows.weight * (np.einsum("rm,rm,rm->r", share, along, along) - mean**2)
            )

        return Point(
            rows.weight * log_sum - np.einsum("rd,rd->r", users, wanted),
            rows.weight[:, None] * (share @ self._vectors) - wanted,
            curvature,
        )


class _Bpr:
    def __init__(self, factors: Array, bias: Array, drawn: Array) -> None:
        kept, times = sample(drawn, MAX_DRAWN)  # (M,), (M,)
        share = drawn[kept] * times  # (M,)
        self._share = share / share.sum()
        self._vectors, self._bias = factors[kept], bias[kept]  # (M, D), (M,)
        mean = self._share @ self._vectors  # (D,)
        spread = (self._vectors * self._share[:, None]).T @ self._vectors - np.outer(mean, mean)
        self.spread = spread / 2  # a quarter of how far two items lie apart

    def at(self, users: Array, rows: Rows) -> Point:
        row = rows.of_entry  # (P,)
        mine = rows.scores(users) + rows.bias  # (P,)
        behind = (users @ self._vectors.T + self._bias)[row] - mine[:, None]  # (P, M)
        lost = np.logaddexp(0, behind) @ self._share  # (P,)
        wrong = 0.5 * (1 + np.tanh(0.5 * behind))  # (P, M): sigmoid, without overflow
        pull = wrong * self._share  # (P, M)
        steep = pull * (1 - wrong)  # (P, M)
        gradient = pull @ self._vectors - pull.sum(axis=1, keepdims=True) * rows.vectors  # (P, D)

        def curvature(d: Array) -> Array:
            apart = (d @ self._vectors.T)[row] - rows.scores(d)[:, None]  # (P, M)
            return rows.sums(np.einsum("pm,pm,pm->p", steep, apart, apart)[:, None])[:, 0]

        return Point(rows.sums(lost[:, None])[:, 0], rows.sums(gradient), curvature)


class _Squared:
    def __init__(self, factors: Array, bias: Array, drawn: Array) -> None:
        self._mean = (factors * drawn[:, None]).T @ factors  # (D, D)
        self.spread = 2 * self._mean

    def at(self, users: Array, rows: Rows) -> Point:
        missing = 1 - rows.scores(users)  # (P,)
        rest = users @ self._mean  # (R, D)
        of_rest = rows.weight * np.einsum("rd,rd->r", rest, users)  # (R,)

        def curvature(d: Array) -> Array:
            others = rows.weight * np.einsum("rd,rd->r", d @ self._mean, d)
            return np.asarray(2 * (rows.sums(rows.scores(d)[:, None] ** 2)[:, 0] + others))

        return Point(
            rows.sums(missing[:, None] ** 2)[:, 0] + of_rest,
            2 * rows.weight[:, None] * rest - 2 * rows.sums(missing[:, None] * rows.vectors),
            curvature,
        )


def sample(share: Array, size: int) -> tuple[Array, Array]:
    """Return at most `size` items, int64 (M,), and how many items each stands for, (M,).

    All of them, each for itself, where there are no more; otherwise those at even steps of the
    summed shares: always the same, and each item as often as drawing by `share` would have it. A
    sum over all items is then that of x times how many it stands for.

    >>> sample(np.array([0.5, 0.25, 0.25]), 3)
    (array([0, 1, 2]), array([1., 1., 1.]))
    >>> sample(np.array([0.5, 0.25, 0.125, 0.125]), 2)
    (array([0, 1]), array([1., 2.]))
    """
    if len(share) <= size:
        return np.arange(len(share)), np.ones(len(share))
    summed = np.cumsum(share)
    points = (np.arange(size) + 0.5) / size * summed[-1]
    kept, times = np.unique(np.searchsorted(summed, points), return_counts=True)
    return kept, times * summed[-1] / (size * share[kept])
