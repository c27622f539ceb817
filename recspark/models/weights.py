"""How a model weighs a history: the same at fit and at scoring."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

import numpy as np

from recspark.data.blocks import Array, Histories, Ragged, micros, weigh
from recspark.models.scoring import topk


@dataclass(frozen=True)
class HistoryWeights:
    """How a model weighs a history: its own decay, at fit and at scoring alike."""

    as_of: int  # microseconds since 1970 UTC
    half_life_days: float | None
    weighting: Literal["last", "sum", "binary"]
    ratings: bool = False  # weights are what is fitted, so those of 0 and below take part

    @classmethod
    def sums(cls, cutoff: datetime, half_life_days: float | None, *, ratings: bool = False) -> Self:
        """Return those that add an item's events up, aged to `cutoff`."""
        return cls(micros(cutoff), half_life_days, "sum", ratings)

    def __call__(self, history: Histories) -> tuple[Ragged, Array]:
        """Return each row's distinct items, ascending, and their weights; see `blocks.weigh`."""
        return weigh(
            history, self.as_of, half_life_days=self.half_life_days, combine=self.weighting
        )

    def local(self, history: Histories, items: Array) -> tuple[Array, Array, Array]:
        """Return (start, local item int32, weight float32) of `items` that weigh above 0, or of all
        that have `ratings`.
        """
        found, weights = self(history)
        at = topk.local_index(items, found.values)
        kept = (at >= 0) & ((weights > 0) | self.ratings)
        before = np.concatenate([[0], np.cumsum(kept)])
        return before[found.start], at[kept].astype(np.int32), weights[kept]
