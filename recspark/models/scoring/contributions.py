"""What each item of a user's history adds to the score of a pair.

The score of many retrievers is a sum over the user's own items. A scorer of such a model has the
method `contributions` (`ContributingScorer`). The reasons of published rows are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from recspark.data.blocks import Array, QueryBlock

# The contributions of a pair and its `rest` add up to the score, but for this share of the sum of
# their absolute values: users' vectors and listed scores are rounded to float32 (2^-24 = 6e-8).
SUM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Contributions:
    """What the items of the users' histories add to the scores of p pairs.

    Parameters
    ----------
    start : int64 (p + 1,); pair j has the entries `start[j]:start[j + 1]` of `items` and `values`
    items : int32 (q,), local indices of items of the user's history, each once per pair
    values : float64 (q,): what the item adds to the score of the pair; it may be negative
    rest : float64 (p,): what no item of the history adds, such as the bias of the listed item

    The score of pair j is the sum of its values, plus `rest[j]`.
    """

    start: Array
    items: Array
    values: Array
    rest: Array

    @property
    def pairs(self) -> Array:
        """The pair that each entry belongs to, int64 (q,)."""
        return np.repeat(np.arange(len(self.rest)), np.diff(self.start))

    @property
    def totals(self) -> Array:
        """The score of each pair, float64 (p,)."""
        return np.asarray(np.bincount(self.pairs, self.values, len(self.rest)) + self.rest)


class ContributingScorer(Protocol):
    """A scorer of a model whose scores are sums over the items of the user's history."""

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """Return the contributions to the score of local item `items[j]` for row `rows[j]`.

        `rows` int64 (p,), ascending, are rows of `block`. The pairs must have a score (see
        `topk.pair_scores`). The contributions of a pair depend on no other pair. Memory and time
        grow with the entries: the pairs, times the items of their users.
        """


def contributing(scorer: object) -> ContributingScorer | None:
    """Return `scorer` if its scores are sums over the items of the user's history, else None."""
    contributing_scorer: Any = scorer
    return contributing_scorer if hasattr(scorer, "contributions") else None


def entries_of_pairs(start: Array, rows: Array) -> tuple[Array, Array]:
    """Return the entries of the row of each pair: (start of each pair, index of each entry).

    Row r has the entries `start[r]:start[r + 1]`; pair j is of row `rows[j]`.

    >>> entries_of_pairs(np.array([0, 2, 5]), np.array([1, 0, 1]))
    (array([0, 3, 5, 8]), array([2, 3, 4, 0, 1, 2, 3, 4]))
    """
    lengths = np.diff(start)[rows]
    start_of_pairs = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entries = np.repeat(start[rows] - start_of_pairs[:-1], lengths)
    return start_of_pairs, entries + np.arange(start_of_pairs[-1])


def keys_of_lists(start: Array, items: Array, n_items: int) -> Array:
    """Return the key of each entry of item lists, item * n_items + listed item, int64 (p,), ascending.

    Item j lists `items[start[j]:start[j + 1]]`, ascending local indices.
    """
    return np.repeat(np.arange(len(start) - 1), np.diff(start)) * n_items + items


def contributions_of_lists(
    keys: Array,
    values: Array,
    n_items: int,
    own: tuple[Array, Array, Array],
    rows: Array,
    items: Array,
) -> Contributions:
    """Return the contributions to scores that are sums of lists (`listed.sums_of_lists`).

    Parameters
    ----------
    keys, values : `keys_of_lists`, and the value of each entry
    n_items : size of the vocabulary
    own : (start, items, weights): row r has the own items `items[start[r]:start[r + 1]]`
    rows, items : of the pairs, see `ContributingScorer`
    """
    start, own_items, weights = own
    start_of_pairs, entries = entries_of_pairs(start, rows)
    listed = np.repeat(items, np.diff(start_of_pairs))
    wanted_keys = own_items[entries].astype(np.int64) * n_items + listed
    added = np.zeros(len(wanted_keys))
    if len(keys):
        index = np.minimum(np.searchsorted(keys, wanted_keys), len(keys) - 1)
        is_listed = keys[index] == wanted_keys
        added[is_listed] = values[index[is_listed]].astype(np.float64)
    added *= weights[entries]
    return Contributions(
        start_of_pairs, own_items[entries].astype(np.int32), added, np.zeros(len(rows))
    )


def strongest(contributions: Contributions, n: int) -> tuple[Array, Array, Array]:
    """Return the items that speak most for each pair: (start, items, shares).

    Pair j has the entries `start[j]:start[j + 1]` of `items` and `shares`: at most `n`, the largest
    contribution first; of equal ones, the smaller item comes first. Only items with a contribution
    above 0 are among them. The share of an item is its contribution, divided by the sum of the
    absolute contributions of all items of the pair's user; `rest` does not count. So the shares of
    a pair add up to at most 1.

    Example: the contributions 3, -1 and 1 to a pair give the shares 0.6 and 0.2.
    """
    pair, values = contributions.pairs, contributions.values
    n_pairs = len(contributions.rest)
    total = np.bincount(pair, np.abs(values), n_pairs)
    entries = np.flatnonzero(values > 0)
    entries = entries[np.lexsort((contributions.items[entries], -values[entries], pair[entries]))]
    sorted_pair = pair[entries]  # ascending
    rank = np.arange(len(entries)) - np.searchsorted(sorted_pair, sorted_pair)
    kept = entries[rank < n]
    start = np.concatenate([[0], np.cumsum(np.bincount(pair[kept], minlength=n_pairs))])
    return start.astype(np.int64), contributions.items[kept], values[kept] / total[pair[kept]]
