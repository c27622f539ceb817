"""Session kNN: the next item is what followed in sessions like the open one (VSKNN, STAN)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

import numpy as np
from pydantic import Field
from pyspark import StorageLevel
from pyspark.sql import functions as F

from recspark.data.blocks import MICROS_PER_DAY, Array, QueryBlock, micros
from recspark.data.dataset import Dataset
from recspark.data.windows import Unit
from recspark.engines import session_index
from recspark.engines.session_index import SessionIndex
from recspark.engines.session_kernel import Weights, next_items
from recspark.errors import CatalogueTooLargeError
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.listed import ListedScores
from recspark.models.sequences.contexts import contexts

_ENTRY_BYTES = 60  # on the driver, of an item of a session, while the index is built


class SessionKNNSettings(Settings):
    """Settings of `SessionKNN`. "Diginetica" = measured by benchmarks/quality/sessions.py."""

    method: Literal["vsknn", "stan"] = Field(
        "vsknn", description="how sessions are compared and their items weighed"
    )
    train_on: Unit = Field(
        "session", description="what is a neighbour: a session, or a user's newest items"
    )
    context: Unit = Field(
        "session",
        description="what is compared: the last session of the history, or its newest items",
    )
    length: int = Field(
        50, ge=1, description="items, the newest, of a session or history that count. Guess"
    )
    n_newest: int = Field(
        1000,
        ge=1,
        description="m: sessions compared, the newest that share an item. Ludewig & Jannach 2018",
        json_schema_extra={"tune": {"choices": [500, 1000, 2500, 5000]}},
    )
    n_neighbours: int = Field(
        500,
        ge=1,
        description="k: the most similar of them, whose items count. Diginetica",
        json_schema_extra={"tune": {"choices": [50, 100, 200, 500, 1000]}},
    )
    position_weight: Literal["linear", "quadratic", "equal"] = Field(
        "linear",
        description="vsknn: weight p / l of the p-th of l items in the comparison, its square, or 1",
    )
    idf: float = Field(
        1.0,
        ge=0,
        description="vsknn: an item counts 1 + this * log(sessions / sessions with it). Guess",
        json_schema_extra={"tune": {"low": 0.0, "high": 10.0}},
    )
    position_decay: float = Field(
        5.0,
        gt=0,
        description="stan, lambda 1: items back in the open session to weigh 1/e. Garg et al. 2019",
        json_schema_extra={"tune": {"low": 0.5, "high": 20, "log": True}},
    )
    recency_days: float | None = Field(
        80.0,
        gt=0,
        description="stan, lambda 2: days back for a session to count 1/e; null = all alike. Guess",
        json_schema_extra={"tune": {"low": 5, "high": 200, "log": True}},
    )
    neighbour_decay: float = Field(
        5.0,
        gt=0,
        description="stan, lambda 3: places from the shared item, in the neighbour, to weigh 1/e. "
        "Garg et al. 2019",
        json_schema_extra={"tune": {"low": 0.5, "high": 20, "log": True}},
    )
    max_entries: int = Field(
        100_000_000,
        ge=1,
        description="largest index: items of all its sessions together; an entry takes about 60 "
        "bytes on the driver while it is built (6 GB), 12 in the artifact. Guess",
    )


class SessionKNN(Algorithm[SessionKNNSettings]):
    """Items of the k sessions most similar to the open one, weighed by similarity and position.

    Of the sessions that share an item with the open one, the m newest are compared.

    VSKNN (Ludewig & Jannach 2018): an open session of l items gives its p-th item the
    weight p / l; similarity = sum of the weights of shared items. A neighbour's items get its
    similarity, times 1 / steps from the open session's end to the newest shared item (1 = the last
    item), times an idf.

    STAN (Garg et al. 2019): similarity = sum over shared items of
    exp(-(l - p) / lambda 1), divided by the root of both lengths' product, times
    exp(-age of the neighbour / lambda 2); an item of it gets that, times
    exp(-|its place - place of the newest shared item| / lambda 3).

    An item that is several times in a session stands at its last place.
    """

    settings_class = SessionKNNSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> SessionKNNModel:
        """See `Algorithm.fit`. The driver holds the index and, meanwhile, its rows. Four jobs.

        Of each item, the `n_newest` newest sessions are in it: at most n_items * n_newest sessions,
        however many there are. Raises CatalogueTooLargeError before they are collected.
        """
        settings = self.settings
        items = data.vocabulary()
        made = session_index.sessions(data.histories, settings.train_on, settings.length)
        counts = made.select(F.explode("items").alias("item")).groupBy("item").count().toArrow()
        kept = session_index.newest(made, settings.n_newest).persist(StorageLevel.MEMORY_AND_DISK)
        try:
            n_entries = kept.agg(F.sum(F.size("items"))).first()[0] or 0  # type: ignore[index]
            if n_entries > settings.max_entries:
                raise CatalogueTooLargeError(
                    f"session_knn: the {settings.n_newest:,} newest sessions of each of "
                    f"{len(items):,} items have {n_entries:,} items, max_entries is "
                    f"{settings.max_entries:,}; lower models.session_knn.n_newest, or raise "
                    f"max_entries if the driver has {_ENTRY_BYTES * n_entries / 1e9:,.0f} GB to spare"
                )
            index = session_index.build(kept.toArrow(), items, settings.n_newest)
        finally:
            kept.unpersist()
        weights = np.ones(len(items))
        if settings.method == "vsknn":
            n_sessions = made.count()
            at = np.searchsorted(items, counts.column("item").to_numpy())
            weights[at] += settings.idf * np.log(n_sessions / counts.column("count").to_numpy())
        return SessionKNNModel(settings, data.cutoff, items, index, weights)


class SessionKNNModel(RetrieverModel):
    """The index, and `item_weight` float64 (n_items,): a factor of each item's score."""

    def __init__(
        self,
        settings: SessionKNNSettings,
        cutoff: datetime,
        items: Array,
        index: SessionIndex,
        item_weight: Array,
    ) -> None:
        super().__init__(settings, cutoff, items)
        self._settings = settings
        self.index = index
        self.item_weight = item_weight

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        shared = {name: topk.Shared(array) for name, array in self.arrays().items()}
        return SessionKNNScorer(self._settings, micros(self.cutoff), self.items, shared)

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`."""
        return {**self.index.arrays(), "item_weight": self.item_weight}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        assert isinstance(settings, SessionKNNSettings)
        index = SessionIndex.from_arrays(arrays)
        return cls(settings, cutoff, items, index, arrays["item_weight"])


@dataclass(frozen=True)
class SessionKNNScorer:
    """Compares the open session of each query with the index."""

    settings: SessionKNNSettings
    as_of: int  # microseconds since 1970 UTC; ages are measured to it
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.Scorer`."""
        settings = self.settings
        opened = contexts(block.history, self.items, settings.context, settings.length)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        index = SessionIndex.from_arrays(arrays)
        weights = method_weights(settings, index, arrays["item_weight"], self.as_of)
        start, items, scores = next_items(
            opened, index, weights, settings.n_newest, settings.n_neighbours
        )
        return ListedScores(start, items, scores, len(self.items))


def method_weights(
    settings: SessionKNNSettings, index: SessionIndex, item_weight: Array, as_of: int
) -> Weights:
    """Return what `settings.method` makes of lengths, places, ages and items.

    Ages are to `as_of`, not to the open session's end: that is one factor for all neighbours.
    """
    length = np.arange(settings.length + 1)[:, None]  # l, from 0
    place = np.arange(settings.length)[None, :]  # p - 1
    ones = np.ones(settings.length)
    if settings.method == "stan":
        opened = np.exp(-(length - 1 - place) / settings.position_decay)
        opened /= np.sqrt(np.maximum(length, 1))
        session = 1 / np.sqrt(index.session_length.astype(np.float64))
        if settings.recency_days is not None:
            age = (as_of - index.session_at) / MICROS_PER_DAY
            session *= np.exp(-age / settings.recency_days)
        near = np.exp(-place[0] / settings.neighbour_decay)
        return Weights(opened, session, ones, near, item_weight)
    power = {"linear": 1, "quadratic": 2, "equal": 0}[settings.position_weight]
    opened = ((place + 1) / np.maximum(length, 1)) ** power
    session = np.ones(len(index.session_at))
    return Weights(opened, session, 1 / (place[0] + 1.0), ones, item_weight)
