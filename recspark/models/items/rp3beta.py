"""RP3beta: random walks of three steps on the graph of users and items.

A walk goes from the user to an item of the history, on to a user of that item, and on to an item of
that user. The scores of popular items are lowered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql.types import BinaryType

from recspark import schema
from recspark.data.blocks import Array, Histories, micros, parse_histories
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

_STEPS = 2.0**30  # sums of weights are exact in multiples of 1 / _STEPS, see `degrees_of`


class Rp3BetaSettings(ItemItemSettings):
    """Settings of `Rp3Beta`.

    `half_life_days` and `weighting` decide the weights of the graph's edges and of a history's
    items.
    """

    alpha: float = Field(
        1.0,
        gt=0,
        le=4,
        description="the probability of each step is raised to this power; 1 = a plain random "
        "walk. Paper: P3alpha, Cooper et al. 2014",
        json_schema_extra={"tune": {"low": 0.3, "high": 2}},
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=2,
        description="an item's score is divided by the sum of its weights over all users, raised "
        "to this power; 0 = P3alpha. Paper: .6 to .9",
        json_schema_extra={"tune": {"low": 0, "high": 1}},
    )
    n_neighbours: int | None = Field(
        None,
        ge=1,
        description="only the walks from this many items, those with the largest weights, count "
        "for an item; null = all",
        json_schema_extra={"tune": {"choices": [None, 50, 200]}},
    )


class Rp3BetaModel(ItemItemModel):
    """The fitted walks: `matrix[j, i]` is the weight of all walks from item j to item i.

    The diagonal is 0. An item that no walk from the history reaches is not recommended.
    """

    evidence_only = True


class Rp3Beta(Algorithm[Rp3BetaSettings]):
    """Score of item i = sum over the items j of the history of weight_j * walks(j, i) / d_i^beta.

    walks(j, i) = sum over all users u of P(j -> u)^alpha P(u -> i)^alpha. A step goes from an item
    to a user, or from a user to an item, with a probability in proportion to the weight x of the
    user's events on the item; d_i is the sum of x over the users of item i. Without decay x is 1,
    as in the paper.

    With `trend_days`, scores are multiplied by the item's trend: see `multiply_by_trend`.

    Source: Paudel, Christoffel, Newell & Bernstein 2016, "Updatable, Accurate, Diverse, and
    Scalable Recommendations for Interactive Applications".
    """

    settings_class = Rp3BetaSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Rp3BetaModel:
        """See `Algorithm.fit`. The driver needs 12 n_items^2 bytes. Two jobs, and two more with
        `trend_days`.
        """
        settings = self.settings
        items = vocabulary_within_limit(data, settings, "rp3beta")
        weights = HistoryWeights(micros(data.cutoff), settings.half_life_days, settings.weighting)
        walks = gram(data.histories, items, StepWeights(**vars(weights), alpha=settings.alpha))
        degrees = degrees_of(data.histories, items, weights)
        matrix = walk_weights(walks, degrees, settings.alpha, settings.beta)
        if settings.n_neighbours is not None:
            keep_nearest(matrix, settings.n_neighbours)
        multiply_by_trend(matrix, items, data, settings.trend_days)
        return Rp3BetaModel(settings, data.cutoff, items, matrix)


@dataclass(frozen=True)
class StepWeights(HistoryWeights):
    """Weights whose products over a user are walks from item j over the user u to item i.

    The product of the weights of two items j and i is x_uj^alpha (x_ui / sum_i x_ui)^alpha. So
    `gram` sums walks(j, i) of `Rp3Beta` without the division by d_j^alpha.
    """

    alpha: float = 1.0

    def local(self, history: Histories, items: Array) -> tuple[Array, Array, Array]:
        """See `HistoryWeights`. The weights are x_ui^alpha (sum_i x_ui)^(-alpha / 2)."""
        start, item, weight = super().local(history, items)
        lengths = np.diff(start)
        row = np.repeat(np.arange(len(lengths)), lengths)
        row_total = np.bincount(row, weight.astype(np.float64), len(lengths))  # in row order
        steps = weight.astype(np.float64) ** self.alpha * row_total[row] ** (-self.alpha / 2)
        return start, item, steps.astype(np.float32)


def walk_weights(walks: Array, degrees: Array, alpha: float, beta: float) -> Array:
    """Return the matrix of the model, float32 (n_items, n_items): the weights of walks, scaled.

    Parameters
    ----------
    walks : float64 (n_items, n_items), overwritten: the sums over users that `gram` gives for
        `StepWeights`
    degrees : float64 (n_items,), the sum d of each item's weights; an item with d = 0 has no walks

    >>> walk_weights(np.array([[1.0, 0.5], [0.5, 0.5]]), np.array([4.0, 1.0]), 1.0, 0.5)
    array([[0.   , 0.125],
           [0.25 , 0.   ]], dtype=float32)
    """
    has_users = degrees > 0
    degrees = np.where(has_users, degrees, 1)
    popularity = degrees**beta
    for row, degree in zip(walks, degrees, strict=True):  # row by row: no second matrix
        row /= degree**alpha * popularity
    walks[~has_users] = 0
    walks[np.diag_indices(len(walks))] = 0
    return walks.astype(np.float32)


def degrees_of(histories: DataFrame, items: Array, weights: HistoryWeights) -> Array:
    """Return the sum of each item's weights over all users, float64 (n_items,).

    Weights are rounded to multiples of 2^-30 (the weight of an event thirty half-lives ago), so
    sums are exact up to 2^33. One job; a task sends 8 bytes per item to the driver.
    """
    shared = histories.sparkSession.sparkContext.broadcast((items, weights))

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, weigh_history = shared.value
        steps = np.zeros(len(vocabulary), np.int64)
        for batch in batches:
            _, item, weight = weigh_history.local(
                parse_histories(batch.column("history")), vocabulary
            )
            np.add.at(steps, item, np.rint(weight.astype(np.float64) * _STEPS).astype(np.int64))
        yield pa.RecordBatch.from_arrays([pa.array([steps.tobytes()])], names=["sums"])

    sums_of_tasks = histories.select("history").mapInArrow(
        add_up, schema.columns(sums=BinaryType())
    )
    summed_steps = np.zeros(len(items), np.int64)
    try:
        for row in sums_of_tasks.toLocalIterator():
            summed_steps += np.frombuffer(row["sums"], np.int64)
    finally:
        shared.destroy()
    return summed_steps / _STEPS
