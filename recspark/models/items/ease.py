"""EASE: the item-item matrix that best rebuilds every user's row, in closed form (Steck 2019)."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy.linalg import lapack

from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.errors import ModelError
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.items.item_item import ItemItemModel, ItemItemSettings, check_catalogue, gram
from recspark.models.weights import HistoryWeights


class EaseSettings(ItemItemSettings):
    """Settings of `Ease`."""

    reg: float = Field(
        100.0,
        gt=0,
        description="added to the diagonal of X^T X, in squared weights. Source: the bundled data",
        json_schema_extra={"tune": {"low": 10, "high": 3000, "log": True}},
    )


class EaseModel(ItemItemModel):
    """B: `matrix[j, i]` is what item j adds to item i; its diagonal is 0."""


class Ease(Algorithm[EaseSettings]):
    """Minimise |X - X B|^2 + reg |B|^2 with diag(B) = 0, X the users' decayed weights.

    B = I - P diag(1 / diag(P)), P = (X^T X + reg I)^-1.
    Source: Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", equations 4 to 8.
    """

    settings_class = EaseSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> EaseModel:
        """See `Algorithm.fit`. Driver: 12 bytes an item squared, n_items^3 operations."""
        settings = self.settings
        items = check_catalogue(data, settings, "ease")
        weights = HistoryWeights(micros(data.cutoff), settings.half_life_days, settings.weighting)
        matrix = _weights(gram(data.histories, items, weights), settings.reg)
        return EaseModel(settings, data.cutoff, items, matrix)


def _weights(gram: Array, reg: float) -> Array:
    """Return B (float32) of X^T X (float64, C-ordered, overwritten)."""
    n = len(gram)
    gram[np.diag_indices(n)] += reg
    # LAPACK works in place on the Fortran-ordered view, and leaves one triangle of the inverse.
    factor, info = lapack.dpotrf(gram.T, lower=0, overwrite_a=1)
    if info == 0:
        factor, info = lapack.dpotri(factor, lower=0, overwrite_c=1)
    if info != 0:
        raise ModelError(
            f"ease: X^T X + {reg} I is not positive definite (LAPACK info {info}); raise reg"
        )
    inverse: Array = factor.T
    for i in range(1, n):
        inverse[:i, i] = inverse[i, :i]
    inverse /= -inverse.diagonal().copy()
    inverse[np.diag_indices(n)] = 0
    return inverse.astype(np.float32)
