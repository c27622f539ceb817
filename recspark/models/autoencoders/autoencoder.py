"""Scoring of autoencoders: a bag of weighted items through some layers, then the kernel's product.

The last layer, hidden times items, is what the top-N kernel multiplies; everything before it is the
user's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from recspark.data.blocks import Array, QueryBlock
from recspark.models.base import ArraysModel
from recspark.models.scoring import topk
from recspark.models.weights import HistoryWeights

Activation = Literal["identity", "sigmoid", "tanh"]
# Names of the arrays of each layer before the last, and what follows it: "x" stands for the matrix
# `x` and the bias `x_bias`.
Layers = tuple[tuple[str, Activation], ...]

_BLOCK = 256  # rows encoded at once, always: BLAS answers for a row as its shape decides


class AutoencoderModel(ArraysModel):
    """A trained autoencoder of bags: what autorec, sdae and multvae have in common once fitted.

    Parameters
    ----------
    settings : of the model; `half_life_days` decays the history at scoring
    arrays : what `AutoencoderScorer` needs, float32, named as the network's parameters
    """

    @property
    def weights(self) -> HistoryWeights:
        """How the model weighs a history."""
        half_life: float | None = self.settings.half_life_days  # type: ignore[attr-defined]
        return HistoryWeights.sums(self.cutoff, half_life)

    @property
    def layers(self) -> Layers:
        """The layers before the last."""
        raise NotImplementedError

    @property
    def unit(self) -> bool:
        """Whether a bag is scaled to length 1."""
        return True

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        shared = self.shared_arrays()
        return AutoencoderScorer(self.weights, self.items, shared, self.layers, self.unit)


@dataclass(frozen=True)
class AutoencoderScorer:
    """Weighs the history and encodes it.

    `arrays` hold the layers, and `items_out` (n_items, h), `items_out_bias` (n_items,). The first
    layer's matrix is (n_items, h'). `unit` scales a bag to length 1 before it.
    """

    weights: HistoryWeights
    items: Array
    arrays: dict[str, topk.Shared]
    layers: Layers
    unit: bool

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user without a known item gets no list."""
        start, items, weights = self.weights.local(block.history, self.items)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        return topk.DotScores(
            encode(start, items, weights, arrays, self.layers, unit=self.unit),
            arrays["items_out"],
            arrays["items_out_bias"],
            np.diff(start) > 0,
        )


def encode(
    start: Array,
    items: Array,
    weights: Array,
    arrays: dict[str, Array],
    layers: Layers,
    *,
    unit: bool,
) -> Array:
    """Return what the last of `layers` gives for each row, float32 (n, h), without noise.

    `start` int64 (n + 1,), `items` int32 (p,) local, `weights` float32 (p,): row r has entries
    `start[r]:start[r + 1]`. Computed in float64 in the same order for a row wherever it stands, so
    the answer does not depend on batching; no torch.
    """
    n = len(start) - 1
    (first, activation), *rest = layers
    used, column = np.unique(items, return_inverse=True)
    rows = sparse.csr_matrix((weights.astype(np.float64), column, start), shape=(n, len(used)))
    summed = rows @ arrays[first][used].astype(np.float64)  # (n, h'): entries in their order
    if unit:
        length = np.sqrt(rows.multiply(rows) @ np.ones(len(used)))  # (n,)
        summed /= np.maximum(length, 1e-12)[:, None]
    names = [f"{first}_bias", *(array for name, _ in rest for array in (name, f"{name}_bias"))]
    wide = {name: arrays[name].astype(np.float64) for name in names}
    out = np.empty((n, arrays["items_out"].shape[1]), np.float32)
    block = np.zeros((_BLOCK, summed.shape[1]))
    for begin in range(0, n, _BLOCK):
        part = summed[begin : begin + _BLOCK]
        block[: len(part)] = part
        hidden = _activate(block + wide[f"{first}_bias"], activation)
        for name, following in rest:
            hidden = _activate(hidden @ wide[name] + wide[f"{name}_bias"], following)
        out[begin : begin + _BLOCK] = hidden[: len(part)]
    return out


def _activate(values: Array, activation: Activation) -> Array:
    if activation == "tanh":
        return np.tanh(values)
    if activation == "sigmoid":
        return 0.5 * (1 + np.tanh(0.5 * values))  # no overflow
    return values
