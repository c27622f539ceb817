"""Scores that a model knows for a few items of each row only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recspark.data.blocks import Array


@dataclass(frozen=True)
class ListedScores:
    """`topk.Scores` of listed items; every other item is never recommended to the row.

    Parameters
    ----------
    start : int64 (n + 1,); row r has `start[r]:start[r + 1]` of
    items : int32 (p,), local, ascending in each row, and scores : float32 (p,), exact
    n_items : size of the vocabulary
    """

    start: Array
    items: Array
    scores: Array
    n_items: int

    @property
    def known(self) -> Array:
        """Rows with at least one item, bool (n,)."""
        return np.asarray(np.diff(self.start) > 0)

    def approximate(self, rows: slice) -> Array:
        """See `Scores`."""
        start = self.start[rows.start : rows.stop + 1]
        part = slice(start[0], start[-1])
        out = np.full((len(start) - 1, self.n_items), -np.inf, np.float32)
        out[np.repeat(np.arange(len(out)), np.diff(start)), self.items[part]] = self.scores[part]
        return out

    def exact(self, rows: Array, items: Array) -> Array:
        """See `Scores`. All (row, item) must be listed."""
        at = np.searchsorted(self._keys, rows * self.n_items + items)
        return self.scores[at].astype(np.float64)

    def error(self, rows: slice) -> Array:
        """See `Scores`."""
        return np.zeros(rows.stop - rows.start)

    @cached_property
    def _keys(self) -> Array:
        """int64 (p,), ascending: row * n_items + item."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start)) * self.n_items + (
            self.items
        )
