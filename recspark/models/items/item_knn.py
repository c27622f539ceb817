"""Item kNN: an item is recommended by the items of a history whose users it shares (cosine)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.items.item_item import (
    ItemItemModel,
    ItemItemSettings,
    check_catalogue,
    gram,
    keep_nearest,
)
from recspark.models.weights import HistoryWeights


class ItemKNNSettings(ItemItemSettings):
    """Settings of `ItemKNN`."""

    shrink: float = Field(
        10.0,
        ge=0,
        description="added to the cosine's divisor, in squared weights: pulls pairs with little "
        "support to 0. Source: bundled data",
        json_schema_extra={"tune": {"low": 0.3, "high": 100, "log": True}},
    )
    n_neighbours: int | None = Field(
        None,
        ge=1,
        description="most similar items that may recommend an item; null = all",
        json_schema_extra={"tune": {"choices": [None, 50, 200]}},
    )


class ItemKNNModel(ItemItemModel):
    """Similarities: `matrix[j, i]` is how much item j speaks for item i; its diagonal is 0."""

    evidence_only = True


class ItemKNN(Algorithm[ItemKNNSettings]):
    """Score = sum over the history of weight * x_i . x_j / (|x_i| |x_j| + shrink); x: item columns.

    Source: Sarwar et al. 2001, "Item-based collaborative filtering"; shrink: Bell and Koren 2007.
    """

    settings_class = ItemKNNSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> ItemKNNModel:
        """See `Algorithm.fit`. Driver: 12 bytes an item squared."""
        settings = self.settings
        items = check_catalogue(data, settings, "item_knn")
        weights = HistoryWeights(micros(data.cutoff), settings.half_life_days, settings.weighting)
        matrix = similarities(gram(data.histories, items, weights), settings.shrink)
        if settings.n_neighbours is not None:
            keep_nearest(matrix, settings.n_neighbours)
        return ItemKNNModel(settings, data.cutoff, items, matrix)


def similarities(gram: Array, shrink: float) -> Array:
    """Return shrunk cosines, float32, diagonal 0, of X^T X (float64, overwritten).

    >>> similarities(np.array([[4.0, 2.0], [2.0, 9.0]]), 2.0)
    array([[0.  , 0.25],
           [0.25, 0.  ]], dtype=float32)
    """
    norms = np.sqrt(gram.diagonal())
    for row, norm in zip(gram, norms, strict=True):  # a row at a time: no second matrix
        divisor = norm * norms + shrink
        row /= np.where(divisor > 0, divisor, 1)  # no divisor: the item weighs nothing, nor its row
    gram[np.diag_indices(len(gram))] = 0
    return gram.astype(np.float32)
