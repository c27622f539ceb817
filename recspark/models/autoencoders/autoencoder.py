"""How trained autoencoders score items for users.

A user's history becomes a bag of weighted items. All layers but the last turn the bag into the
user's vector. The last layer is linear, the user's vector times the item vectors: the top-N kernel
(`topk`) does this product.
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
# Name and activation of each layer before the last, first layer first. The name "x" stands for two
# arrays: the matrix `x` and the bias `x_bias`.
Layers = tuple[tuple[str, Activation], ...]

# Rows that are encoded at once. Always this many (short blocks are filled up), because the rounding
# of a BLAS product depends on the shape of its matrices.
_BLOCK_ROWS = 256


class AutoencoderModel(ArraysModel):
    """A trained autoencoder of bags of items: what fitted autorec, sdae and multvae have in common.

    Parameters
    ----------
    settings : the model's settings; `half_life_days` decays the events of a history at scoring
    arrays : the arrays that `AutoencoderScorer` needs, float32, named as the network's parameters
    """

    @property
    def weights(self) -> HistoryWeights:
        """How a history becomes a bag: the decayed events of each item, added up."""
        half_life: float | None = self.settings.half_life_days  # type: ignore[attr-defined]
        return HistoryWeights.sums(self.cutoff, half_life)

    @property
    def layers(self) -> Layers:
        """The layers before the last, first layer first."""
        raise NotImplementedError

    @property
    def unit(self) -> bool:
        """Whether a bag is scaled to Euclidean length 1 before the first layer."""
        return True

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        shared = self.shared_arrays()
        return AutoencoderScorer(self.weights, self.items, shared, self.layers, self.unit)


@dataclass(frozen=True)
class AutoencoderScorer:
    """Turns each history into a bag of weighted items, and the bag into the user's vector.

    Parameters
    ----------
    weights : how a history becomes a bag
    items : item_idx int32 (n_items,), ascending: the vocabulary
    arrays : matrix and bias of each of `layers`, and of the last layer: `items_out` (n_items, h)
        and `items_out_bias` (n_items,). The first layer's matrix is (n_items, h')
    layers : the layers before the last
    unit : whether a bag is scaled to Euclidean length 1 before the first layer
    """

    weights: HistoryWeights
    items: Array
    arrays: dict[str, topk.Shared]
    layers: Layers
    unit: bool

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user none of whose items is in the vocabulary gets no list."""
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
    """Return the output of the last of `layers` for each bag, float32 (n, h).

    No input is dropped and no noise is added.

    Parameters
    ----------
    start, items, weights : the bags. Bag r has the local items `items[start[r]:start[r + 1]]` with
        the weights at the same positions. `start` int64 (n + 1,), `items` int32 (p,), `weights`
        float32 (p,)
    arrays, layers, unit : see `AutoencoderScorer`

    The computation runs in float64 (numpy, no torch). The operations on a bag come in the same
    order wherever the bag stands, so its vector does not depend on the batch around it.

    Example: the bag {item 0: 3, item 2: 4} has length 5. With `unit`, the first layer computes
    activation(3/5 * matrix[0] + 4/5 * matrix[2] + bias).
    """
    n_bags = len(start) - 1
    (first, first_activation), *later_layers = layers
    used_items, column = np.unique(items, return_inverse=True)
    bags = sparse.csr_matrix(
        (weights.astype(np.float64), column, start), shape=(n_bags, len(used_items))
    )
    # (n, h'): a bag's entries are added in their order
    summed = bags @ arrays[first][used_items].astype(np.float64)
    if unit:
        length = np.sqrt(bags.multiply(bags) @ np.ones(len(used_items)))  # (n,)
        summed /= np.maximum(length, 1e-12)[:, None]
    names = [
        f"{first}_bias",
        *(array for name, _ in later_layers for array in (name, f"{name}_bias")),
    ]
    float64_arrays = {name: arrays[name].astype(np.float64) for name in names}
    encoded = np.empty((n_bags, arrays["items_out"].shape[1]), np.float32)
    block = np.zeros((_BLOCK_ROWS, summed.shape[1]))
    for begin in range(0, n_bags, _BLOCK_ROWS):
        summed_of_block = summed[begin : begin + _BLOCK_ROWS]
        block[: len(summed_of_block)] = summed_of_block
        hidden = _activated(block + float64_arrays[f"{first}_bias"], first_activation)
        for name, activation in later_layers:
            hidden = _activated(
                hidden @ float64_arrays[name] + float64_arrays[f"{name}_bias"], activation
            )
        encoded[begin : begin + _BLOCK_ROWS] = hidden[: len(summed_of_block)]
    return encoded


def _activated(values: Array, activation: Activation) -> Array:
    if activation == "tanh":
        return np.tanh(values)
    if activation == "sigmoid":
        return 0.5 * (1 + np.tanh(0.5 * values))  # the sigmoid, written so that nothing overflows
    return values
