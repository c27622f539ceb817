"""RP3beta: three random steps on the graph of users and items, popular items held back."""

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
    check_catalogue,
    gram,
    keep_nearest,
)
from recspark.models.weights import HistoryWeights

_STEPS = 2.0**30


class Rp3BetaSettings(ItemItemSettings):
    """Settings of `Rp3Beta`; half-life and weighting make the weights of the graph and of a history."""

    alpha: float = Field(
        1.0,
        gt=0,
        le=4,
        description="power of the probability of a step. Paper: P3alpha, Cooper et al. 2014; 1 is a "
        "plain walk",
        json_schema_extra={"tune": {"low": 0.3, "high": 2}},
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=2,
        description="an item's score is divided by the weight of all its users to this power; 0 is "
        "P3alpha. Paper: .6 to .9",
        json_schema_extra={"tune": {"low": 0, "high": 1}},
    )
    n_neighbours: int | None = Field(
        None,
        ge=1,
        description="largest steps that may lead to an item; null = all",
        json_schema_extra={"tune": {"choices": [None, 50, 200]}},
    )


class Rp3BetaModel(ItemItemModel):
    """`matrix[j, i]` is the weight of walks from item j by any user to item i; its diagonal is 0."""

    evidence_only = True


class Rp3Beta(Algorithm[Rp3BetaSettings]):
    """Score = sum over the history of weight * sum_u P(j -> u)^alpha P(u -> i)^alpha / d_i^beta.

    A step goes from an item j to a user u, and from a user to an item, with a probability in
    proportion to the weight x of the user's events on the item; d_i is the sum of x over the item's
    users. Without decay x is 1, as in the paper. Source: Paudel, Christoffel, Newell & Bernstein 2016,
    "Updatable, Accurate, Diverse, and Scalable Recommendations for Interactive Applications".
    """

    settings_class = Rp3BetaSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Rp3BetaModel:
        """See `Algorithm.fit`. Driver: 12 bytes an item squared. Two jobs."""
        settings = self.settings
        items = check_catalogue(data, settings, "rp3beta")
        weights = HistoryWeights(micros(data.cutoff), settings.half_life_days, settings.weighting)
        walks = gram(data.histories, items, StepWeights(**vars(weights), alpha=settings.alpha))
        degrees = degrees_of(data.histories, items, weights)
        matrix = walk_weights(walks, degrees, settings.alpha, settings.beta)
        if settings.n_neighbours is not None:
            keep_nearest(matrix, settings.n_neighbours)
        return Rp3BetaModel(settings, data.cutoff, items, matrix)


@dataclass(frozen=True)
class StepWeights(HistoryWeights):
    """Weights of a user's items: two of them multiplied are x_uj^alpha (x_ui / sum_i x_ui)^alpha."""

    alpha: float = 1.0

    def local(self, history: Histories, items: Array) -> tuple[Array, Array, Array]:
        """See `HistoryWeights`: x_ui^alpha (sum_i x_ui)^(-alpha / 2)."""
        start, item, weight = super().local(history, items)
        lengths = np.diff(start)
        row = np.repeat(np.arange(len(lengths)), lengths)
        whole = np.bincount(row, weight.astype(np.float64), len(lengths))  # in the order of the row
        steps = weight.astype(np.float64) ** self.alpha * whole[row] ** (-self.alpha / 2)
        return start, item, steps.astype(np.float32)


def walk_weights(walks: Array, degrees: Array, alpha: float, beta: float) -> Array:
    """Return the matrix of the model, float32, of the sums over users (float64, overwritten).

    `degrees` float64 (n_items,): the sum of each item's weights; an item of 0 has no walk.

    >>> walk_weights(np.array([[1.0, 0.5], [0.5, 0.5]]), np.array([4.0, 1.0]), 1.0, 0.5)
    array([[0.   , 0.125],
           [0.25 , 0.   ]], dtype=float32)
    """
    has_users = degrees > 0
    degrees = np.where(has_users, degrees, 1)
    towards = degrees**beta
    for row, degree in zip(walks, degrees, strict=True):  # a row at a time: no second matrix
        row /= degree**alpha * towards
    walks[~has_users] = 0
    walks[np.diag_indices(len(walks))] = 0
    return walks.astype(np.float32)


def degrees_of(histories: DataFrame, items: Array, weights: HistoryWeights) -> Array:
    """Return the sum of the weights of each item, float64 (n_items,).

    Weights are rounded to 2^-30 (an event of thirty half-lives ago), so that the sum is exact up to
    2^33. One job; 8 bytes an item and task.
    """
    shared = histories.sparkSession.sparkContext.broadcast((items, weights))

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, weigh = shared.value
        total = np.zeros(len(vocabulary), np.int64)
        for batch in batches:
            _, item, weight = weigh.local(parse_histories(batch.column("history")), vocabulary)
            np.add.at(total, item, np.rint(weight.astype(np.float64) * _STEPS).astype(np.int64))
        yield pa.RecordBatch.from_arrays([pa.array([total.tobytes()])], names=["sums"])

    rows = histories.select("history").mapInArrow(add_up, schema.columns(sums=BinaryType()))
    out = np.zeros(len(items), np.int64)
    for row in rows.toLocalIterator():
        out += np.frombuffer(row["sums"], np.int64)
    return out / _STEPS
