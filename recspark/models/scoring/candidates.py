"""The candidates for the k best items of a block of rows, reduced from scores, tile of items by
tile.

Scores are approximate (float32, by matrix product), and the bound of their error is given. An item
is a candidate if, with that error, it can be among the k best. All candidates are then scored once
more, exactly, so the result is that of a float64 brute force: see `cut_below`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled, compiled_in_order
from recspark.errors import ModelError

_GROUP = 32  # most scores in a group, of which `floor_of` looks at the maximum only
_RUN = 64  # scores that `_take` tests together; one by one only if any is a candidate
_LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass
class Candidates:
    """Running candidates of a block of rows.

    Parameters
    ----------
    k : number of items to return for each row
    error : float64 (n,): bound of |approximate - exact| in each row
    exact : returns the exact scores, float64 (p,), of (rows, items)

    Call `add` with the tiles of items from left to right, then `best`. For each row, at most 4 k
    candidates and those of the newest tile are in memory, however many scores tie.
    """

    k: int
    error: Array
    exact: Callable[[Array, Array], Array]
    row: Array = field(init=False)  # int64 (p,): the row of each candidate
    item: Array = field(init=False)  # int64 (p,)
    value: Array = field(init=False)  # float32 (p,): approximate scores, within `error`
    # float32 (n,): a value that at least k scores of the row reach
    _floor: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._set_candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def add(self, scores: Array, first_item: int) -> None:
        """Add the candidates of a tile.

        `scores` float32 (n, width) of the items `first_item`, `first_item + 1`, …; -inf where
        masked. Raises ModelError if a score is NaN or +inf.
        """
        if self._floor is None:
            self._floor = floor_of(scores, self.k)
        elif len(self.row) > 2 * self.k * len(scores):
            self._prune()
        row, item, value = take(scores, cut_below(self._floor, self.error))
        if not np.isfinite(value).all():
            raise ModelError(
                "a score is NaN or infinite: the model's arrays or the weights are bad"
            )
        item += first_item
        if len(self.row):
            row = np.concatenate([self.row, row])
            item = np.concatenate([self.item, item])
            value = np.concatenate([self.value, value])
        self._set_candidates(row, item, value)

    def best(self) -> tuple[Array, Array, Array, Array]:
        """Return (row, item, rank from 1, score) of each row's k best items, by row, then by rank.

        Scores are exact, rounded to float32. Of equal scores, the smaller item comes first.
        """
        if len(self.row) > 3 * self.k * len(self.error) // 2:
            self._prune()
        return self._best()

    def _best(self) -> tuple[Array, Array, Array, Array]:
        # Adding 0 turns -0 into +0. `order_key` would not see the two zeros as a tie.
        score = self.exact(self.row, self.item).astype(np.float32) + np.float32(0)
        return best(self.row, self.item, score, self.k)

    def _prune(self) -> None:
        """Raise each row's floor to its k-th best candidate, and drop the candidates below the cut.

        If more than 4 k candidates per row remain, because their scores are too close to each
        other, exact scores decide: only the k best candidates of each row stay.
        """
        assert self._floor is not None
        keys = np.sort(order_key(self.row, self.value))
        n_rows = len(self._floor)
        start = np.searchsorted(keys, np.arange(n_rows + 1).astype(np.uint64) << np.uint64(32))
        full_rows = np.flatnonzero(np.diff(start) >= self.k)
        kth_score = _score_of(keys[start[full_rows] + self.k - 1])
        self._floor[full_rows] = np.maximum(self._floor[full_rows], kth_score)
        is_kept = self.value >= cut_below(self._floor, self.error)[self.row]
        self._set_candidates(self.row[is_kept], self.item[is_kept], self.value[is_kept])
        if len(self.row) > 4 * self.k * n_rows:
            row, item, _, score = self._best()
            self._set_candidates(row, item, score)

    def _set_candidates(self, row: Array, item: Array, value: Array) -> None:
        self.row, self.item, self.value = row, item, value


def best(row: Array, item: Array, score: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """Return (row, item, rank from 1, score) of each row's k best items, by row, then by rank.

    `score` float32, exact, without -0. Of equal scores, the smaller item comes first.
    """
    keys = order_key(row, score)
    order = np.argsort(keys)
    sorted_keys = keys[order]
    if (sorted_keys[1:] == sorted_keys[:-1]).any():
        order = np.lexsort((item, keys))
    row, item, score = row[order], item[order], score[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    is_kept = rank < k
    return row[is_kept], item[is_kept], (rank[is_kept] + 1).astype(np.int32), score[is_kept]


def floor_of(scores: Array, k: int) -> Array:
    """Return for each row a value that at least k of its scores reach, float32 (n,).

    It is -inf where all scores must be counted because there are fewer than k, or where masked
    items are among the k scores.

    The items of a row are cut into groups, and only the maximum of each group is looked at. The
    maxima are scores of different items, so at least k scores reach the k-th largest maximum. The
    exact k-th largest of all scores would cost ten times as much. Example with k = 1, 16 items:
    groups of 16 // 8 = 2 items, so 8 groups; item i is in group i % 8.
    """
    n_items = scores.shape[1]
    group_size = min(_GROUP, max(1, n_items // (8 * k)))
    n_groups = n_items // group_size
    group_maxima = scores[:, :n_groups].copy()
    for begin in range(n_groups, n_items, n_groups):
        group_members = scores[:, begin : begin + n_groups]
        np.maximum(
            group_maxima[:, : group_members.shape[1]],
            group_members,
            out=group_maxima[:, : group_members.shape[1]],
        )
    if n_groups < k:  # fewer items than k: none may be dropped
        return np.full(len(scores), -np.inf, np.float32)
    return np.asarray(np.partition(group_maxima, n_groups - k, axis=1)[:, n_groups - k])


def cut_below(floor: Array, error: Array) -> Array:
    """Return for each row the approximate score below which no item is among the k best, float32
    (n,).

    At least k items have approximate >= floor, so they have exact >= floor - error. Rounded to
    float32, the k-th best score is therefore at least y, a float32 below floor - error. An item
    that is dropped has exact < cut + error. As cut + error is at most the float32 before y, its
    score rounds to less than y: the item is not in the list, and does not tie with an item in it.
    """
    y = _float32_below(floor - error)
    cut = _float32_below(np.nextafter(y, np.float32(-np.inf)) - error)
    # Masked items have -inf and are never candidates; all others are at or above the lowest float.
    return np.fmax(cut, _LOWEST)


def take(scores: Array, cut: Array) -> tuple[Array, Array, Array]:
    """Return (row, item, score) of all scores that are not below their row's cut, sorted by row.

    A NaN is not below the cut, so it is returned.
    """
    capacity = 4096 + scores.size // 64
    counts = np.zeros(len(scores), np.int64)
    while True:
        item, value = np.empty(capacity, np.int64), np.empty(capacity, np.float32)
        n_taken = _take(scores, cut, counts, item, value)
        if n_taken >= 0:
            return np.repeat(np.arange(len(scores)), counts), item[:n_taken], value[:n_taken]
        capacity = min(8 * capacity, scores.size)


def order_key(row: Array, score: Array) -> Array:
    """Return uint64 keys that sort by row, then by falling score."""
    bits = score.view(np.uint32)
    # As integers, `rising` has the order of the scores.
    rising = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    return (row.astype(np.uint64) << np.uint64(32)) | (~rising).astype(np.uint64)


def dot_pairs(users: Array, items: Array, row: Array, item: Array) -> Array:
    """Return users[row[j]] . items[item[j]] for each pair j, float64 (p,).

    `users` float32 (n, d), `items` float32 (m, d). Products are exact in float64 and are summed in
    a fixed order, so a sum depends neither on the other pairs nor on the processor.
    """
    out = np.empty(len(row))
    _dot_pairs(users, items, row, item, out)
    return out


def _float32_below(values: Array) -> Array:
    """Return a float32 strictly below each float64 value, less than two float32 steps away."""
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _score_of(keys: Array) -> Array:
    """Return the scores from which `order_key` made its keys."""
    rising = ~keys.astype(np.uint32)
    bits = np.where(rising >> 31 == 1, rising ^ np.uint32(1 << 31), ~rising)
    return np.asarray(bits.astype(np.uint32).view(np.float32))


@compiled
def _take(scores: Array, cut: Array, counts: Array, item: Array, score: Array) -> int:
    """Fill `item` and `score` with what `take` returns, and `counts` with the number of each row.

    Return the total number, or -1 if `item` and `score` have too little room.
    """
    n_taken, capacity = 0, len(item)
    n_items = scores.shape[1]
    for row in range(len(scores)):
        row_scores, row_cut, n_before_row = scores[row], cut[row], n_taken
        for begin in range(0, n_items, _RUN):
            end = min(begin + _RUN, n_items)
            has_candidate = False
            for column in range(begin, end):
                has_candidate |= not (row_scores[column] < row_cut)
            if has_candidate:
                for column in range(begin, end):
                    if not (row_scores[column] < row_cut):
                        if n_taken == capacity:
                            return -1
                        item[n_taken], score[n_taken] = column, row_scores[column]
                        n_taken += 1
        counts[row] = n_taken - n_before_row
    return n_taken


@compiled_in_order
def _dot_pairs(users: Array, items: Array, row: Array, item: Array, out: Array) -> None:
    embedding_size = users.shape[1]
    n_in_eights = embedding_size - embedding_size % 8
    sums = np.zeros(8)
    for pair in range(len(row)):
        x, y = users[row[pair]], items[item[pair]]
        sums[:] = 0.0
        for f in range(0, n_in_eights, 8):
            for lane in range(8):
                sums[lane] += np.float64(x[f + lane]) * np.float64(y[f + lane])
        for lane in range(embedding_size - n_in_eights):
            sums[lane] += np.float64(x[n_in_eights + lane]) * np.float64(y[n_in_eights + lane])
        out[pair] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + (
            (sums[2] + sums[6]) + (sums[3] + sums[7])
        )
