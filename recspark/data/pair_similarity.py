"""How like an item is to the items that a user acted on last, by vectors of items.

A model that has a vector for each item (an encoder, or a model such as als or item2vec) gives a pair
of a user and an item three features: the largest, the mean and the decayed sum of the cosines
between the item and the user's last items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from recspark.data.blocks import MICROS_PER_DAY, Array, Histories, local_index, where

LAST_ITEMS = 20  # different items of the user, the newest ones
HALF_LIFE_DAYS = 30.0  # in the decayed sum, an item acted on this many days ago counts half
_VALUES_AT_ONCE = 1 << 22  # numbers of vectors that one step holds


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of length 1, by item: `items` int32 (n_items,), ascending; `vectors` float32
    (n_items, size).
    """

    items: Array
    vectors: Array

    @classmethod
    def of(cls, items: Array, vectors: Array) -> Self:
        """Return vectors of any length, in any order of the items, as vectors of length 1.

        A vector of zeros has no direction, so its item is left out.
        """
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        order = np.argsort(items, kind="stable")
        order = order[lengths[order] > 0]
        scaled = vectors[order] / lengths[order, None]
        return cls(items[order].astype(np.int32), scaled.astype(np.float32))


def similarity_names(models: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the features that the vectors of `models` give, model by model."""
    return tuple(
        f"{model}_similar_{statistic}" for model in models for statistic in ("max", "mean", "sum")
    )


def similarities(
    row: Array, item_idx: Array, history: Histories, as_of: int, of_model: ItemVectors
) -> tuple[Array, Array, Array]:
    """Return the largest and the mean cosine, and the decayed sum of cosines, each float64 (p,).

    Parameters
    ----------
    row, item_idx : int64 (p,) and int32 (p,): the pairs; `row` is the row of `history`
    history : events before `as_of`, oldest first within a row
    as_of : the cutoff, in microseconds since 1970 UTC
    of_model : the vectors

    The item of a pair is compared with the last `LAST_ITEMS` different items of the user, those
    that weigh more than 0. The item itself is not among them: what the user did with it is told by
    other features. NaN where the item, or all of those items, have no vector. In the sum, a cosine
    counts 0.5 ^ (age of the last event with the item / `HALF_LIFE_DAYS`).

    Cost: p × LAST_ITEMS × size multiplications; memory a few `_VALUES_AT_ONCE`.
    """
    largest, mean, decayed_sum = (np.full(len(row), np.nan) for _ in range(3))
    if len(of_model.items) == 0:
        return largest, mean, decayed_sum
    last_items, age_days = _last_items(history, as_of)
    weight = np.exp2(-age_days / HALF_LIFE_DAYS)
    local_of_last = local_index(of_model.items, last_items.ravel()).reshape(last_items.shape)
    local = local_index(of_model.items, item_idx)
    n_pairs = max(1, _VALUES_AT_ONCE // (LAST_ITEMS * max(of_model.vectors.shape[1], 1)))
    for part in _parts(np.flatnonzero(local >= 0), n_pairs):
        rows = row[part]
        others = local_of_last[rows]
        is_other = (others >= 0) & (last_items[rows] != item_idx[part][:, None])
        cosines = np.einsum(
            "ps,pns->pn", of_model.vectors[local[part]], of_model.vectors[others], dtype=np.float64
        )
        n_others = is_other.sum(axis=1)
        known = part[n_others > 0]
        is_known = n_others > 0
        cosines, is_other = cosines[is_known], is_other[is_known]
        kept = np.where(is_other, cosines, 0.0)
        largest[known] = np.where(is_other, cosines, -np.inf).max(axis=1)
        mean[known] = kept.sum(axis=1) / n_others[is_known]
        decayed_sum[known] = (kept * weight[rows[is_known]]).sum(axis=1)
    return largest, mean, decayed_sum


def _last_items(history: Histories, as_of: int) -> tuple[Array, Array]:
    """Return the last different items of each row, int32 (n, LAST_ITEMS), newest first, and the age
    of the last event with each, in days, float64 (n, LAST_ITEMS).

    Where a row has fewer items, the rest is -1 with an infinite age.
    """
    events = where(history, history.weight > 0)
    n_rows = len(events.start) - 1
    items = np.full((n_rows, LAST_ITEMS), -1, np.int32)
    age_days = np.full((n_rows, LAST_ITEMS), np.inf)
    # The last event of each row and item: sorted stably by both, the last of its run.
    order = np.lexsort((events.item_idx, events.rows))
    key = (events.rows[order].astype(np.int64) << 32) | events.item_idx[order].astype(np.int64)
    is_last = np.ones(len(order), bool)
    is_last[:-1] = key[1:] != key[:-1]
    newest_first = np.sort(order[is_last])[::-1]  # events lie by row, oldest first
    rows = events.rows[newest_first]  # descending
    place = np.arange(len(rows)) - np.searchsorted(-rows, -rows, side="left")
    kept = place < LAST_ITEMS
    rows, place, chosen = rows[kept], place[kept], newest_first[kept]
    items[rows, place] = events.item_idx[chosen]
    age_days[rows, place] = (as_of - events.event_at[chosen]) / MICROS_PER_DAY
    return items, age_days


def _parts(indices: Array, length: int) -> Iterator[Array]:
    for begin in range(0, len(indices), length):
        yield indices[begin : begin + length]
