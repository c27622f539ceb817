"""Models that store item factors only: every user is folded in at scoring.

Folding in means to compute the user's factor from the user's history, with the item factors fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np

from recspark.data.blocks import Array, QueryBlock
from recspark.engines.als_kernels import fold_in, fold_in_parts
from recspark.engines.als_objective import Objective, gramian
from recspark.models.base import RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import Contributions, entries_of_pairs
from recspark.models.weights import HistoryWeights


class FactorSettings(Protocol):
    """What fold-in needs from the settings of a `FactorModel`."""

    @property
    def half_life_days(self) -> float | None:
        """An event this many days old counts half; None = no decay."""

    @property
    def objective(self) -> Objective:
        """The objective that a user's factor minimises when the item factors are fixed."""


class FactorModel(RetrieverModel):
    """Fitted item factors: `factors` float32 (n_items, rank). `settings` are `FactorSettings`."""

    def __init__(self, settings: Any, cutoff: datetime, items: Array, factors: Array) -> None:
        super().__init__(settings, cutoff, items)
        self.factors = factors
        self._settings: FactorSettings = settings

    @property
    def rates(self) -> bool:
        """See `RetrieverModel`. True if weights themselves are fitted, and they do not decay."""
        settings = self._settings
        return settings.objective.feedback == "explicit" and settings.half_life_days is None

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        return FactorScorer(
            HistoryWeights.sums(
                self.cutoff,
                self._settings.half_life_days,
                ratings=not self._settings.objective.implicit,
            ),
            self.items,
            topk.Shared(self.factors),
            self._settings.objective,
        )

    def item_vectors(self) -> Array:
        """See `RetrieverModel`."""
        return self.factors

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`."""
        return {"factors": self.factors}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        return cls(settings, cutoff, items, arrays["factors"])


@dataclass(frozen=True)
class FactorScorer:
    """Folds in the users of a block and multiplies their factors with the item factors."""

    weights: HistoryWeights
    items: Array
    factors: topk.Shared
    objective: Objective

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        start, items, weights = self.weights.local(block.history, self.items)
        factors = np.asarray(self.factors.array)
        users = fold_in(start, items, weights, factors, self.objective, self._gram)
        return topk.DotScores(users, factors, None, np.diff(start) > 0)

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`. Hu, Koren and Volinsky 2008, section 5: see `fold_in_parts`."""
        start, own_items, weights = self.weights.local(block.history, self.items)
        start_of_pairs, entries = entries_of_pairs(start, rows)
        values = fold_in_parts(
            start,
            own_items,
            weights,
            np.asarray(self.factors.array),
            self.objective,
            rows,
            items,
            self._gram,
        )
        return Contributions(start_of_pairs, own_items[entries], values, np.zeros(len(rows)))

    @cached_property
    def _gram(self) -> Array:
        """The Gramian of the item factors; each worker computes it once."""
        return gramian(np.asarray(self.factors.array))
