"""EASE: the item-item matrix that best rebuilds every user's row of item weights (Steck 2019).

The matrix has a closed form: no iterations are needed.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy.linalg import lapack

from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.errors import ModelError
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.items.item_item import (
    ItemItemModel,
    ItemItemSettings,
    gram,
    multiply_by_trend,
    vocabulary_within_limit,
)
from recspark.models.weights import HistoryWeights


class EaseSettings(ItemItemSettings):
    """Settings of `Ease`."""

    reg: float = Field(
        100.0,
        gt=0,
        description="regularisation: number added to the diagonal of X^T X, in squared weights. "
        "Source: the bundled data",
        json_schema_extra={"tune": {"low": 10, "high": 3000, "log": True}},
    )


class EaseModel(ItemItemModel):
    """The fitted matrix B: item j of a history adds `matrix[j, i]` to the score of item i.

    The diagonal is 0.
    """


class Ease(Algorithm[EaseSettings]):
    """Minimise |X - X B|^2 + reg |B|^2 subject to diag(B) = 0.

    X has a row per user and a column per item; it holds the decayed weights of the users' items.
    The solution is B = I - P diag(1 / diag(P)) with P = (X^T X + reg I)^-1.
    With `trend_days`, scores are multiplied by the item's trend, negative ones too: see
    `multiply_by_trend`.
    Source: Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", equations 4 to 8.
    """

    settings_class = EaseSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> EaseModel:
        """See `Algorithm.fit`. The driver needs 12 n_items^2 bytes and n_items^3 operations.

        With `trend_days` the fit runs two more jobs.
        """
        settings = self.settings
        items = vocabulary_within_limit(data, settings, "ease")
        weights = HistoryWeights(micros(data.cutoff), settings.half_life_days, settings.weighting)
        matrix = _weights(gram(data.histories, items, weights), settings.reg)
        multiply_by_trend(matrix, items, data, settings.trend_days)
        return EaseModel(settings, data.cutoff, items, matrix)


def _weights(gram: Array, reg: float) -> Array:
    """Return B, float32 (n_items, n_items), for X^T X, float64, C-ordered, which is overwritten.

    Raises ModelError if X^T X + reg I is not positive definite.
    """
    n_items = len(gram)
    gram[np.diag_indices(n_items)] += reg
    # LAPACK works in place on the transpose, a Fortran-ordered view of the same memory: `dpotrf`
    # gives the Cholesky factor, `dpotri` the inverse P. Only one triangle of P is filled.
    factor, info = lapack.dpotrf(gram.T, lower=0, overwrite_a=1)
    if info == 0:
        factor, info = lapack.dpotri(factor, lower=0, overwrite_c=1)
    if info != 0:
        raise ModelError(
            f"ease: X^T X + {reg} I is not positive definite (LAPACK info {info}); raise reg"
        )
    inverse: Array = factor.T
    for i in range(1, n_items):  # copy the lower triangle to the upper one
        inverse[:i, i] = inverse[i, :i]
    inverse /= -inverse.diagonal().copy()  # B[j, i] = -P[j, i] / P[i, i]
    inverse[np.diag_indices(n_items)] = 0
    return inverse.astype(np.float32)
