"""Scores from lists of similar items: each item of a history speaks for those in its list."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recspark.data.blocks import Array, QueryBlock
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import (
    Contributions,
    contributions_of_lists,
    keys_of_lists,
)
from recspark.models.scoring.listed import ListedScores, sums_of_lists
from recspark.models.weights import HistoryWeights


@dataclass(frozen=True)
class SimilarItemsScorer:
    """Adds up the similar items of a history's items, each with the decayed weight of the item."""

    weights: HistoryWeights
    items: Array
    start: topk.Shared
    neighbours: topk.Shared
    similarities: topk.Shared

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.ListScorer`."""
        start, item, weight = self.weights.local(block.history, self.items)
        row = np.repeat(np.arange(len(block)), np.diff(start))
        lists = tuple(np.asarray(a.array) for a in (self.start, self.neighbours, self.similarities))
        return sums_of_lists(lists, row, item, weight, len(block), len(self.items))

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`. Item j adds its decayed weight times its similarity."""
        own = self.weights.local(block.history, self.items)
        similarities = np.asarray(self.similarities.array)
        return contributions_of_lists(self._keys, similarities, len(self.items), own, rows, items)

    @cached_property
    def _keys(self) -> Array:
        start, neighbours = np.asarray(self.start.array), np.asarray(self.neighbours.array)
        return keys_of_lists(start, neighbours, len(self.items))


def lists_of(item: Array, neighbour: Array, value: Array, n_items: int) -> dict[str, Array]:
    """Return `start`, `neighbours` and `similarities` of `Prod2VecModel`; values <= 0 are left out."""
    is_kept = value > 0
    item, neighbour, value = item[is_kept], neighbour[is_kept], value[is_kept]
    order = np.lexsort((neighbour, item))
    start = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=n_items))])
    return {
        "start": start.astype(np.int64),
        "neighbours": neighbour[order].astype(np.int32),
        "similarities": value[order].astype(np.float32),
    }
