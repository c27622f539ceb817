"""The inner loop of session kNN, compiled: neighbours of each open session, then their items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import Array, Ragged
from recspark.engines.compiled import compiled
from recspark.engines.session_index import SessionIndex


@dataclass(frozen=True)
class Weights:
    """What the methods differ in; all float64. An open session has l <= L items, the p-th at p - 1.

    Parameters
    ----------
    opened : (L + 1, L), what a shared item adds to the similarity: `opened[l, p]` of l at place p
    session : (n_sessions,), factor of a neighbour's similarity
    step : (L,), factor of a neighbour by places from the newest shared item to the open one's end
    place : (L,), factor of a neighbour's item by places from the newest shared item
    item : (n_items,), factor of an item
    """

    opened: Array
    session: Array
    step: Array
    place: Array
    item: Array


def next_items(
    opened: Ragged, index: SessionIndex, weights: Weights, n_newest: int, n_neighbours: int
) -> tuple[Array, Array, Array]:
    """Return start int64 (n + 1,), items int32 ascending and scores float32 of each open session.

    Of the sessions that share an item, the `n_newest` newest are compared, the `n_neighbours` most
    similar are taken (ties: the newest), and their items' scores add up in that order, in float64.

    Cost of one open session: n_newest * different items to merge the items' lists, sorting that
    many similarities, and the items of `n_neighbours` sessions.
    """
    start, items, scores = _next_items(
        opened.start,
        opened.values,
        index.session_start,
        index.session_items,
        index.session_places,
        index.item_start,
        index.item_sessions,
        weights.opened,
        weights.session,
        weights.step,
        weights.place,
        weights.item,
        n_newest,
        n_neighbours,
    )
    return start, items, scores


@compiled
def _next_items(
    start: Array,
    values: Array,
    session_start: Array,
    session_items: Array,
    session_places: Array,
    item_start: Array,
    item_sessions: Array,
    opened_weight: Array,
    session_weight: Array,
    step_weight: Array,
    place_weight: Array,
    item_weight: Array,
    n_newest: int,
    n_neighbours: int,
) -> tuple[Array, Array, Array]:
    longest = step_weight.shape[0]
    item = np.empty(longest, np.int64)  # different items of the open session, newest first
    place = np.empty(longest, np.int64)  # of each, its last
    head = np.empty(longest, np.int64)  # in its list of sessions
    session = np.empty(n_newest, np.int64)  # compared, newest first
    similarity = np.empty(n_newest)
    shared = np.empty(n_newest, np.int64)  # newest shared item of each, as an index into `item`
    total = np.zeros(len(item_weight))
    touched = np.empty(len(item_weight), np.int64)
    is_touched = np.zeros(len(item_weight), np.bool_)
    n_rows = len(start) - 1
    out_start = np.zeros(n_rows + 1, np.int64)
    out_items, out_scores = np.empty(1024, np.int32), np.empty(1024, np.float32)
    for row in range(n_rows):
        length = start[row + 1] - start[row]
        n_items = 0
        for p in range(length - 1, -1, -1):
            i = values[start[row] + p]
            is_new = True
            for j in range(n_items):
                is_new = is_new and item[j] != i
            if is_new:
                item[n_items], place[n_items], head[n_items] = i, p, item_start[i]
                n_items += 1

        # Merge the items' lists: each step takes the newest session that is next in any of them.
        n = 0
        while n < n_newest:
            nearest = len(session_weight)
            for j in range(n_items):
                if head[j] < item_start[item[j] + 1]:
                    nearest = min(nearest, item_sessions[head[j]])
            if nearest == len(session_weight):
                break
            session[n], similarity[n], shared[n] = nearest, 0.0, -1
            for j in range(n_items):
                if head[j] < item_start[item[j] + 1] and item_sessions[head[j]] == nearest:
                    head[j] += 1
                    similarity[n] += opened_weight[length, place[j]]
                    if shared[n] < 0:
                        shared[n] = j
            similarity[n] *= session_weight[nearest]
            n += 1

        n_touched = 0
        for neighbour in np.argsort(-similarity[:n], kind="mergesort")[:n_neighbours]:
            first, last = session_start[session[neighbour]], session_start[session[neighbour] + 1]
            j = shared[neighbour]
            factor = similarity[neighbour] * step_weight[length - 1 - place[j]]
            there = 0
            for e in range(first, last):
                if session_items[e] == item[j]:
                    there = session_places[e]
            for e in range(first, last):
                i = session_items[e]
                if not is_touched[i]:
                    is_touched[i] = True
                    touched[n_touched] = i
                    n_touched += 1
                total[i] += factor * place_weight[abs(session_places[e] - there)]

        if out_start[row] + n_touched > len(out_items):
            size = 2 * (out_start[row] + n_touched)
            more_items, more_scores = np.empty(size, np.int32), np.empty(size, np.float32)
            more_items[: out_start[row]] = out_items[: out_start[row]]
            more_scores[: out_start[row]] = out_scores[: out_start[row]]
            out_items, out_scores = more_items, more_scores
        at = out_start[row]
        for i in np.sort(touched[:n_touched]):
            out_items[at], out_scores[at] = i, total[i] * item_weight[i]
            total[i], is_touched[i] = 0.0, False
            at += 1
        out_start[row + 1] = at
    return out_start, out_items[: out_start[-1]], out_scores[: out_start[-1]]
