"""What most users acted on lately: the same list for everybody, but for what each has seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Self

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array, QueryBlock
from recspark.data.dataset import Dataset
from recspark.data.interactions import decayed_item_weights
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
    """`weight` float32 (n_items,): decayed event weights summed over all users."""

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
    """The same scores for every user: a bias and no vectors."""

    weight: Array

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        n, m = len(block), len(self.weight)
        return topk.DotScores(
            np.zeros((n, 0), np.float32),
            np.zeros((m, 0), np.float32),
            self.weight,
            np.ones(n, bool),
        )


class Popular(Algorithm[PopularSettings]):
    """Order items by the sum of their decayed event weights."""

    settings_class = PopularSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> PopularModel:
        """See `Algorithm.fit`. One shuffle of item-sized sums; the driver holds a row an item."""
        items = data.vocabulary()
        half_life = self.settings.half_life_days
        sums = decayed_item_weights(data.histories, data.cutoff, half_life).toArrow()
        weight = np.zeros(len(items), np.float32)
        at = topk.local_index(items, sums.column("item_idx").to_numpy())
        weight[at[at >= 0]] = sums.column("weight").to_numpy()[at >= 0]
        return PopularModel(self.settings, data.cutoff, items, weight)
