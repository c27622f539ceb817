"""Item kNN: recommend the items that are most similar to those of the user's history.

Two items are similar if the same users acted on them; the similarity is a cosine.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.items.item_item import (
    ItemItemModel,
    ItemItemSettings,
    gram,
    keep_nearest,
    multiply_by_trend,
    vocabulary_within_limit,
)
from recspark.models.weights import HistoryWeights


class ItemKNNSettings(ItemItemSettings):
    """Settings of `ItemKNN`."""

    shrink: float = Field(
        10.0,
        ge=0,
        description="number added to the cosine's divisor, in squared weights: it pulls the "
        "similarity of pairs with few users towards 0. Source: bundled data",
        json_schema_extra={"tune": {"low": 0.3, "high": 100, "log": True}},
    )
    n_neighbours: int | None = Field(
        None,
        ge=1,
        description="only this many of the items most similar to an item add to its score; null = "
        "all",
        json_schema_extra={"tune": {"choices": [None, 50, 200]}},
    )


class ItemKNNModel(ItemItemModel):
    """The fitted similarities: item j of a history adds `matrix[j, i]` to the score of item i.

    The diagonal is 0. An item to which no item of the history adds is not recommended.
    """

    evidence_only = True


class ItemKNN(Algorithm[ItemKNNSettings]):
    """Score of item i = sum over the items j of the history of weight_j * similarity(j, i).

    similarity(j, i) = x_i . x_j / (|x_i| |x_j| + shrink), where x_i is the column of item i in the
    matrix of all users' weights.

    With `trend_days`, scores are multiplied by the item's trend: see `multiply_by_trend`.

    Source: Sarwar et al. 2001, "Item-based collaborative filtering"; shrink: Bell and Koren 2007.
    """

    settings_class = ItemKNNSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> ItemKNNModel:
        """See `Algorithm.fit`. The driver needs 12 n_items^2 bytes.

        With `trend_days` the fit runs two more jobs.
        """
        settings = self.settings
        items = vocabulary_within_limit(data, settings, "item_knn")
        weights = HistoryWeights(micros(data.cutoff), settings.half_life_days, settings.weighting)
        matrix = similarities(gram(data.histories, items, weights), settings.shrink)
        if settings.n_neighbours is not None:
            keep_nearest(matrix, settings.n_neighbours)
        multiply_by_trend(matrix, items, data, settings.trend_days)
        return ItemKNNModel(settings, data.cutoff, items, matrix)


def similarities(gram: Array, shrink: float) -> Array:
    """Return the shrunk cosines of all pairs of items, float32 (n_items, n_items), diagonal 0.

    `gram` : X^T X, float64 (n_items, n_items); it is overwritten.

    >>> similarities(np.array([[4.0, 2.0], [2.0, 9.0]]), 2.0)
    array([[0.  , 0.25],
           [0.25, 0.  ]], dtype=float32)
    """
    norms = np.sqrt(gram.diagonal())
    for row, norm in zip(gram, norms, strict=True):  # row by row: no second matrix
        divisor = norm * norms + shrink
        row /= np.where(divisor > 0, divisor, 1)  # divisor 0: the numerator is 0 too
    gram[np.diag_indices(len(gram))] = 0
    return gram.astype(np.float32)
