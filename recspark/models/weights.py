"""How the events of a history become weights of items. Fit and scoring use the same rule."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

import numpy as np

from recspark.data.blocks import Array, Histories, Ragged, local_index, micros, weigh


@dataclass(frozen=True)
class HistoryWeights:
    """How a model turns the events of a history into weights of items, at fit and at scoring."""

    as_of: int  # the time at which an event has age 0, in microseconds since 1970 UTC
    half_life_days: float | None  # None = no decay
    weighting: Literal["last", "sum", "binary"]  # the parameter `combine` of `blocks.weigh`
    ratings: bool = False  # True: the model fits the weights themselves, so those <= 0 count too

    @classmethod
    def sums(cls, cutoff: datetime, half_life_days: float | None, *, ratings: bool = False) -> Self:
        """Return the rule that sums an item's event weights, decayed by their age at `cutoff`."""
        return cls(micros(cutoff), half_life_days, "sum", ratings)

    def __call__(self, history: Histories) -> tuple[Ragged, Array]:
        """Return each row's distinct items, ascending, and their weights; see `blocks.weigh`."""
        return weigh(
            history, self.as_of, half_life_days=self.half_life_days, combine=self.weighting
        )

    def local(self, history: Histories, items: Array) -> tuple[Array, Array, Array]:
        """Return the weighted items of each row, as local indices: (start, local, weight).

        Row r of `history` has the local items `local[start[r]:start[r + 1]]`, int32, ascending, and
        their weights, float32. `items` int32 (n_items,) ascending is the vocabulary: items outside
        it are left out. Items that weigh 0 or less are left out too, except with `ratings`.
        """
        items_of_rows, weights = self(history)
        local = local_index(items, items_of_rows.values)
        is_kept = (local >= 0) & ((weights > 0) | self.ratings)
        n_kept_before = np.concatenate([[0], np.cumsum(is_kept)])
        return n_kept_before[items_of_rows.start], local[is_kept].astype(np.int32), weights[is_kept]
