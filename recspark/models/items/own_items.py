"""Own items: recommend the items that the user acted on before, the most frequent and newest first.

In a shop, these are the items that the user buys again and again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from recspark.data.blocks import MICROS_PER_DAY, Array, QueryBlock, local_index, micros, where
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.listed import ListedScores
from recspark.models.setting_types import HalfLifeDays


class OwnItemsSettings(Settings):
    """Settings of `OwnItems`. An order is a session of the user's history."""

    order_decay: float = Field(
        0.9,
        gt=0,
        le=1,
        description="weight of an order, per order of the user after it: 0.9 = the newest order "
        "counts 1, the one before it 0.9, the next 0.81; 1 = all orders count the same. Source: "
        "bundled data, exploration .9",
        json_schema_extra={"tune": {"low": 0.5, "high": 1.0}},
    )
    half_life_days: HalfLifeDays = Field(
        None, description="days; an order this old counts half; null = no decay by age"
    )


class OwnItemsModel(ArraysModel):
    """A fitted `OwnItems`. It has no arrays of its own: it knows the vocabulary and the settings."""

    settings: OwnItemsSettings

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        return OwnItemsScorer(self.settings, micros(self.cutoff), self.items)


@dataclass(frozen=True)
class OwnItemsScorer:
    """Counts the orders of each item in the user's history, decayed.

    `as_of` : the time at which an order has age 0, in microseconds since 1970 UTC. `items` int32
    (n_items,), ascending: the vocabulary.
    """

    settings: OwnItemsSettings
    as_of: int
    items: Array

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.ListScorer`. Sums are computed in float64, from the oldest order to the newest.

        Example: a row has the orders (7, 8), (7) and (9, 9). The weights of the orders are 0.81,
        0.9 and 1, so the scores are 1.71 for item 7, 0.81 for item 8 and 1 for item 9.
        """
        settings, n_items = self.settings, len(self.items)
        history = where(block.history, block.history.weight > 0)  # False for NaN (no rating)
        is_first_of_order = history.session_starts
        order = np.cumsum(is_first_of_order) - 1  # (n_events,), counted over all rows
        # Of each order: its row, the number of orders after it in the row, and its weight.
        row_of_order = history.rows[is_first_of_order]
        last_order_of_row = np.cumsum(np.bincount(row_of_order, minlength=len(block))) - 1
        n_later_orders = last_order_of_row[row_of_order] - np.arange(len(row_of_order))
        weight_of_order = settings.order_decay ** n_later_orders.astype(np.float64)
        if settings.half_life_days is not None:
            age_days = (self.as_of - history.event_at[is_first_of_order]) / MICROS_PER_DAY
            weight_of_order *= np.exp2(-age_days / settings.half_life_days)
        # One entry per order and item, by order: the entries of a row are in time order.
        local = local_index(self.items, history.item_idx)
        is_in_vocabulary = local >= 0
        entries = np.unique(order[is_in_vocabulary] * n_items + local[is_in_vocabulary])
        order, local = np.divmod(entries, n_items)
        pairs, pair_of_entry = np.unique(row_of_order[order] * n_items + local, return_inverse=True)
        scores = np.bincount(pair_of_entry, weight_of_order[order], len(pairs))  # in entry order
        row, item = np.divmod(pairs, n_items)
        start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(block)))])
        return ListedScores(start, item.astype(np.int32), scores.astype(np.float32), n_items)


class OwnItems(Algorithm[OwnItemsSettings]):
    """Score of item i = sum over the user's orders with item i of decay^l * 0.5^(age / half-life).

    An order is a session of the user's history, and its age is that of its first event. l is the
    number of the user's orders after it, and decay is `order_decay`. Several events of an item in
    one order count once. Events that weigh 0 or less, or NaN, do not count, and an order without
    any other event is no order.

    The model lists only items that the user acted on. In mode novel, where these items are masked,
    it lists nothing.

    Source: counts of the user's own orders, decayed; cf. the personal frequency of Hu et al. 2020,
    "Modeling Personalized Item Frequency Information for Next-basket Recommendation" (TIFU-KNN).
    """

    settings_class = OwnItemsSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> OwnItemsModel:
        """See `Algorithm.fit`. Reads the vocabulary only: one job, 4 bytes per item on the driver."""
        return OwnItemsModel(self.settings, data.cutoff, data.vocabulary(), {})
