"""Own items: recommend the items that the user acted on before, the most frequent and newest first.

In a shop, these are the items that the user buys again and again. Among items that the user bought
equally often, the one that is popular among all users comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field
from pyspark.sql import functions as F

from recspark.data.blocks import MICROS_PER_DAY, Array, QueryBlock, local_index, micros, where
from recspark.data.dataset import Dataset
from recspark.data.interactions import decayed_weights_of_vocabulary
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import Contributions
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
    popularity_weight: float = Field(
        0.001,
        ge=0,
        description="what decides among own items with equal or nearly equal counts: this number, "
        "times the popularity of the item among all users (1 = the most popular item), is added to "
        "the score of an own item; 0 = off, and equal scores go to the smaller item_idx. Source: "
        "bundled data, a trial outside the project",
        json_schema_extra={"tune": {"choices": [0.0, 0.001, 0.01, 0.1, 1.0]}},
    )
    popularity_half_life_days: HalfLifeDays = Field(
        7.0,
        description="days; in the popularity of an item, an event this old counts half; null = no "
        "decay. Source: bundled data, as in `popular`",
    )


class OwnItemsModel(ArraysModel):
    """A fitted `OwnItems`: the popularity of each item, as a share of the largest one.

    `popularity` float32 (n_items,), from 0 to 1. It is 0 for all items if nobody's events weigh
    anything.
    """

    settings: OwnItemsSettings

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        popularity = topk.Shared(self.arrays()["popularity"])
        return OwnItemsScorer(self.settings, micros(self.cutoff), self.items, popularity)


@dataclass(frozen=True)
class OwnItemsScorer:
    """Counts the orders of each item in the user's history, decayed, and adds its popularity.

    `as_of` : the time at which an order has age 0, in microseconds since 1970 UTC. `items` int32
    (n_items,), ascending: the vocabulary. `popularity` : see `OwnItemsModel`.
    """

    settings: OwnItemsSettings
    as_of: int
    items: Array
    popularity: topk.Shared

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.ListScorer`. Sums are computed in float64, from the oldest order to the newest.

        The popularity is added last, in float64 too, and the sum is rounded to float32 once.

        Example: a row has the orders (7, 8), (7) and (9, 9, 6). The weights of the orders are 0.81,
        0.9 and 1, so the counts are 1.71 for item 7, 0.81 for item 8, and 1 for the items 6 and 9.
        If item 9 is the most popular item of all (1), and the others have the popularity 0.5, the
        scores are 1.7105, 0.8105, 1.0005 for item 6 and 1.001 for item 9.
        """
        start, item, counts = self._counts(block)
        scores = (counts + self._rest(item)).astype(np.float32)
        return ListedScores(start, item, scores, len(self.items))

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`. The only item that speaks for a listed item is the item itself.

        It adds its count; the `rest` is what its popularity adds.
        """
        start, own_items, counts = self._counts(block)
        keys = np.repeat(np.arange(len(block)), np.diff(start)) * len(self.items) + own_items
        entry = np.searchsorted(keys, rows * len(self.items) + items)
        one_entry_each = np.arange(len(rows) + 1, dtype=np.int64)
        return Contributions(
            one_entry_each, items.astype(np.int32), counts[entry], self._rest(items)
        )

    def _rest(self, items: Array) -> Array:
        """Return what the popularity of local items adds to their scores, float64."""
        popularity = np.asarray(self.popularity.array)[items].astype(np.float64)
        return np.asarray(self.settings.popularity_weight * popularity)

    def _counts(self, block: QueryBlock) -> tuple[Array, Array, Array]:
        """Return the local items of each row, ascending, and their counts: (start, items, counts).

        Row r has the entries `start[r]:start[r + 1]`; `items` is int32, `counts` float64.
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
        counts = np.bincount(pair_of_entry, weight_of_order[order], len(pairs))  # in entry order
        row, item = np.divmod(pairs, n_items)
        start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(block)))])
        return start, item.astype(np.int32), counts


class OwnItems(Algorithm[OwnItemsSettings]):
    """Score of item i = count(i) + popularity_weight * popularity(i) / largest popularity.

    count(i) = sum over the user's orders with item i of decay^l * 0.5^(age / half-life). An order
    is a session of the user's history, and its age is that of its first event. l is the number of
    the user's orders after it, and decay is `order_decay`. Several events of an item in one order
    count once. Events that weigh 0 or less, or NaN, do not count, and an order without any other
    event is no order.

    popularity(i) = sum over all users' events on item i of weight * 0.5^(age / popularity
    half-life). Users with few orders have many items of equal counts, and their popularity orders
    these items. Where counts differ by more than `popularity_weight`, the larger count comes first.
    A score is a float32, so a difference of popularity below about 1e-7 * score / popularity_weight
    is lost: at the default .001, that is 1/10,000 of the largest popularity for the score 1, and
    1/500 for the score 20.

    The model lists only items that the user acted on. In mode novel, where these items are masked,
    it lists nothing.

    Source: counts of the user's own orders, decayed; cf. the personal frequency of Hu et al. 2020,
    "Modeling Personalized Item Frequency Information for Next-basket Recommendation" (TIFU-KNN).
    """

    settings_class = OwnItemsSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> OwnItemsModel:
        """See `Algorithm.fit`. One shuffle, of a sum per item; the driver holds a row per item."""
        items = data.vocabulary()
        positive_events = F.filter("history", lambda event: event["weight"] > 0)
        weights = decayed_weights_of_vocabulary(
            data.histories.select(positive_events.alias("history")),
            data.cutoff,
            self.settings.popularity_half_life_days,
            items,
        )
        popularity = weights / (weights.max() or 1.0)
        arrays = {"popularity": popularity.astype(np.float32)}
        return OwnItemsModel(self.settings, data.cutoff, items, arrays)
