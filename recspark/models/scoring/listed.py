"""Scores of models that score only a few items for each row (each query)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recspark.data.blocks import Array, Ragged
from recspark.errors import ModelError
from recspark.models.scoring import memory

# Memory of `ListedScores.best`, beside the result, for each listed item of a slice of rows: measured
_LISTED_BYTES = 65


@dataclass(frozen=True)
class ListedScores:
    """Exact scores of the items that a model lists for each row.

    An item that is not listed for a row is never recommended to it.

    Parameters
    ----------
    start : int64 (n + 1,); row r lists the entries `start[r]:start[r + 1]` of `items` and `scores`
    items : int32 (p,), local indices, ascending in each row
    scores : float32 (p,)
    n_items : size of the vocabulary

    The cost of all methods grows with the number of listed items, not with the catalogue.
    """

    start: Array
    items: Array
    scores: Array
    n_items: int

    @property
    def known(self) -> Array:
        """Whether each row lists at least one item, bool (n,)."""
        return np.asarray(np.diff(self.start) > 0)

    def exact(self, rows: Array, items: Array) -> Array:
        """Return the score of local item `items[j]` for row `rows[j]`, float64 (q,).

        The score is -inf if the row does not list the item.
        """
        keys = rows * self.n_items + items
        out = np.full(len(keys), -np.inf)
        if len(self.scores):
            entry = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            is_listed = self._keys[entry] == keys
            out[is_listed] = self.scores[entry[is_listed]]
        return out

    def best(
        self, seen: Ragged, k: int, allowed: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Return (row, local item, rank from 1, score) of the k best items of each row.

        The order is by row, then by rank. Of items with equal scores, the smaller item comes first.
        Raises ModelError if a score is NaN or +inf.

        The rows are taken in slices. Beside the result, a slice takes about `memory.block_bytes()`,
        or what one row takes if that is more.

        Parameters
        ----------
        seen : local items that are not recommended to each row
        allowed : bool (n_items,), whether each item may be recommended at all; None = all may
        """
        if np.isnan(self.scores).any() or np.isposinf(self.scores).any():
            raise ModelError("a score is NaN or infinite")
        n_entries = memory.block_bytes() // _LISTED_BYTES
        best_of_slices: list[tuple[Array, Array, Array, Array]] = []
        begin = 0
        while begin < len(self.start) - 1 or not best_of_slices:
            last_entry = self.start[begin] + n_entries
            end = max(begin + 1, int(np.searchsorted(self.start, last_entry, side="right")) - 1)
            best_of_slices.append(self._best_of_rows(slice(begin, end), seen, k, allowed))
            begin = end
        row, item, rank, score = (
            np.concatenate(arrays) for arrays in zip(*best_of_slices, strict=True)
        )
        return row, item, rank, score

    def _best_of_rows(
        self, rows: slice, seen: Ragged, k: int, allowed: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        """Return the result of `best` for a slice of the rows."""
        row, entries = _rows_and_entries(self.start, rows)
        seen_row, seen_entries = _rows_and_entries(seen.start, rows)
        item, score = self.items[entries], self.scores[entries]
        seen_keys = seen_row * self.n_items + seen.values[seen_entries]
        is_kept = ~np.isin(row * self.n_items + item, seen_keys) & (score > -np.inf)
        if allowed is not None:
            is_kept &= allowed[item]
        row, item, score = row[is_kept], item[is_kept], score[is_kept] + np.float32(0)  # no -0
        order = np.lexsort((item, -score, row))
        row, item, score = row[order], item[order], score[order]
        first_of_row = np.searchsorted(row, row)  # position of the first entry of the same row
        rank = np.arange(len(row)) - first_of_row + 1
        is_best = rank <= k
        return row[is_best], item[is_best], rank[is_best].astype(np.int32), score[is_best]

    @cached_property
    def _keys(self) -> Array:
        """The key of each entry, row * n_items + item, int64 (p,), ascending."""
        rows = np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))
        return rows * self.n_items + self.items


@dataclass(frozen=True)
class SlicedScores:
    """`ListedScores` of many rows that are computed slice by slice, each time they are needed.

    For models whose lists are long: only those of one slice are in memory at a time.

    Parameters
    ----------
    n_rows : number of rows
    rows_at_once : rows of a slice; the last one may have fewer
    score_rows : returns the scores of a slice of the rows, whose first row is 0 there. The scores
        of a row depend on no other row
    """

    n_rows: int
    rows_at_once: int
    score_rows: Callable[[slice], ListedScores]

    @property
    def known(self) -> Array:
        """True for each row, bool (n_rows,); `exact` tells what is not listed."""
        return np.ones(self.n_rows, bool)

    def exact(self, rows: Array, items: Array) -> Array:
        """See `ListedScores`. Slices without a pair are not computed."""
        out = np.full(len(rows), -np.inf)
        by_row = np.argsort(rows, kind="stable")
        for part in self._slices():
            begin, end = np.searchsorted(rows[by_row], (part.start, part.stop))
            if begin < end:
                pairs = by_row[begin:end]
                scores = self.score_rows(part)
                out[pairs] = scores.exact(rows[pairs] - part.start, items[pairs])
        return out

    def best(
        self, seen: Ragged, k: int, allowed: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """See `ListedScores`."""
        best_of_slices = []
        for part in self._slices() or [slice(0, 0)]:
            start = seen.start[part.start : part.stop + 1]
            seen_of_part = Ragged(start - start[0], seen.values[start[0] : start[-1]])
            row, *others = self.score_rows(part).best(seen_of_part, k, allowed)
            best_of_slices.append((row + part.start, *others))
        row, item, rank, score = (
            np.concatenate(arrays) for arrays in zip(*best_of_slices, strict=True)
        )
        return row, item, rank, score

    def _slices(self) -> list[slice]:
        return [
            slice(begin, min(begin + self.rows_at_once, self.n_rows))
            for begin in range(0, self.n_rows, self.rows_at_once)
        ]


def sums_of_lists(
    lists: tuple[Array, ...],
    row: Array,
    item: Array,
    weight: Array,
    n_rows: int,
    n_items: int,
) -> ListedScores:
    """Return for each row the sum of the lists of its items, each times the item's weight.

    Parameters
    ----------
    lists : (start, items, values): item j has the list `items[start[j]:start[j + 1]]`, local
        indices, with `values` float32
    row, item, weight : (q,) each: row `row[j]` has item `item[j]` with `weight[j]`; rows ascend
    n_rows, n_items : number of rows, and size of the vocabulary

    Sums run in float64, in the order of a row's items, so they depend on no other row.

    >>> lists = np.array([0, 2, 3]), np.array([0, 1, 1]), np.array([0.5, 1, 2], np.float32)
    >>> row, item = np.array([1, 1]), np.array([0, 1])
    >>> scores = sums_of_lists(lists, row, item, np.array([1.0, 2.0]), 2, 2)
    >>> scores.start.tolist(), scores.items.tolist(), scores.scores.tolist()
    ([0, 0, 2], [0, 1], [0.5, 5.0])
    """
    start, items, values = lists
    # `entry`, (e,): the positions in `items` of the lists of each item, one item after the other.
    # For items that have the entries 5:8 and 0:2, it is [5, 6, 7, 0, 1].
    lengths = start[item + 1] - start[item]
    entry = np.repeat(start[item] - np.cumsum(lengths) + lengths, lengths)
    entry += np.arange(len(entry))
    value = values[entry].astype(np.float64) * np.repeat(weight, lengths)
    key = np.repeat(row, lengths) * n_items + items[entry]
    # Sum the entries of equal row and listed item. The sort is stable, so they stay in order.
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    begin = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else key
    sums = np.add.reduceat(value, begin) if len(begin) else value
    rows, listed = np.divmod(key[begin], n_items)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))])
    return ListedScores(starts, listed.astype(np.int32), sums.astype(np.float32), n_items)


def _rows_and_entries(start: Array, rows: slice) -> tuple[Array, slice]:
    """Return the row of each entry of `rows`, int64, and the slice of these entries.

    Row r has the entries `start[r]:start[r + 1]`.

    >>> _rows_and_entries(np.array([0, 2, 2, 5]), slice(1, 3))
    (array([2, 2, 2]), slice(2, 5, None))
    """
    starts = start[rows.start : rows.stop + 1]
    row = np.repeat(np.arange(rows.start, rows.start + len(starts) - 1), np.diff(starts))
    return row, slice(int(starts[0]), int(starts[-1]))
