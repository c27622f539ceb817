"""Evaluation of session models: the rank of the next item after every prefix of a test session.

A session of n items has n - 1 prefixes. For the prefix of the first t items, the question is: which
rank does item t + 1 have in the model's list of all items? Nothing is masked, because a session may
contain an item again. A next item that the model does not know is a miss.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recspark.data.blocks import Array, Histories, QueryBlock, Ragged
from recspark.models.scoring import topk

_AT_ONCE = 2048  # prefixes in one block


def ranks(scorer: topk.Scorer, items: Array, sessions: Ragged, as_of: int, k: int) -> Array:
    """Return the rank of the next item after each prefix, int32 (n,); 0 where not in the top k.

    Parameters
    ----------
    scorer, items : of the model
    sessions : item_idx in time order; a session of one item has no prefix
    as_of : the time that all events get, in microseconds since 1970 UTC
    k : length of the lists

    The ranks are ordered by session, then by length of the prefix. Of items with equal scores the
    smaller item_idx comes first, as in every list. Runs in this process, in blocks of 2048
    prefixes, without Spark.
    """
    ranks_of_blocks = [np.zeros(0, np.int32)]
    for block, next_item in _blocks(sessions, as_of):
        lists = topk.answer(block, items, scorer, k)
        query, item, rank = (
            lists.column(name).to_numpy() for name in ("user_idx", "item_idx", "rank")
        )
        rank_of_query = np.zeros(len(block), np.int32)
        is_hit = item == next_item[query]
        rank_of_query[query[is_hit]] = rank[is_hit]
        ranks_of_blocks.append(rank_of_query)
    return np.concatenate(ranks_of_blocks)


def summary(next_item_ranks: Array, k: int) -> dict[str, float]:
    """Return `hit_rate` (P@k and recall@k of the session papers), `mrr` and `ndcg` at k.

    `next_item_ranks` are as `ranks` returns them, 0 = no hit. The values are means over all
    prefixes. There is one right item, so the ndcg of a hit is 1 / log2(rank + 1).

    >>> summary(np.array([1, 0, 3, 30]), 20)
    {'hit_rate': 0.5, 'mrr': 0.3333333333333333, 'ndcg': 0.375}
    """
    is_hit = (next_item_ranks > 0) & (next_item_ranks <= k)
    rank = np.where(is_hit, next_item_ranks, 1)
    return {
        "hit_rate": float(is_hit.mean()),
        "mrr": float((is_hit / rank).mean()),
        "ndcg": float((is_hit / np.log2(rank + 1)).mean()),
    }


def _blocks(sessions: Ragged, as_of: int) -> Iterator[tuple[QueryBlock, Array]]:
    """Yield (queries, item_idx of the next item) for all prefixes, in blocks of `_AT_ONCE`.

    `user_idx` is the number of the prefix in its block, from 0.

    Example: the sessions [5, 7, 8] and [9, 5] give the prefixes [5], [5, 7] and [9], with the next
    items 7, 8 and 5.
    """
    n_prefixes = np.maximum(sessions.lengths - 1, 0)  # of each session
    # Of each prefix: where its session begins in `sessions.values`, and how many items it has.
    session_begin = np.repeat(sessions.start[:-1], n_prefixes)
    prefix_length = (
        np.arange(len(session_begin))
        - np.repeat(np.cumsum(n_prefixes) - n_prefixes, n_prefixes)
        + 1
    )
    for block_begin in range(0, len(session_begin), _AT_ONCE):
        begin, length = (
            session_begin[block_begin : block_begin + _AT_ONCE],
            prefix_length[block_begin : block_begin + _AT_ONCE],
        )
        start = np.concatenate([[0], np.cumsum(length)])
        position = np.arange(start[-1]) + np.repeat(begin - start[:-1], length)  # of each event
        history = Histories(
            start,
            sessions.values[position].astype(np.int32),
            np.full(len(position), as_of, np.int64),
            np.ones(len(position), np.float32),
        )
        no_seen_items = Ragged(np.zeros(len(begin) + 1, np.int64), np.zeros(0, np.int32))
        yield (
            QueryBlock(np.arange(len(begin)), history, no_seen_items),
            sessions.values[begin + length],
        )
