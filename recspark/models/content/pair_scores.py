"""The scores of one item with all items, by a trained `PairNet`, in the form that the kernel takes.

`PairVectors` holds what the network says of single items; the score of a pair follows from the rows
of its two items. For the linear merger it is one dot product. For the others it is approximated in
float32 for all items of a row at once, with a bound of the error, and computed in float64 for the
pairs that the kernel asks for: so the lists are those of a float64 brute force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from recspark.data.blocks import Array, QueryBlock, local_index
from recspark.engines.compiled import compiled, compiled_in_order
from recspark.models.scoring import topk
from recspark.models.scoring.candidates import dot_pairs

_UNIT = 2.0**-24  # unit roundoff of float32
_ROWS_AT_ONCE = 16  # rows whose similarities by all modules are in memory


@dataclass(frozen=True)
class PairVectors:
    """What a trained network says of each item, float32 but for the last three; M modules.

    The similarity of the items i and j by module m is z_m = stand_in[m] + own[m][i] . others[m][j],
    where a row of an item without a vector is 0. The logit of the pair is

        bias + sum_m weights[m] z_m + sum_{m < n} products[mn] z_m z_n
             + straight[i] + straight[j] + sum_h outer[h] max(0, own_hidden[i, h] + others_hidden[j, h])

    It is the same for (i, j) and (j, i), but for rounding. `products` is 0 except for the merger
    crossfeat; `outer` is empty except for residual, whose both orders are columns of `own_hidden`.
    """

    own: tuple[Array, ...]  # (n_items, size of m + 1) each
    others: tuple[Array, ...]
    own_hidden: Array  # (n_items, 2 H)
    others_hidden: Array
    outer: Array  # (2 H,)
    straight: Array  # (n_items,)
    stand_in: Array  # float64 (M,)
    weights: Array  # float64 (M,)
    products: Array  # float64 (M (M - 1) / 2,)
    bias: float = 0.0

    @classmethod
    def of(
        cls, vectors: Array, has_vector: Array, sizes: Sequence[int], net: Mapping[str, Array]
    ) -> PairVectors:
        """Return what a network says of items.

        `vectors` float32 (n_items, D) and `has_vector` bool (n_items, M), as `PairNet` reads them;
        `net` : its parameters and buffers, by name. Cost: products of n_items * D * 2 H.
        """
        has = has_vector.astype(np.float32)
        own, others = [], []
        mean, scale, stand_in = (
            net[name].astype(np.float64) for name in ("mean", "scale", "stand_in")
        )
        ends = np.cumsum(sizes)
        for m, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            of_module = vectors[:, end - size : end]
            shift = np.float32(-(mean[m] / scale[m] + stand_in[m]))
            own.append(np.column_stack([of_module, has[:, m]]))
            others.append(np.column_stack([of_module / np.float32(scale[m]), shift * has[:, m]]))
        n_items, hidden = len(vectors), np.zeros((len(vectors), 0), np.float32)
        own_hidden: Array = hidden
        others_hidden: Array = hidden
        outer: Array = np.zeros(0, np.float32)
        straight: Array = np.zeros(n_items, np.float32)
        if "inner" in net:
            inputs = np.column_stack([vectors, has])
            first, second = np.split(net["inner"], 2)  # of the first and of the second item
            as_first = inputs @ first + net["inner_bias"]
            as_second = inputs @ second
            own_hidden = np.column_stack([as_first, as_second])
            others_hidden = np.column_stack([as_second, as_first])
            outer = np.tile(net["outer"] / np.float32(2), 2)
            straight = inputs @ net["straight"]
        n_products = len(sizes) * (len(sizes) - 1) // 2
        return cls(
            tuple(np.ascontiguousarray(part, np.float32) for part in own),
            tuple(np.ascontiguousarray(part, np.float32) for part in others),
            np.ascontiguousarray(own_hidden, np.float32),
            np.ascontiguousarray(others_hidden, np.float32),
            np.asarray(outer, np.float32),
            np.asarray(straight, np.float32),
            stand_in,
            net["weights"].astype(np.float64),
            net.get("products", np.zeros(n_products)).astype(np.float64),
            float(net["bias"][0]),
        )

    @property
    def is_linear(self) -> bool:
        """Whether a logit is a dot product and a constant."""
        return len(self.outer) == 0 and not self.products.any()

    @property
    def constant(self) -> float:
        """What a logit has that is the same for all pairs, where it is linear."""
        return self.bias + float(self.weights @ self.stand_in)

    @cached_property
    def linear_vectors(self) -> tuple[Array, Array]:
        """Return `own` and `others` joined, (n_items, D + M) each: the logit of a linear merger is
        their dot product and `constant`.
        """
        weighted = [
            np.float32(weight) * part
            for weight, part in zip(self.weights, self.others, strict=True)
        ]
        return (
            np.ascontiguousarray(np.concatenate(self.own, axis=1)),
            np.ascontiguousarray(np.concatenate(weighted, axis=1), np.float32),
        )

    def logits(self, i: Array, j: Array) -> Array:
        """Return the logit of each pair of local items, float64 (p,), in a fixed order of sums."""
        z = [
            dot_pairs(own, others, i, j) + stand_in
            for own, others, stand_in in zip(self.own, self.others, self.stand_in, strict=True)
        ]
        out = np.full(len(i), self.bias)
        for weight, similarity in zip(self.weights, z, strict=True):
            out += weight * similarity
        for weight, (m, n) in zip(self.products, combinations(range(len(z)), 2), strict=True):
            out += weight * z[m] * z[n]
        if len(self.outer):
            hidden = np.empty(len(i))
            _hidden_of_pairs(self.own_hidden, self.others_hidden, self.outer, i, j, hidden)
            out += hidden
            out += self.straight[i].astype(np.float64) + self.straight[j].astype(np.float64)
        return out


@dataclass(frozen=True)
class PairScorer:
    """Scores all items beside the one item of a query's history; for lists of neighbours."""

    items: Array
    vectors: PairVectors

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A query has one event, on an item of `items`."""
        local = local_index(self.items, block.history.item_idx)
        if self.vectors.is_linear:
            own, others = self.vectors.linear_vectors
            return topk.DotScores(own[local], others, None, np.ones(len(local), bool))
        return PairScores(local, self.vectors)


@dataclass(frozen=True)
class PairScores:
    """The logits of the items `local` (n,) with all items; see `topk.Scores`.

    The error has two parts. A similarity is off by e_m, the bound of a dot product in float32 (see
    `DotScores`), so the sums and products of similarities are off by at most what their weights make
    of it. And each float32 operation on values not above `size` adds a relative error of 2^-24.
    """

    local: Array
    vectors: PairVectors

    @property
    def known(self) -> Array:
        """See `Scores`."""
        return np.ones(len(self.local), bool)

    def approximate(self, rows: slice) -> Array:
        """See `Scores`. `_ROWS_AT_ONCE` rows at a time hold the similarities by each module."""
        local = self.local[rows]
        out = np.empty((len(local), len(self.vectors.straight)), np.float32)
        for begin in range(0, len(local), _ROWS_AT_ONCE):
            self._fill(out[begin : begin + _ROWS_AT_ONCE], local[begin : begin + _ROWS_AT_ONCE])
        return out

    def _fill(self, out: Array, local: Array) -> None:
        v = self.vectors
        z = [
            own[local] @ others.T + np.float32(stand_in)
            for own, others, stand_in in zip(v.own, v.others, v.stand_in, strict=True)
        ]
        out[:] = np.float32(v.bias)
        for weight, similarity in zip(v.weights, z, strict=True):
            out += np.float32(weight) * similarity
        for weight, (m, n) in zip(v.products, combinations(range(len(z)), 2), strict=True):
            if weight:
                out += np.float32(weight) * z[m] * z[n]
        if len(v.outer):
            _add_hidden(v.own_hidden[local], v.others_hidden, v.outer, out)
            out += v.straight[local][:, None]
            out += v.straight

    def exact(self, rows: Array, items: Array) -> Array:
        """See `Scores`."""
        return self.vectors.logits(self.local[rows], items)

    def error(self, rows: slice) -> Array:
        """See `Scores`."""
        v, local = self.vectors, self.local[rows]
        z_size, z_error = [], []
        for own, longest, stand_in in zip(v.own, self._longest, v.stand_in, strict=True):
            length = np.sqrt(np.square(own[local], dtype=np.float64).sum(axis=1))
            size = length * longest + abs(stand_in)
            z_size.append(size)
            z_error.append(_gamma(own.shape[1] + 4) * size)
        # `size` bounds the sum of the absolute values of all terms, `error` what z_error makes of it
        size = np.full(len(local), abs(v.bias))
        error = np.zeros(len(local))
        for weight, s, e in zip(np.abs(v.weights), z_size, z_error, strict=True):
            size += weight * (s + e)
            error += weight * e
        for weight, (m, n) in zip(
            np.abs(v.products), combinations(range(len(z_size)), 2), strict=True
        ):
            size += weight * (z_size[m] + z_error[m]) * (z_size[n] + z_error[n])
            error += weight * (
                z_size[m] * z_error[n] + z_size[n] * z_error[m] + z_error[m] * z_error[n]
            )
        n_terms = 2 * len(z_size) + 2 * len(v.products) + 8
        if len(v.outer):
            reach = np.abs(v.own_hidden[local]).astype(np.float64) + self._largest_hidden
            size += reach @ np.abs(v.outer).astype(np.float64)
            size += np.abs(v.straight[local]) + float(np.abs(v.straight).max(initial=0))
            n_terms += len(v.outer)
        return np.asarray(error + _gamma(n_terms) * size + np.finfo(np.float32).tiny * n_terms)

    @cached_property
    def _longest(self) -> list[float]:
        """The length of the longest row of each module's `others`."""
        return [
            float(np.sqrt(np.square(part, dtype=np.float64).sum(axis=1).max(initial=0)))
            for part in self.vectors.others
        ]

    @cached_property
    def _largest_hidden(self) -> Array:
        """The largest |value| of each column of `others_hidden`, float64 (2 H,)."""
        return np.abs(self.vectors.others_hidden).max(axis=0, initial=0).astype(np.float64)


def _gamma(n: int) -> float:
    return n * _UNIT / (1 - n * _UNIT)


@compiled
def _add_hidden(own: Array, others: Array, outer: Array, out: Array) -> None:
    """Add sum_h outer[h] max(0, own[r, h] + others[j, h]) to out[r, j], in float32."""
    for row in range(len(own)):
        for item in range(len(others)):
            total = np.float32(0)
            for h in range(len(outer)):
                total += outer[h] * max(own[row, h] + others[item, h], np.float32(0))
            out[row, item] += total


@compiled_in_order
def _hidden_of_pairs(
    own: Array, others: Array, outer: Array, i: Array, j: Array, out: Array
) -> None:
    """Set out[p] to the same sum for the pair (i[p], j[p]), in float64."""
    for pair in range(len(i)):
        total = np.float64(0)
        for h in range(len(outer)):
            sum_of_both = np.float64(own[i[pair], h]) + np.float64(others[j[pair], h])
            if sum_of_both > 0:
                total += np.float64(outer[h]) * sum_of_both
        out[pair] = total
