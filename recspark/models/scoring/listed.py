"""Scores of models that score only a few items for each row (each query)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recspark.data.blocks import Array, Ragged
from recspark.errors import ModelError


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

        Parameters
        ----------
        seen : local items that are not recommended to each row
        allowed : bool (n_items,), whether each item may be recommended at all; None = all may
        """
        if np.isnan(self.scores).any() or np.isposinf(self.scores).any():
            raise ModelError("a score is NaN or infinite")
        seen_keys = seen.rows * self.n_items + seen.values
        is_kept = ~np.isin(self._keys, seen_keys) & (self.scores > -np.inf)
        if allowed is not None:
            is_kept &= allowed[self.items]
        row, item = self._rows[is_kept], self.items[is_kept]
        score = self.scores[is_kept] + np.float32(0)  # no -0
        order = np.lexsort((item, -score, row))
        row, item, score = row[order], item[order], score[order]
        first_of_row = np.searchsorted(row, row)  # position of the first entry of the same row
        rank = np.arange(len(row)) - first_of_row + 1
        is_best = rank <= k
        return row[is_best], item[is_best], rank[is_best].astype(np.int32), score[is_best]

    @cached_property
    def _rows(self) -> Array:
        """The row of each entry, int64 (p,)."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    @cached_property
    def _keys(self) -> Array:
        """The key of each entry, row * n_items + item, int64 (p,), ascending."""
        return self._rows * self.n_items + self.items
