"""Session kNN: recommend the items of the past sessions that are most similar to the open session.

Two methods compare sessions and weigh their items: VSKNN and STAN, see `SessionKNN`.
"""

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
from recspark.data.training_rows import Unit
from recspark.engines import session_index
from recspark.engines.session_index import SessionIndex
from recspark.engines.session_kernel import Weights, next_items
from recspark.errors import CatalogueTooLargeError
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.listed import ListedScores
from recspark.models.sequences.contexts import contexts

# Memory of the driver, while the index is built, for each entry: an item of a session
_ENTRY_BYTES = 60


class SessionKNNSettings(Settings):
    """Settings of `SessionKNN`. "Diginetica" = measured by benchmarks/quality/sessions.py."""

    method: Literal["vsknn", "stan"] = Field(
        "vsknn", description="how sessions are compared, and how their items are weighed"
    )
    train_on: Unit = Field(
        "session",
        description="a neighbour is a past session, or the newest items of a user's history",
    )
    context: Unit = Field(
        "session",
        description="what is compared with the neighbours: the last session of the user's history, "
        "or its newest items",
    )
    length: int = Field(
        50, ge=1, description="this many of the newest items of a session or history count. Guess"
    )
    n_newest: int = Field(
        1000,
        ge=1,
        description="m: of the sessions that share an item, this many of the newest are compared. "
        "Ludewig & Jannach 2018",
        json_schema_extra={"tune": {"choices": [500, 1000, 2500, 5000]}},
    )
    n_neighbours: int = Field(
        500,
        ge=1,
        description="k: of the compared sessions, this many of the most similar are neighbours; "
        "only their items count. Diginetica",
        json_schema_extra={"tune": {"choices": [50, 100, 200, 500, 1000]}},
    )
    position_weight: Literal["linear", "quadratic", "equal"] = Field(
        "linear",
        description="vsknn: weight of the p-th of l items in the comparison. linear = p / l, "
        "quadratic = (p / l)^2, equal = 1",
    )
    idf: float = Field(
        1.0,
        ge=0,
        description="vsknn: the score of an item is multiplied by 1 + idf * log(number of sessions "
        "/ number of sessions with the item). Guess",
        json_schema_extra={"tune": {"low": 0.0, "high": 10.0}},
    )
    position_decay: float = Field(
        5.0,
        gt=0,
        description="stan, lambda 1: an item this many items before the end of the open session "
        "weighs 1/e. Garg et al. 2019",
        json_schema_extra={"tune": {"low": 0.5, "high": 20, "log": True}},
    )
    recency_days: float | None = Field(
        80.0,
        gt=0,
        description="stan, lambda 2: a session of this many days ago counts 1/e; null = all "
        "sessions count the same. Guess",
        json_schema_extra={"tune": {"low": 5, "high": 200, "log": True}},
    )
    neighbour_decay: float = Field(
        5.0,
        gt=0,
        description="stan, lambda 3: an item of a neighbour this many items away from the newest "
        "shared item weighs 1/e. Garg et al. 2019",
        json_schema_extra={"tune": {"low": 0.5, "high": 20, "log": True}},
    )
    max_entries: int = Field(
        100_000_000,
        ge=1,
        description="largest index, in entries: the items of all its sessions together. An entry "
        "takes about 60 bytes on the driver while the index is built (6 GB), and 12 in the "
        "artifact. Guess",
    )


class SessionKNN(Algorithm[SessionKNNSettings]):
    """Scores the items of the sessions that are most similar to the open session.

    Of the past sessions that share an item with the open session, the m newest are compared. The k
    most similar of them are the neighbours. An item's score is the sum over the neighbours that
    have the item, as follows. The open session has l items, and p is the position of one of them,
    from 1.

    VSKNN (Ludewig & Jannach 2018). The p-th item of the open session has the weight p / l (another
    one with another `position_weight`), and the similarity of a session is the sum of the weights
    of the shared items. A neighbour adds to each of its items: similarity / s, where s = 1 if the
    newest shared item is the last item of the open session, 2 if it is the one before, and so on.
    The sum is multiplied by an idf of the item.

    STAN (Garg et al. 2019). The similarity of a session is the sum over the shared items of
    exp(-(l - p) / lambda 1), divided by the square root of the product of both lengths, times
    exp(-age of the session / lambda 2). A neighbour adds to each of its items: similarity *
    exp(-d / lambda 3), where d is the distance, in items of the neighbour, between the item and the
    newest shared item.

    An item that a session has several times counts once, at its last position.

    Example (VSKNN, without idf): the open session is (a, b), so a weighs 1/2 and b weighs 1. The
    session (b, c) has similarity 1 and adds 1 to b and c. The session (a, d) has similarity 1/2;
    its newest shared item is one before the end, so it adds 1/4 to a and d.
    """

    settings_class = SessionKNNSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> SessionKNNModel:
        """See `Algorithm.fit`. Runs four Spark jobs.

        The index holds the `n_newest` newest sessions of each item: at most n_items * n_newest
        sessions, however many the data has. The driver holds the index and, while it is built, the
        rows of these sessions. Raises CatalogueTooLargeError before the rows are collected.
        """
        settings = self.settings
        items = data.vocabulary()
        all_sessions = session_index.sessions(data.histories, settings.train_on, settings.length)
        n_sessions_by_item = (
            all_sessions.select(F.explode("items").alias("item")).groupBy("item").count().toArrow()
        )
        newest_sessions = session_index.newest(all_sessions, settings.n_newest).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        try:
            n_entries = newest_sessions.agg(F.sum(F.size("items"))).first()[0] or 0  # type: ignore[index]
            if n_entries > settings.max_entries:
                raise CatalogueTooLargeError(
                    f"session_knn: the {settings.n_newest:,} newest sessions of each of "
                    f"{len(items):,} items have {n_entries:,} items, max_entries is "
                    f"{settings.max_entries:,}; lower models.session_knn.n_newest, or raise "
                    f"max_entries if the driver has {_ENTRY_BYTES * n_entries / 1e9:,.0f} GB to spare"
                )
            index = session_index.build(newest_sessions.toArrow(), items, settings.n_newest)
        finally:
            newest_sessions.unpersist()
        item_weight = np.ones(len(items))
        if settings.method == "vsknn":
            n_sessions = all_sessions.count()
            item_rows = np.searchsorted(items, n_sessions_by_item.column("item").to_numpy())
            item_weight[item_rows] += settings.idf * np.log(
                n_sessions / n_sessions_by_item.column("count").to_numpy()
            )
        return SessionKNNModel(settings, data.cutoff, items, index, item_weight)


class SessionKNNModel(RetrieverModel):
    """A fitted `SessionKNN`: the index of sessions, and a factor of each item's score.

    The factors are `item_weight`, float64 (n_items,).
    """

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
    """Compares the open session of each query with the sessions of the index.

    `items` item_idx int32 (n_items,), ascending: the vocabulary. `arrays` : see `SessionKNNModel`.
    """

    settings: SessionKNNSettings
    as_of: int  # the moment at which ages are 0, microseconds since 1970 UTC
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.Scorer`."""
        settings = self.settings
        open_sessions = contexts(block.history, self.items, settings.context, settings.length)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        index = SessionIndex.from_arrays(arrays)
        weights = method_weights(settings, index, arrays["item_weight"], self.as_of)
        start, items, scores = next_items(
            open_sessions, index, weights, settings.n_newest, settings.n_neighbours
        )
        return ListedScores(start, items, scores, len(self.items))


def method_weights(
    settings: SessionKNNSettings, index: SessionIndex, item_weight: Array, as_of: int
) -> Weights:
    """Return the weights that the equations of `settings.method` give; see `SessionKNN`.

    The age of a session is measured to `as_of` (microseconds since 1970 UTC), not to the end of the
    open session. This changes the similarity of all neighbours by the same factor, and no ranking.
    """
    length = np.arange(settings.length + 1)[:, None]  # (L + 1, 1): l, from 0
    position = np.arange(settings.length)[None, :]  # (1, L): p - 1
    ones = np.ones(settings.length)
    if settings.method == "stan":
        opened = np.exp(-(length - 1 - position) / settings.position_decay)  # (L + 1, L)
        opened /= np.sqrt(np.maximum(length, 1))
        session = 1 / np.sqrt(index.session_length.astype(np.float64))  # (n_sessions,)
        if settings.recency_days is not None:
            age_days = (as_of - index.session_at) / MICROS_PER_DAY
            session *= np.exp(-age_days / settings.recency_days)
        distance = np.exp(-position[0] / settings.neighbour_decay)  # (L,)
        return Weights(opened, session, ones, distance, item_weight)
    power = {"linear": 1, "quadratic": 2, "equal": 0}[settings.position_weight]
    opened = ((position + 1) / np.maximum(length, 1)) ** power  # (L + 1, L)
    session = np.ones(len(index.session_at))
    return Weights(opened, session, 1 / (position[0] + 1.0), ones, item_weight)
