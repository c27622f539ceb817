"""Content kNN: recommend the items that are most like the user's own, by vectors of their content.

An item that nobody acted on yet is listed like any other: all that it needs is a description.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array, local_index, micros
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, EmptyDataError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed, Settings
from recspark.models.content.encoders import ListedItems, check_named, encoders_in
from recspark.models.item_vectors import encoded_items
from recspark.models.kinds import Kind
from recspark.models.scoring import topk
from recspark.models.setting_types import HalfLifeDays
from recspark.models.vectors.scoring import MeanVectorScorer, unit_rows
from recspark.models.vectors.similar_items import SimilarItemsScorer, lists_of
from recspark.models.weights import HistoryWeights


class ContentKNNSettings(Settings):
    """Settings of `ContentKNN`."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="encoder -> its weight: the vectors of an item, each of length 1, are multiplied "
        "by the weights and joined. An encoder of `needs` that is not named weighs 1",
    )
    n_neighbours: int | None = Field(
        50,
        ge=1,
        le=10_000,
        description="only this many of the items with events that are most like an item add to its "
        "score; each takes 8 bytes on the driver and on the workers. null = all. Source: 458 films "
        "without events of MovieLens 1M (plots: NDCG@10 .132 with 50, .072 with all)",
    )
    half_life_days: HalfLifeDays = None
    items: ListedItems = "all"


class ContentKNNModel(ArraysModel):
    """The vectors, and for each item those to whose score it adds.

    `vectors` float32 (n_items, size): the joined vectors, of length 1. `is_cold` bool (n_items,).
    With `n_neighbours`, item j adds `similarities` float32 to the score of each of the items
    `neighbours[start[j]:start[j + 1]]`, int32 local indices, ascending. `start` is int64
    (n_items + 1,).
    """

    settings: ContentKNNSettings
    vectors_array = "vectors"

    def scorer(self) -> topk.Scorer | topk.ListScorer:
        """See `RetrieverModel`."""
        weights = HistoryWeights.sums(self.cutoff, self.settings.half_life_days)
        shared = self.shared_arrays()
        if self.settings.n_neighbours is not None:
            lists = (shared[name] for name in ("start", "neighbours", "similarities"))
            return SimilarItemsScorer(weights, self.items, *lists)
        bias = None
        if self.settings.items == "cold":
            bias = np.where(self.arrays()["is_cold"], 0, -np.inf).astype(np.float32)
        vectors = shared["vectors"]
        return MeanVectorScorer(weights, None, self.items, vectors, vectors, bias)


class ContentKNN(Algorithm[ContentKNNSettings]):
    """Score of item i = sum over the items j of the history of decayed weight_j * cosine(j, i).

    Only the `n_neighbours` items with events that are nearest to i count; an item is near itself.
    Without `n_neighbours` the score is divided by the length of the sum of the user's vectors, which
    changes no list.

    Source: content-based filtering by nearest neighbours, Pazzani and Billsus 2007, section 10.4.
    """

    settings_class = ContentKNNSettings

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. One encoder or more, and nothing else."""
        encoders = encoders_in(kinds)
        if not encoders or len(encoders) < len(kinds):
            raise ConfigError(
                f"content_knn is built on encoders, at least one, and on nothing else; "
                f"needs = {[*kinds]}"
            )
        check_named("weights", self.settings.weights, encoders)
        if not any(self.settings.weights.get(name, 1) > 0 for name in encoders):
            raise ConfigError("content_knn: every encoder weighs 0; give one a weight above 0")

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> ContentKNNModel:
        """See `Algorithm.fit`.

        One job for each encoder, and one that finds the neighbours, exactly, in blocks: its cost is
        n_items * n_items with events * size. The driver holds the vectors and the neighbours.
        Raises EmptyDataError where no item with an event has a vector.
        """
        settings = self.settings
        weights = {name: settings.weights.get(name, 1.0) for name in needed}
        items, vectors = joined_vectors(data, {name: w for name, w in weights.items() if w > 0})
        is_cold = ~np.isin(items, data.vocabulary())
        if is_cold.all():
            raise EmptyDataError(
                f"content_knn: no item with an event before {data.cutoff:%Y-%m-%d} has a vector by "
                f"{[*weights]}: do the items have a description that these encoders read?"
            )
        arrays = {"vectors": vectors, "is_cold": is_cold}
        if settings.n_neighbours is not None:
            arrays |= neighbour_lists(data, items, vectors, is_cold, settings)
        return ContentKNNModel(settings, data.cutoff, items, arrays)


def joined_vectors(data: Dataset, weights: Mapping[str, float]) -> tuple[Array, Array]:
    """Return the items with a vector by one of the encoders, and their joined vectors.

    item_idx int32 (n,), ascending, and float32 (n, sum of sizes), of length 1. `weights` : encoder
    -> weight. An encoder that has no vector of an item adds zeros.
    """
    encoded = {name: encoded_items(data, name) for name in weights}
    items = np.unique(np.concatenate([one.item_idx for one in encoded.values()]))
    parts = [weights[name] * one.rows_of(items) for name, one in encoded.items()]
    vectors = unit_rows(np.concatenate(parts, axis=1, dtype=np.float32))
    has_content = vectors.any(axis=1)
    return items[has_content], vectors[has_content]


def neighbour_lists(
    data: Dataset, items: Array, vectors: Array, is_cold: Array, settings: ContentKNNSettings
) -> dict[str, Array]:
    """Return `start`, `neighbours` and `similarities` of `ContentKNNModel`. One job."""
    assert settings.n_neighbours is not None
    shared = topk.Shared(vectors)
    found = topk.neighbours(
        data.histories.sparkSession,
        items,
        MeanVectorScorer(HistoryWeights.sums(data.cutoff, None), None, items, shared, shared, None),
        micros(data.cutoff),
        settings.n_neighbours,
        allowed=items[~is_cold],
        with_itself=True,
    ).toArrow()
    listed, own = (
        local_index(items, found.column(name).to_numpy()) for name in ("item_idx", "neighbour_idx")
    )
    similarity = found.column("score").to_numpy()
    if settings.items == "cold":
        is_kept = is_cold[listed]
        listed, own, similarity = listed[is_kept], own[is_kept], similarity[is_kept]
    return lists_of(own, listed, similarity, len(items))
