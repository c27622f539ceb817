"""Scores that a model knows for a few items of each row only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recspark.data.blocks import Array, Ragged
from recspark.errors import ModelError


@dataclass(frozen=True)
class ListedScores:
    """Exact scores of listed items; every other item is never recommended to the row.

    Parameters
    ----------
    start : int64 (n + 1,); row r has `start[r]:start[r + 1]` of
    items : int32 (p,), local, ascending in each row, and scores : float32 (p,)
    n_items : size of the vocabulary

    Cost of all that is asked follows what is listed, never the catalogue.
    """

    start: Array
    items: Array
    scores: Array
    n_items: int

    @property
    def known(self) -> Array:
        """Rows with at least one item, bool (n,)."""
        return np.asarray(np.diff(self.start) > 0)

    def exact(self, rows: Array, items: Array) -> Array:
        """Scores of local `items[j]` for row `rows[j]`, float64 (p,); -inf where it is not listed."""
        wanted = rows * self.n_items + items
        out = np.full(len(wanted), -np.inf)
        if len(self.scores):
            at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            listed = self._keys[at] == wanted
            out[listed] = self.scores[at[listed]]
        return out

    def best(
        self, seen: Ragged, k: int, allowed: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Return (row, local item, rank, score) of the k best of each row, by row, then rank.

        Parameters
        ----------
        seen : local items that each row masks
        allowed : bool (n_items,), the items that may be listed; None = all

        Ties by the smaller item. Raises ModelError where a score is NaN or +inf.
        """
        if np.isnan(self.scores).any() or np.isposinf(self.scores).any():
            raise ModelError("a score is NaN or infinite")
        masked = seen.rows * self.n_items + seen.values
        kept = ~np.isin(self._keys, masked) & (self.scores > -np.inf)
        if allowed is not None:
            kept &= allowed[self.items]
        row, item = self._rows[kept], self.items[kept]
        score = self.scores[kept] + np.float32(0)  # no -0
        order = np.lexsort((item, -score, row))
        row, item, score = row[order], item[order], score[order]
        first = np.searchsorted(row, row)  # of the row that an entry is in
        rank = np.arange(len(row)) - first + 1
        top = rank <= k
        return row[top], item[top], rank[top].astype(np.int32), score[top]

    @cached_property
    def _rows(self) -> Array:
        """int64 (p,): the row of each entry."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    @cached_property
    def _keys(self) -> Array:
        """int64 (p,), ascending: row * n_items + item."""
        return self._rows * self.n_items + self.items
