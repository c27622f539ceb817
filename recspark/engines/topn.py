"""What is left of a block of scores: the candidates for the k best, tile of items by tile.

Scores are approximate (float32, by GEMM), with a bound of their error. A candidate is what that error
does not rule out of the k best; all of them are scored once more, exactly, so the answer is that of a
float64 brute force: see `cut_below`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from recspark.data.blocks import Array
from recspark.engines.compiled import compiled, compiled_in_order
from recspark.errors import ModelError

_GROUP = 32  # most scores whose maximum stands for them while a row's threshold is found
_LINE = 64  # scores that are looked at one by one if any of them is a candidate
_LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass
class Candidates:
    """Running candidates of a block of rows.

    Parameters
    ----------
    k : items wanted
    error : float64 (n,): bound of |approximate - exact| in each row
    exact : gives the exact scores, float64 (p,), of (rows, items)

    `add` takes the tiles of items from left to right. Held for a row: at most 4 k and the newest
    tile's, however many scores tie.
    """

    k: int
    error: Array
    exact: Callable[[Array, Array], Array]
    row: Array = field(init=False)  # int64 (p,)
    item: Array = field(init=False)  # int64 (p,)
    value: Array = field(init=False)  # float32 (p,): scores, within `error`
    _floor: Array | None = field(init=False, default=None)  # k scores of the row reach it

    def __post_init__(self) -> None:
        self._hold(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def add(self, scores: Array, first: int) -> None:
        """Take the candidates of a tile.

        `scores` float32 (n, width) of items `first`, `first + 1`, …; -inf where masked. Raises
        ModelError where a score is NaN or +inf.
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
        item += first
        if len(self.row):
            row = np.concatenate([self.row, row])
            item = np.concatenate([self.item, item])
            value = np.concatenate([self.value, value])
        self._hold(row, item, value)

    def best(self) -> tuple[Array, Array, Array, Array]:
        """Return (row, item, rank from 1, score) of each row's k best, by row, then rank.

        Scores are exact, rounded to float32; ties go by the smaller item.
        """
        if len(self.row) > 3 * self.k * len(self.error) // 2:
            self._prune()
        return self._best()

    def _best(self) -> tuple[Array, Array, Array, Array]:
        # The sum with 0 makes one zero of -0 and +0, which would otherwise not tie.
        score = self.exact(self.row, self.item).astype(np.float32) + np.float32(0)
        return best(self.row, self.item, score, self.k)

    def _prune(self) -> None:
        """Raise the floor to the k-th best of those held, and drop what is below its cut.

        Where too many nearly tie, exact scores decide: of those held only the k best stay.
        """
        assert self._floor is not None
        key = np.sort(order_key(self.row, self.value))
        n_rows = len(self._floor)
        start = np.searchsorted(key, np.arange(n_rows + 1).astype(np.uint64) << np.uint64(32))
        full = np.flatnonzero(np.diff(start) >= self.k)
        kth = _score_of(key[start[full] + self.k - 1])
        self._floor[full] = np.maximum(self._floor[full], kth)
        kept = self.value >= cut_below(self._floor, self.error)[self.row]
        self._hold(self.row[kept], self.item[kept], self.value[kept])
        if len(self.row) > 4 * self.k * n_rows:
            row, item, _, score = self._best()
            self._hold(row, item, score)

    def _hold(self, row: Array, item: Array, value: Array) -> None:
        self.row, self.item, self.value = row, item, value


def best(row: Array, item: Array, score: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """Return (row, item, rank from 1, score) of each row's k best, by row, then rank.

    `score` float32, exact, no -0; ties by the smaller item.
    """
    key = order_key(row, score)
    order = np.argsort(key)
    sorted_key = key[order]
    if (sorted_key[1:] == sorted_key[:-1]).any():
        order = np.lexsort((item, key))
    row, item, score = row[order], item[order], score[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    return row[kept], item[kept], (rank[kept] + 1).astype(np.int32), score[kept]


def floor_of(scores: Array, k: int) -> Array:
    """Return a value that k scores of each row reach, float32; all of them where there are fewer.

    It is -inf where masked items are among those.

    The maxima of disjoint groups are scores of different items, so the k-th largest of them serves;
    an exact k-th largest of all scores would cost ten times as much.
    """
    n_items = scores.shape[1]
    size = min(_GROUP, max(1, n_items // (8 * k)))  # scores in a group
    n_groups = n_items // size
    most = scores[:, :n_groups].copy()
    for begin in range(n_groups, n_items, n_groups):
        part = scores[:, begin : begin + n_groups]
        np.maximum(most[:, : part.shape[1]], part, out=most[:, : part.shape[1]])
    if n_groups < k:  # fewer items than k: none may be dropped
        return np.full(len(scores), -np.inf, np.float32)
    return np.asarray(np.partition(most, n_groups - k, axis=1)[:, n_groups - k])


def cut_below(floor: Array, error: Array) -> Array:
    """Return the approximate score (float32) below which an item cannot be among the k best.

    k items have approximate >= floor, so exact >= floor - error, and the k-th best rounded score is
    at least y, a float32 below floor - error. An item left out has exact < cut + error; with
    cut + error <= the float32 before y it rounds below y: it neither enters the list nor ties.
    """
    y = _below(floor - error)
    cut = _below(np.nextafter(y, np.float32(-np.inf)) - error)
    # -inf marks what is masked; everything else has at least the lowest finite score.
    return np.fmax(cut, _LOWEST)


def take(scores: Array, cut: Array) -> tuple[Array, Array, Array]:
    """Return (row, item, score) of all scores not below their row's cut, NaN among them; by row."""
    room = 4096 + scores.size // 64
    counts = np.zeros(len(scores), np.int64)
    while True:
        item, value = np.empty(room, np.int64), np.empty(room, np.float32)
        n = _take(scores, cut, counts, item, value)
        if n >= 0:
            return np.repeat(np.arange(len(scores)), counts), item[:n], value[:n]
        room = min(8 * room, scores.size)


def order_key(row: Array, score: Array) -> Array:
    """Return uint64 keys that order by row, then by falling score."""
    bits = score.view(np.uint32)
    rising = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))  # orders as the floats do
    return (row.astype(np.uint64) << np.uint64(32)) | (~rising).astype(np.uint64)


def dot_pairs(users: Array, items: Array, row: Array, item: Array) -> Array:
    """Return users[row[j]] . items[item[j]], float64 (p,): products exact, sums in a fixed order.

    `users` float32 (n, d), `items` float32 (m, d); item j's sum does not depend on the others, nor on
    the processor.
    """
    out = np.empty(len(row))
    _dot_pairs(users, items, row, item, out)
    return out


def _below(values: Array) -> Array:
    """Return a float32 strictly below each float64 value, nearer than two steps."""
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _score_of(key: Array) -> Array:
    """Return the scores of `order_key`."""
    rising = ~key.astype(np.uint32)
    bits = np.where(rising >> 31 == 1, rising ^ np.uint32(1 << 31), ~rising)
    return np.asarray(bits.astype(np.uint32).view(np.float32))


@compiled
def _take(scores: Array, cut: Array, counts: Array, item: Array, value: Array) -> int:
    """Fill `item` and `value` by row, and `counts`; return how many, -1 where there is no room."""
    n, room = 0, len(item)
    n_items = scores.shape[1]
    for r in range(len(scores)):
        own, least, begun = scores[r], cut[r], n
        for begin in range(0, n_items, _LINE):
            end = min(begin + _LINE, n_items)
            hit = False
            for i in range(begin, end):
                hit |= not (own[i] < least)
            if hit:
                for i in range(begin, end):
                    if not (own[i] < least):
                        if n == room:
                            return -1
                        item[n], value[n] = i, own[i]
                        n += 1
        counts[r] = n - begun
    return n


@compiled_in_order
def _dot_pairs(users: Array, items: Array, row: Array, item: Array, out: Array) -> None:
    size = users.shape[1]
    whole = size - size % 8
    sums = np.zeros(8)
    for j in range(len(row)):
        x, y = users[row[j]], items[item[j]]
        sums[:] = 0.0
        for f in range(0, whole, 8):
            for lane in range(8):
                sums[lane] += np.float64(x[f + lane]) * np.float64(y[f + lane])
        for lane in range(size - whole):
            sums[lane] += np.float64(x[whole + lane]) * np.float64(y[whole + lane])
        out[j] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + (
            (sums[2] + sums[6]) + (sums[3] + sums[7])
        )
