"""The next item of every prefix of every test session, ranked among all items.

Each session of l items asks l - 1 questions: after its first t items, at which place of the model's
list is item t + 1? Nothing is masked: an item may come again. A next item that the model does not
know is a miss.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recspark.data.blocks import Array, Histories, QueryBlock, Ragged
from recspark.models.scoring import topk

_AT_ONCE = 2048  # prefixes


def ranks(scorer: topk.Scorer, items: Array, sessions: Ragged, as_of: int, k: int) -> Array:
    """Return the rank of the next item for each prefix, int32 (n,); 0 where it is not in the top k.

    Parameters
    ----------
    scorer, items : of the model
    sessions : item_idx in time order; those of one item ask nothing
    as_of : microseconds since 1970 UTC, the time that all events get
    k : length of the lists

    By session, then prefix. Ties as in every list: by the smaller item_idx. Runs here, in blocks of
    2048 prefixes; no Spark.
    """
    parts = [np.zeros(0, np.int32)]
    for block, target in _blocks(sessions, as_of):
        lists = topk.answer(block, items, scorer, k)
        query, item, rank = (
            lists.column(name).to_numpy() for name in ("user_idx", "item_idx", "rank")
        )
        found = np.zeros(len(block), np.int32)
        hit = item == target[query]
        found[query[hit]] = rank[hit]
        parts.append(found)
    return np.concatenate(parts)


def summary(found: Array, k: int) -> dict[str, float]:
    """Return `hit_rate` (P@k and recall@k of the session papers), `mrr` and `ndcg` at k.

    `found` : ranks as of `ranks`, 0 = no hit; means over all prefixes. With one right item, ndcg is
    1 / log2(rank + 1).

    >>> summary(np.array([1, 0, 3, 30]), 20)
    {'hit_rate': 0.5, 'mrr': 0.3333333333333333, 'ndcg': 0.375}
    """
    hit = (found > 0) & (found <= k)
    rank = np.where(hit, found, 1)
    return {
        "hit_rate": float(hit.mean()),
        "mrr": float((hit / rank).mean()),
        "ndcg": float((hit / np.log2(rank + 1)).mean()),
    }


def _blocks(sessions: Ragged, as_of: int) -> Iterator[tuple[QueryBlock, Array]]:
    """Yield (queries, next item_idx) of all prefixes; user_idx counts from 0 in each block."""
    n_prefixes = np.maximum(sessions.lengths - 1, 0)
    first = np.repeat(sessions.start[:-1], n_prefixes)
    size = np.arange(len(first)) - np.repeat(np.cumsum(n_prefixes) - n_prefixes, n_prefixes) + 1
    for begin in range(0, len(first), _AT_ONCE):
        since, length = first[begin : begin + _AT_ONCE], size[begin : begin + _AT_ONCE]
        start = np.concatenate([[0], np.cumsum(length)])
        at = np.arange(start[-1]) + np.repeat(since - start[:-1], length)
        history = Histories(
            start,
            sessions.values[at].astype(np.int32),
            np.full(len(at), as_of, np.int64),
            np.ones(len(at), np.float32),
        )
        nothing = Ragged(np.zeros(len(since) + 1, np.int64), np.zeros(0, np.int32))
        yield QueryBlock(np.arange(len(since)), history, nothing), sessions.values[since + length]
