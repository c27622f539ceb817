"""Greedy choices among the items of a user's pool, compiled: one plain loop per user.

A pool is given as flat arrays: user u has the entries `start[u]:start[u + 1]`, in the order of the
pool, and `item` (p,) holds the position of each entry's item in the catalogue. What one user gets
depends on no other user, and ties go to the entry that comes first in the pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled_in_order

# Two values that differ by less are a tie: they may differ by the rounding of their sums alone.
TIE = 1e-12
# With this share of the user's own shares, no category of the user has a share of 0 in a list
# (Steck 2018, equation 5).
SMOOTHING = 0.01


@dataclass(frozen=True)
class Similarity:
    """How similar two items are, in one of two ways.

    With `vectors` float32 (n_items, size), size > 0: the dot product of the vectors, which have
    length 1 or 0. Otherwise by sets: item i has the codes `codes[start[i]:start[i + 1]]`, ascending
    and distinct, a code weighs `weights[code]`, and the similarity of two items is the weight of
    their common codes, divided by the weight of all codes of either (weighted Jaccard); 0 where
    that is 0.
    """

    vectors: Array
    start: Array
    codes: Array
    weights: Array

    @classmethod
    def of_vectors(cls, vectors: Array) -> Similarity:
        """Return the cosine of `vectors` (n_items, size); a row of zeros is similar to nothing."""
        length = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        unit = (vectors / np.where(length > 0, length, 1)).astype(np.float32)
        no_codes = np.zeros(len(vectors) + 1, np.int64)
        return cls(unit, no_codes, np.zeros(0, np.int32), np.zeros(0))

    @classmethod
    def of_sets(cls, row: Array, code: Array, weights: Array, n_items: int) -> Similarity:
        """Return the weighted Jaccard of sets: item `row[j]` has the code `code[j]`, in any order;
        a code that an item has twice counts once.
        """
        pairs = np.unique(np.stack([row, code], axis=1).astype(np.int64), axis=0)
        start = np.searchsorted(pairs[:, 0], np.arange(n_items + 1))
        no_vectors = np.zeros((n_items, 0), np.float32)
        return cls(
            no_vectors, start.astype(np.int64), pairs[:, 1].astype(np.int32), weights.astype(float)
        )

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """The arrays, in the order in which the kernels take them."""
        return self.vectors, self.start, self.codes, self.weights


def capped(
    start: Array, item: Array, similar: Similarity, at_most: int, least: float, k: int
) -> Array:
    """Return whether each entry is kept, bool (p,).

    An entry is kept where fewer than `at_most` entries that were kept before it have a similarity
    of at least `least` to it. Of each user, at most the first k such entries are kept.
    """
    return np.asarray(_capped(start, item, *similar.arrays, at_most, least, k))


def diverse(
    start: Array, item: Array, similar: Similarity, relevance: float, pool: int, k: int
) -> Array:
    """Return the entries in the order of maximal marginal relevance, of each user at most k.

    The result holds positions of entries, by user, then in the new order. The next entry of a user
    is the one with the largest relevance × (1 - place / pool) - (1 - relevance) × (its similarity to
    the most similar entry before it); place counts from 0 in the pool. Cost per user: k times the
    length of the pool similarities.
    """
    order = _diverse(start, item, *similar.arrays, relevance, pool, k)
    return np.asarray(order[order >= 0])


def calibrated(
    start: Array,
    code: Array,
    share_start: Array,
    share_code: Array,
    share: Array,
    weight: float,
    pool: int,
    k: int,
) -> Array:
    """Return the entries in the order of the greedy calibration, of each user at most k.

    Parameters
    ----------
    start : of the pools
    code : int32 (p,), the category of each entry, -1 = none
    share_start, share_code, share : the categories of user u and their shares (sum 1) are
        `share_start[u]:share_start[u + 1]` of the two others; a user without any keeps the order
    weight : of the calibration, in [0, 1]
    pool : place p of the pool has the relevance 1 - p / pool

    The next entry is the one with the largest (1 - weight) × relevance - weight × KL(share || share
    in the list with it), smoothed by `SMOOTHING`.
    """
    order = _calibrated(start, code, share_start, share_code, share, weight, pool, k)
    return np.asarray(order[order >= 0])


@compiled_in_order
def _similarity(
    i: int, j: int, vectors: Array, start: Array, codes: Array, weights: Array
) -> float:
    if vectors.shape[1] > 0:
        cosine = 0.0
        for d in range(vectors.shape[1]):
            cosine += float(vectors[i, d]) * float(vectors[j, d])
        return cosine
    # Merge of two ascending lists of codes.
    common, total = 0.0, 0.0
    a, b = start[i], start[j]
    while a < start[i + 1] or b < start[j + 1]:
        if b >= start[j + 1] or (a < start[i + 1] and codes[a] < codes[b]):
            total += weights[codes[a]]
            a += 1
        elif a >= start[i + 1] or codes[b] < codes[a]:
            total += weights[codes[b]]
            b += 1
        else:
            common += weights[codes[a]]
            total += weights[codes[a]]
            a += 1
            b += 1
    return common / total if total > 0 else 0.0


@compiled_in_order
def _capped(
    start: Array,
    item: Array,
    vectors: Array,
    set_start: Array,
    codes: Array,
    weights: Array,
    at_most: int,
    least: float,
    k: int,
) -> Array:
    kept = np.zeros(len(item), np.bool_)
    for user in range(len(start) - 1):
        begin, end = start[user], start[user + 1]
        kept_entries = np.empty(end - begin, np.int64)
        n_kept = 0
        for entry in range(begin, end):
            if n_kept == k:
                break
            n_similar = 0
            for other in range(n_kept):
                if n_similar == at_most:
                    break
                similarity = _similarity(
                    item[entry], item[kept_entries[other]], vectors, set_start, codes, weights
                )
                if similarity >= least:
                    n_similar += 1
            if n_similar < at_most:
                kept[entry] = True
                kept_entries[n_kept] = entry
                n_kept += 1
    return kept


@compiled_in_order
def _diverse(
    start: Array,
    item: Array,
    vectors: Array,
    set_start: Array,
    codes: Array,
    weights: Array,
    relevance: float,
    pool: int,
    k: int,
) -> Array:
    order = np.full(len(item), -1, np.int64)
    for user in range(len(start) - 1):
        begin, n = start[user], start[user + 1] - start[user]
        closest = np.zeros(n)  # similarity to the most similar entry picked before
        is_picked = np.zeros(n, np.bool_)
        for step in range(min(n, k)):
            best, best_value = -1, 0.0
            for place in range(n):
                if is_picked[place]:
                    continue
                value = relevance * (1 - place / pool) - (1 - relevance) * closest[place]
                if best < 0 or value > best_value + TIE:
                    best, best_value = place, value
            is_picked[best] = True
            order[begin + step] = begin + best
            for place in range(n):
                if not is_picked[place]:
                    similarity = _similarity(
                        item[begin + place], item[begin + best], vectors, set_start, codes, weights
                    )
                    if step == 0 or similarity > closest[place]:
                        closest[place] = similarity
    return order


@compiled_in_order
def _calibrated(
    start: Array,
    code: Array,
    share_start: Array,
    share_code: Array,
    share: Array,
    weight: float,
    pool: int,
    k: int,
) -> Array:
    order = np.full(len(code), -1, np.int64)
    for user in range(len(start) - 1):
        begin, n = start[user], start[user + 1] - start[user]
        first, n_codes = share_start[user], share_start[user + 1] - share_start[user]
        is_picked = np.zeros(n, np.bool_)
        n_of_code = np.zeros(n_codes)  # picked entries of each of the user's categories
        position = np.full(n, -1)  # of the entry's category among the user's
        for place in range(n):
            for c in range(n_codes):
                if share_code[first + c] == code[begin + place]:
                    position[place] = c
        divergence = np.zeros(n_codes + 1)  # with one more entry of the category; last: of no such
        for step in range(min(n, k)):
            base = 0.0
            for c in range(n_codes):
                base += _term(share[first + c], n_of_code[c] / (step + 1))
            for c in range(n_codes):
                divergence[c] = (
                    base
                    - _term(share[first + c], n_of_code[c] / (step + 1))
                    + _term(share[first + c], (n_of_code[c] + 1) / (step + 1))
                )
            divergence[n_codes] = base
            best, best_value = -1, 0.0
            for place in range(n):
                if is_picked[place]:
                    continue
                value = (1 - weight) * (1 - place / pool) - weight * divergence[position[place]]
                if best < 0 or value > best_value + TIE:
                    best, best_value = place, value
            is_picked[best] = True
            order[begin + step] = begin + best
            if position[best] >= 0:
                n_of_code[position[best]] += 1
    return order


@compiled_in_order
def _term(of_user: float, in_list: float) -> float:
    # One category's part of the Kullback-Leibler divergence.
    return of_user * math.log(of_user / ((1 - SMOOTHING) * in_list + SMOOTHING * of_user))
