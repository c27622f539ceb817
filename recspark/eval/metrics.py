"""The metrics of lists: each is one small function over a block of lists.

`docs/metrics.md` computes every metric by hand. To add a metric, write the function, name it in
`TRUTH_METRICS` or `LIST_METRICS`, add its row to the hand-worked table in
`tests/golden/test_golden_metrics.py`, and add its line to `docs/metrics.md`.

The examples below share three users and six items; `docs/metrics.md` has the same examples as
fractions.

>>> block = golden_block()
>>> block.items  # user 0 got three items, user 1 two, user 2 none
array([[ 0,  2,  1],
       [ 3,  4, -1],
       [-1, -1, -1]], dtype=int32)
>>> block.hits.astype(int)
array([[1, 0, 1],
       [0, 1, 0],
       [0, 0, 0]])
>>> block.n_truth
array([2, 4, 1])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from recspark.data.blocks import Array, local_index
from recspark.data.shared import Shared

NOTHING = -1  # in `Block.items`: no item at this rank, or an item that is not in the catalogue


@dataclass(frozen=True)
class Catalogue:
    """The items that a list may hold, as of the cutoff. There is at least one item.

    Every worker has a copy of `items` and `n_users`, and of `vectors` unless they are a
    memory-mapped file, whose pages the workers of a machine share: see `Shared`.

    Parameters
    ----------
    items : item_idx int32 (n_items,), ascending; a `Block` refers to an item by its position here
    n_users : int64 (n_items,): number of users who acted on the item before the cutoff, at least 1
    vectors : float32 (n_items, dims), each of length 1 or 0; None = diversity is not defined
    """

    items: Array
    n_users: Array
    vectors: Array | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __reduce__(self) -> tuple[Any, ...]:
        vectors = None if self.vectors is None else Shared(self.vectors)
        return _with_shared_vectors, (self.items, self.n_users, vectors)

    def positions(self, item_idx: Array) -> Array:
        """Return the position of each item in `items`, int32; `NOTHING` for any other item.

        >>> Catalogue(np.array([3, 7]), np.array([1, 1])).positions(np.array([7, 5, 3]))
        array([ 1, -1,  0], dtype=int32)
        """
        return local_index(self.items, item_idx).astype(np.int32)

    @cached_property
    def information(self) -> Array:
        """-log2 of each item's share of all user-item pairs, in bits; float64 (n_items,)."""
        return -np.log2(self.n_users / self.n_users.sum())

    @cached_property
    def popularity_rank(self) -> Array:
        """Rank of each item by number of users, divided by n_items; float64 (n_items,) in (0, 1].

        The least popular item has the smallest value, and 1 is the most popular item. Items with
        equally many users share their average rank.
        """
        _, group, group_size = np.unique(self.n_users, return_inverse=True, return_counts=True)
        average_rank = np.cumsum(group_size) - (group_size - 1) / 2  # of each group of equal items
        return average_rank[group] / len(self)


def _with_shared_vectors(items: Array, n_users: Array, vectors: Shared | None) -> Catalogue:
    return Catalogue(items, n_users, None if vectors is None else vectors.array)


@dataclass(frozen=True)
class Block:
    """Lists with room for equally many items, best first, beside the truth of their users.

    A user's truth is the items that the user acted on in the horizon.

    Parameters
    ----------
    items : int32 (n, room): position of the item in the catalogue; `NOTHING` where the list has no
        item, or one that is not in the catalogue. A list has no item twice.
    hits : bool (n, room): whether the item is in the truth
    n_truth : int64 (n,): number of items in the user's truth, at least 1
    catalogue : the catalogue that `items` refers to
    """

    items: Array
    hits: Array
    n_truth: Array
    catalogue: Catalogue

    @classmethod
    def of(
        cls,
        lists: Sequence[Sequence[int]],
        truths: Sequence[Collection[int]],
        catalogue: Catalogue,
    ) -> Block:
        """Return the block of lists and truths, which hold `item_idx`; for examples and tests."""
        room = max(len(listed) for listed in lists)
        items = np.full((len(lists), room), NOTHING, np.int32)
        hits = np.zeros((len(lists), room), bool)
        for row, (listed, truth) in enumerate(zip(lists, truths)):
            items[row, : len(listed)] = catalogue.positions(np.array(listed, np.int32))
            hits[row, : len(listed)] = [item in truth for item in listed]
        return cls(items, hits, np.array([len(truth) for truth in truths]), catalogue)


# --- metrics against the truth: every user of the population counts; a user without a list counts 0


def recall(block: Block, k: int) -> Array:
    """Return hits / |truth|, float64 (n,); in [0, 1], and below 1 wherever |truth| > k.

    This is the definition of Dacrema et al. 2021, RecBole and BARS.

    >>> recall(golden_block(), 3).tolist() == [2 / 2, 1 / 4, 0]
    True
    """
    return block.hits[:, :k].sum(axis=1) / block.n_truth


def recall_capped(block: Block, k: int) -> Array:
    """Return hits / min(k, |truth|); in [0, 1]. Every list can reach 1.

    This is the "Recall@k" of Liang et al. 2018 (Mult-VAE), EASE and iALS revisited.

    >>> recall_capped(golden_block(), 3).tolist() == [2 / 2, 1 / 3, 0]
    True
    """
    return block.hits[:, :k].sum(axis=1) / np.minimum(block.n_truth, k)


def precision(block: Block, k: int) -> Array:
    """Return hits / k; in [0, 1]. The divisor is k even where the list is shorter than k.

    >>> precision(golden_block(), 3).tolist() == [2 / 3, 1 / 3, 0]
    True
    """
    return block.hits[:, :k].sum(axis=1) / k


def ndcg(block: Block, k: int) -> Array:
    """Return the sum over hits of 1 / log2(rank + 1), divided by the sum of the best possible list.

    Gains are binary. The best possible list has min(k, |truth|) hits at the top. In [0, 1].
    Source: Järvelin & Kekäläinen 2002, with the discount log2(rank + 1).

    >>> third = 1 / np.log2(3)
    >>> by_hand = [(1 + 1 / 2) / (1 + third), third / (1 + third + 1 / 2), 0]
    >>> np.allclose(ndcg(golden_block(), 3), by_hand)
    True
    """
    discount = 1 / np.log2(np.arange(2, k + 2))
    best = np.cumsum(discount)[np.minimum(block.n_truth, k) - 1]
    hits = block.hits[:, :k]
    return (hits * discount[: hits.shape[1]]).sum(axis=1) / best


def average_precision(block: Block, k: int) -> Array:
    """Return the sum over hits of the precision at their rank, divided by min(k, |truth|).

    In [0, 1]; 1 only where the list begins with min(k, |truth|) hits. The mean over users is MAP.

    >>> np.allclose(average_precision(golden_block(), 3), [(1 / 1 + 2 / 3) / 2, (1 / 2) / 3, 0])
    True
    """
    hits = block.hits[:, :k]
    precision_at_rank = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (hits * precision_at_rank).sum(axis=1) / np.minimum(block.n_truth, k)


def reciprocal_rank(block: Block, k: int) -> Array:
    """Return 1 / rank of the first hit, 0 without a hit; in [0, 1]. The mean over users is MRR.

    >>> reciprocal_rank(golden_block(), 3).tolist() == [1, 1 / 2, 0]
    True
    """
    hits = block.hits[:, :k]
    return (hits / np.arange(1, hits.shape[1] + 1)).max(axis=1, initial=0)


def hit_rate(block: Block, k: int) -> Array:
    """Return 1 where the list has a hit, else 0.

    >>> hit_rate(golden_block(), 3)
    array([1., 1., 0.])
    """
    return block.hits[:, :k].any(axis=1).astype(np.float64)


# --- metrics of the list itself: NaN where not defined, and that user is left out of the mean ----


def novelty(block: Block, k: int) -> Array:
    """Return the mean over listed items of -log2(item's share of the user-item pairs).

    The pairs are those before the cutoff. The unit is bits; at least 0. NaN for an empty list.
    Source: Castells, Vargas & Wang 2011, inverse popularity on a log scale.

    >>> by_hand = [(1 + 4 + 2) / 3, (4 + 4) / 2, np.nan]
    >>> np.allclose(novelty(golden_block(), 3), by_hand, equal_nan=True)
    True
    """
    return _mean_of_items(block, k, block.catalogue.information)


def popularity_bias(block: Block, k: int) -> Array:
    """Return the mean over listed items of the popularity rank as a share of the catalogue.

    In (0, 1]; 1 is the most popular item. Items with equally many users share their average rank.
    NaN for an empty list.
    Source: Ekstrand & Mahant 2017, the mean popularity rank.

    >>> by_hand = [3 / 4, 5 / 12, np.nan]
    >>> np.allclose(popularity_bias(golden_block(), 3), by_hand, equal_nan=True)
    True
    """
    return _mean_of_items(block, k, block.catalogue.popularity_rank)


def intra_list_diversity(block: Block, k: int) -> Array:
    """Return 1 - the mean cosine between the vectors of two listed items; in [0, 2].

    The mean is over all pairs of listed items. NaN for a list of fewer than two items, and
    everywhere where the catalogue has no vectors. A vector of length 0 has cosine 0 to every other
    vector. With unit vectors v, the sum of the cosines over pairs is (|sum of v|² - sum of |v|²) /
    2, so that no pair has to be formed.
    Source: Ziegler et al. 2005 (intra-list similarity); as the mean distance of two listed items,
    Zhang & Hurley 2008.

    >>> by_hand = [2 / 3, 2 / 5, np.nan]
    >>> np.allclose(intra_list_diversity(golden_block(), 3), by_hand, equal_nan=True)
    True
    """
    items = block.items[:, :k]
    vectors = block.catalogue.vectors
    if vectors is None:
        return np.full(len(items), np.nan)
    vector_sum = np.zeros((len(items), vectors.shape[1]))  # (n, dims)
    square_sum = np.zeros(len(items))
    # One rank after the other: how lists are grouped into blocks cannot change the sum.
    for rank in range(items.shape[1]):
        is_listed = (items[:, rank] != NOTHING).astype(np.float64)
        vector = vectors[items[:, rank]] * is_listed[:, None]
        vector_sum += vector
        square_sum += (vector * vector).sum(axis=1)
    n_listed = (items != NOTHING).sum(axis=1)
    n_pairs = n_listed * (n_listed - 1)  # each pair counts twice, here and in `cosine_sum`
    cosine_sum = (vector_sum * vector_sum).sum(axis=1) - square_sum
    return 1 - np.divide(cosine_sum, n_pairs, out=np.full(len(n_listed), np.nan), where=n_pairs > 0)


# --- metrics of all lists together --------------------------------------------------------------


def coverage(listed: Array) -> float:
    """Return the share of the catalogue's items that are in at least one list; in [0, 1].

    `listed` is bool (n_items,): whether the item is in some list.

    >>> coverage(np.array([True, True, True, True, True, False])) == 5 / 6
    True
    """
    return float(listed.mean())


def top20_share(n_lists: Array, n_items: Array) -> float:
    """Return the share of all places that the 20 most listed items hold; in [0, 1].

    `n_lists` int64 (m,), distinct, and `n_items` int64 (m,): `n_items[j]` items are in `n_lists[j]`
    lists each. Items that are in no list need not be counted. NaN without a list.

    >>> top20_share(np.array([3, 1]), np.array([10, 90])) == (10 * 3 + 10 * 1) / 120
    True
    """
    order = np.argsort(-n_lists)
    n_before = np.cumsum(n_items[order]) - n_items[order]
    n_taken = np.clip(20 - n_before, 0, n_items[order])
    return _share(float((n_taken * n_lists[order]).sum()), float((n_items * n_lists).sum()))


def gini(n_lists: Array, n_items: Array, n_catalogue: int) -> float:
    """Return the Gini index of the numbers of lists that hold each item; in [0, 1).

    0 = all items of the catalogue are in equally many lists. With the numbers in ascending order,
    x_1, ... x_n, it is sum of (2 i - n - 1) x_i, divided by n times the sum of x_i. `n_lists` and
    `n_items` : as for `top20_share`; the other items of the `n_catalogue` are in no list. NaN
    without a list. Source: as a metric of recommendations, Fleder & Hosanagar 2009.

    >>> float(gini(np.array([1, 2, 3]), np.array([1, 1, 1]), 4)) == 5 / 12
    True
    >>> gini(np.array([7]), np.array([4]), 4)
    0.0
    """
    order = np.argsort(n_lists)
    x, n = n_lists[order].astype(np.float64), n_items[order].astype(np.float64)
    n_total = max(float(n_catalogue), float(n.sum()))
    last = n_total - n.sum() + np.cumsum(n)  # the last i of the items in x lists each
    sum_of_ranks = n * (2 * last - n + 1) / 2
    weighted = (x * (2 * sum_of_ranks - n * (n_total + 1))).sum()
    return _share(float(weighted), n_total * float((x * n).sum()))


def most_listed_share(n_lists: Array, n_all_lists: int) -> float:
    """Return the share of lists that hold the most listed item; in [0, 1]. NaN without a list.

    >>> most_listed_share(np.array([3, 1]), 4)
    0.75
    """
    return _share(float(n_lists.max(initial=0)), n_all_lists)


MetricFunction = Callable[[Block, int], Array]

TRUTH_METRICS: dict[str, MetricFunction] = {
    "ndcg": ndcg,
    "recall": recall,
    "recall_capped": recall_capped,
    "precision": precision,
    "map": average_precision,
    "mrr": reciprocal_rank,
    "hit_rate": hit_rate,
}
LIST_METRICS: dict[str, MetricFunction] = {
    "novelty": novelty,
    "intra_list_diversity": intra_list_diversity,
    "popularity_bias": popularity_bias,
}


def golden_block() -> Block:
    """Return the block of the three users of `docs/metrics.md`, for the examples in this module."""
    catalogue = Catalogue(
        items=np.arange(6, dtype=np.int32),
        n_users=np.array([8, 4, 1, 1, 1, 1]),
        vectors=np.array([[1, 0], [0, 1], [1, 0], [1, 0], [0.6, 0.8], [0, 1]], np.float32),
    )
    return Block.of([[0, 2, 1], [3, 4], []], [{0, 1}, {4, 0, 1, 2}, {5}], catalogue)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _mean_of_items(block: Block, k: int, value_of_item: Array) -> Array:
    # The mean of `value_of_item`, (n_items,), over the first k items of each list; NaN without
    # items.
    items = block.items[:, :k]
    is_listed = items != NOTHING
    total = np.where(is_listed, value_of_item[items], 0.0).sum(axis=1)
    n_listed = is_listed.sum(axis=1)
    return np.divide(total, n_listed, out=np.full(len(n_listed), np.nan), where=n_listed > 0)
