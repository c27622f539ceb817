"""The items that users acted on most, with recent events counting more.

All users get the same list, except that a user's seen items are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Self

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array, QueryBlock
from recspark.data.dataset import Dataset
from recspark.data.interactions import decayed_weights_of_vocabulary
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.models.setting_types import HalfLifeDays


class PopularSettings(Settings):
    """Settings of `Popular`."""

    half_life_days: HalfLifeDays = Field(
        7.0,
        description="days; an event this old counts half; null = no decay. Source: bundled data",
    )


class PopularModel(RetrieverModel):
    """The fitted scores: `weight` float32 (n_items,), an item's decayed event weights, summed."""

    def __init__(self, settings: Settings, cutoff: datetime, items: Array, weight: Array) -> None:
        super().__init__(settings, cutoff, items)
        self.weight = weight

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        return PopularScorer(self.weight)

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`."""
        return {"weight": self.weight}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        return cls(settings, cutoff, items, arrays["weight"])


@dataclass(frozen=True)
class PopularScorer:
    """Gives every user the same scores: item biases, and vectors of length 0."""

    weight: Array

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        n_rows, n_items = len(block), len(self.weight)
        return topk.DotScores(
            np.zeros((n_rows, 0), np.float32),
            np.zeros((n_items, 0), np.float32),
            self.weight,
            np.ones(n_rows, bool),
        )


class Popular(Algorithm[PopularSettings]):
    """Score an item by the sum of its decayed event weights, over all users."""

    settings_class = PopularSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> PopularModel:
        """See `Algorithm.fit`. One shuffle, of a sum per item; the driver holds a row per item."""
        items = data.vocabulary()
        weight = decayed_weights_of_vocabulary(
            data.histories, data.cutoff, self.settings.half_life_days, items
        )
        return PopularModel(self.settings, data.cutoff, items, weight.astype(np.float32))
