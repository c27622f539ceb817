"""Reciprocal-rank fusion: an item is good if many retrievers rank it high."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.examples import rank_name
from recspark.data.feature_encoding import Encoding
from recspark.errors import ConfigError
from recspark.models.base import (
    NOTHING,
    Algorithm,
    ArraysRanker,
    FitOptions,
    Needed,
    PairBlock,
    Settings,
)
from recspark.models.kinds import Kind
from recspark.models.rankers.fusion import check_sources, sources_in

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RrfSettings(Settings):
    """Settings of `Rrf`."""

    k: float = Field(
        60.0,
        ge=0,
        description="ranks: the larger, the less the first ranks of a list are preferred to later "
        "ones. The paper",
        json_schema_extra={"tune": {"choices": [0, 5, 10, 20, 60, 120]}},
    )
    weights: dict[str, Weight] = Field(
        {},
        description="retriever of `needs` -> its weight; 1 for those that are not named, and 0 for a "
        "retriever that adds candidates only",
    )


class Rrf(Algorithm[RrfSettings]):
    """Score of a pair = sum of weight / (k + rank), over the retrievers that list the pair.

    Only ranks are read, so a retriever whose scores are rescaled in any monotone way changes
    nothing. Nothing is learned.

    Source: Cormack, Clarke & Büttcher 2009, "Reciprocal Rank Fusion outperforms Condorcet and
    individual Rank Learning Methods".
    """

    settings_class = RrfSettings
    learns = False

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At least one retriever, and weights of these only, not all 0."""
        check_sources("rrf", kinds, self.settings.weights)
        retrievers = [name for name, kind in kinds.items() if kind == "retriever"]
        if all(self.settings.weights.get(name) == 0 for name in retrievers):
            raise ConfigError(f"rrf: the weights of all of {retrievers} are 0: raise one")

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> RrfModel:
        """See `Algorithm.fit`. No job."""
        sources = sources_in(needed)
        weights = [self.settings.weights.get(name, 1.0) for name in sources]
        encoding = Encoding(tuple(rank_name(name) for name in sources), {})
        arrays = {"weights": np.array(weights, np.float64)}
        return RrfModel(self.settings, data.cutoff, encoding, arrays)


class RrfModel(ArraysRanker):
    """`weights` float64 (n_sources,), in the order of the numbers of `encoding`: the ranks."""

    settings: RrfSettings

    def pair_scorer(self) -> ReciprocalRanks:
        """See `RankerModel`."""
        return ReciprocalRanks(self.settings.k, self._arrays["weights"])


@dataclass(frozen=True)
class ReciprocalRanks:
    """Adds up the terms of the sources, one source after the other; a missing rank adds nothing."""

    k: float
    weights: Array  # float64 (n_sources,)

    def score(self, block: PairBlock) -> Array:
        """See `PairScorer`."""
        total = np.zeros(len(block.user_idx))
        for rank, weight in zip(block.numbers.T, self.weights, strict=True):  # rank (p,)
            total += np.nan_to_num(weight / (self.k + rank.astype(np.float64)))
        return total.astype(np.float32)
