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
from recspark.models.items.item_item import ItemItemModel, ItemItemSettings, check_catalogue, gram
from recspark.models.items.item_knn import keep_nearest
from recspark.models.weights import HistoryWeights


class Rp3BetaSettings(ItemItemSettings):
    """Settings of `Rp3Beta`; half-life and weighting are of the user's first step, at scoring."""

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
        description="an item's score is divided by its number of users to this power; 0 is P3alpha. "
        "Paper: .6 to .9",
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
    """Score = sum over the history of weight * sum_u P(j -> u)^alpha P(u -> i)^alpha / n_i^beta.

    The graph is not weighted: a step from an item goes to one of its n_j users, from a user to one of
    the n_u items, with equal probability. Source: Paudel, Christoffel, Newell & Bernstein 2016,
    "Updatable, Accurate, Diverse, and Scalable Recommendations for Interactive Applications".
    """

    settings_class = Rp3BetaSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Rp3BetaModel:
        """See `Algorithm.fit`. Driver: 12 bytes an item squared. Two jobs."""
        settings = self.settings
        items = check_catalogue(data, settings, "rp3beta")
        # Steps of users as factors of both sides: x_uj n_u^(-alpha / 2) x_ui n_u^(-alpha / 2).
        steps = StepWeights(micros(data.cutoff), None, "binary", alpha=settings.alpha)
        walks = gram(data.histories, items, steps)
        n_users = users_of_items(data.histories, items, steps)
        matrix = walk_weights(walks, n_users, settings.alpha, settings.beta)
        if settings.n_neighbours is not None:
            keep_nearest(matrix, settings.n_neighbours)
        return Rp3BetaModel(settings, data.cutoff, items, matrix)


@dataclass(frozen=True)
class StepWeights(HistoryWeights):
    """Weights of a user's items of which two multiplied are the probability of a step, to alpha."""

    alpha: float = 1.0

    def local(self, history: Histories, items: Array) -> tuple[Array, Array, Array]:
        """See `HistoryWeights`: n_u^(-alpha / 2) for each of the user's n_u items."""
        start, item, _ = super().local(history, items)
        n_items = np.diff(start)
        each = np.maximum(n_items, 1).astype(np.float64) ** (-self.alpha / 2)
        return start, item, np.repeat(each, n_items).astype(np.float32)


def walk_weights(walks: Array, n_users: Array, alpha: float, beta: float) -> Array:
    """Return the matrix of the model, float32, of the sums over users (float64, overwritten).

    `n_users` int64 (n_items,): of each item.

    >>> walk_weights(np.array([[1.0, 0.5], [0.5, 0.5]]), np.array([4, 1]), 1.0, 0.5)
    array([[0.   , 0.125],
           [0.25 , 0.   ]], dtype=float32)
    """
    count = np.maximum(n_users, 1).astype(np.float64)
    towards = count**beta
    for row, n in zip(walks, count, strict=True):  # a row at a time: no second matrix
        row /= n**alpha * towards
    walks[np.diag_indices(len(walks))] = 0
    return walks.astype(np.float32)


def users_of_items(histories: DataFrame, items: Array, weights: HistoryWeights) -> Array:
    """Return the number of users of each item, int64 (n_items,). One job; 8 bytes an item and task."""
    shared = histories.sparkSession.sparkContext.broadcast((items, weights))

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, weigh = shared.value
        total = np.zeros(len(vocabulary), np.int64)
        for batch in batches:
            _, item, _ = weigh.local(parse_histories(batch.column("history")), vocabulary)
            total += np.bincount(item, minlength=len(vocabulary))
        yield pa.RecordBatch.from_arrays([pa.array([total.tobytes()])], names=["counts"])

    rows = histories.select("history").mapInArrow(count, schema.columns(counts=BinaryType()))
    out = np.zeros(len(items), np.int64)
    for row in rows.toLocalIterator():
        out += np.frombuffer(row["counts"], np.int64)
    return out
