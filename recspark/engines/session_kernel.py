"""The compiled inner loop of session kNN.

For each open session it finds the most similar sessions, its neighbours, and scores their items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import Array, Ragged
from recspark.engines.compiled import compiled
from recspark.engines.session_index import SessionIndex

Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Weights:
    """The weights and factors in which the methods of session kNN differ; all float64.

    An open session is a session whose next items are predicted. L is the largest number of items
    that an open session may have.

    Parameters
    ----------
    opened : (L + 1, L), what an item that a neighbour shares with the open session adds to their
        similarity: `opened[length, position]` for an open session of `length` items, by the item's
        `position` in it, from 0
    session : (n_sessions,), factor of a neighbour's similarity
    step : (L,), factor of a neighbour's similarity, by the number of items that follow the newest
        shared item in the open session
    distance : (L,), factor of a neighbour's item, by its distance in items from the newest shared
        item in the neighbour
    item : (n_items,), factor of an item's score
    """

    opened: Array
    session: Array
    step: Array
    distance: Array
    item: Array


def next_items(
    opened: Ragged, index: SessionIndex, weights: Weights, n_newest: int, n_neighbours: int
) -> tuple[Array, Array, Array]:
    """Return start int64 (n + 1,), items int32 ascending and scores float32 of each open session.

    Of the sessions that share an item with the open one, the `n_newest` newest are compared. The
    `n_neighbours` most similar of those are its neighbours (ties: the newest first). The scores of
    the neighbours' items add up in that order, in float64.

    Example: the open session is (a, b), and three sessions share an item with it: (b, c), (a, d)
    and (e, a). With `n_newest` = 2 only the two newest of the three are compared. If these are
    (b, c) and (a, d), the result has the items a, b, c and d; c gets the similarity of (b, c) times
    `step[0]` (nothing follows b in the open session) times `distance[1]` (c is one item from b).

    Cost of one open session: n_newest * (number of its different items) steps to merge the items'
    lists of sessions, sorting `n_newest` similarities, and the items of `n_neighbours` sessions.
    """
    start, items, scores = _next_items(
        (opened.start, opened.values),
        (index.session_start, index.session_items, index.session_places),
        (index.item_start, index.item_sessions),
        (weights.opened, weights.session, weights.step, weights.distance, weights.item),
        n_newest,
        n_neighbours,
    )
    return start, items, scores


@compiled
def _next_items(
    opened: Arrays,
    index_by_session: Arrays,
    index_by_item: Arrays,
    weights: Arrays,
    n_newest: int,
    n_neighbours: int,
) -> tuple[Array, Array, Array]:
    start, values = opened
    _, _, step_weight, _, item_weight = weights
    longest = len(step_weight)
    # Scratch memory, used again for each open session.
    items = np.empty(longest, np.int64)  # different items of the open session, newest first
    positions = np.empty(longest, np.int64)  # last position of each of `items` in the open session
    compared = np.empty(n_newest, np.int64)  # the compared sessions, newest first
    similarity = np.empty(n_newest)  # of each compared session
    shared = np.empty(n_newest, np.int64)  # newest shared item of each, as a position in `items`
    total = np.zeros(len(item_weight))  # score of each item, before the factor of the item
    touched = np.empty(len(item_weight), np.int64)  # the items with a score
    is_touched = np.zeros(len(item_weight), np.bool_)

    n_open = len(start) - 1
    out_start = np.zeros(n_open + 1, np.int64)
    out_items, out_scores = np.empty(1024, np.int32), np.empty(1024, np.float32)
    for row in range(n_open):
        open_session = values[start[row] : start[row + 1]]
        n_items = _different_items(open_session, items, positions)
        n_compared = _compare(
            len(open_session),
            (items[:n_items], positions[:n_items]),
            index_by_item,
            weights,
            (compared, similarity, shared),
        )
        most_similar = np.argsort(-similarity[:n_compared], kind="mergesort")[:n_neighbours]
        n_touched = 0
        for neighbour in most_similar:
            shared_item = items[shared[neighbour]]
            n_after = len(open_session) - 1 - positions[shared[neighbour]]
            factor = similarity[neighbour] * step_weight[n_after]
            n_touched = _add_items(
                compared[neighbour],
                shared_item,
                factor,
                index_by_session,
                weights,
                (total, touched, is_touched),
                n_touched,
            )

        begin, end = out_start[row], out_start[row] + n_touched
        if end > len(out_items):
            out_items, out_scores = _grown(out_items, out_scores, begin, 2 * end)
        scored = np.sort(touched[:n_touched])
        for index in range(n_touched):
            item = scored[index]
            out_items[begin + index], out_scores[begin + index] = (
                item,
                total[item] * item_weight[item],
            )
            total[item], is_touched[item] = 0.0, False
        out_start[row + 1] = end
    return out_start, out_items[: out_start[-1]], out_scores[: out_start[-1]]


@compiled
def _different_items(open_session: Array, items: Array, positions: Array) -> int:
    """Fill `items` with the different items of the open session, newest first, and `positions` with
    the last position of each. Return the number of different items.
    """
    n_items = 0
    for position in range(len(open_session) - 1, -1, -1):
        is_new = True
        for index in range(n_items):
            is_new = is_new and items[index] != open_session[position]
        if is_new:
            items[n_items], positions[n_items] = open_session[position], position
            n_items += 1
    return n_items


@compiled
def _compare(
    length: int, open_items: Arrays, index_by_item: Arrays, weights: Arrays, neighbours: Arrays
) -> int:
    """Fill `neighbours` with the newest sessions that share an item with the open session.

    `length` is the number of items of the open session, repeats included. `neighbours` holds, for
    each of these sessions, its number, its similarity and its newest shared item. Return the number
    of these sessions.

    The sessions of each item are a list, newest first. The lists are merged: each step takes the
    newest session that is next in any list, and moves one step on in every list that has this
    session.

    Example: item a is in the sessions 0 and 4, item b in 0 and 2 (0 is the newest). The steps take
    session 0 (from both lists), session 2 and session 4.
    """
    items, positions = open_items
    item_start, item_sessions = index_by_item
    opened_weight, session_weight, _, _, _ = weights
    sessions, similarity, shared = neighbours
    n_sessions = len(session_weight)
    next_in_list = item_start[items]
    n_compared = 0
    while n_compared < len(sessions):
        newest_session = n_sessions
        for list_index in range(len(items)):
            if next_in_list[list_index] < item_start[items[list_index] + 1]:
                newest_session = min(newest_session, item_sessions[next_in_list[list_index]])
        if newest_session == n_sessions:  # every list is at its end
            break
        sessions[n_compared], similarity[n_compared], shared[n_compared] = newest_session, 0.0, -1
        for list_index in range(len(items)):
            has_next = next_in_list[list_index] < item_start[items[list_index] + 1]
            if has_next and item_sessions[next_in_list[list_index]] == newest_session:
                next_in_list[list_index] += 1
                similarity[n_compared] += opened_weight[length, positions[list_index]]
                if shared[n_compared] < 0:
                    shared[n_compared] = list_index
        similarity[n_compared] *= session_weight[newest_session]
        n_compared += 1
    return n_compared


@compiled
def _add_items(
    neighbour: int,
    shared_item: int,
    factor: float,
    index_by_session: Arrays,
    weights: Arrays,
    scores: Arrays,
    n_touched: int,
) -> int:
    """Add the scores of a neighbour's items. Return the number of items with a score so far."""
    session_start, session_items, session_places = index_by_session
    _, _, _, distance_weight, _ = weights
    total, touched, is_touched = scores
    begin, end = session_start[neighbour], session_start[neighbour + 1]
    shared_place = 0
    for entry in range(begin, end):
        if session_items[entry] == shared_item:
            shared_place = session_places[entry]
    for entry in range(begin, end):
        item = session_items[entry]
        if not is_touched[item]:
            is_touched[item] = True
            touched[n_touched] = item
            n_touched += 1
        total[item] += factor * distance_weight[abs(session_places[entry] - shared_place)]
    return n_touched


@compiled
def _grown(items: Array, scores: Array, length: int, size: int) -> tuple[Array, Array]:
    """Return arrays of `size` elements that begin with the first `length` items and scores."""
    grown_items, grown_scores = np.empty(size, np.int32), np.empty(size, np.float32)
    grown_items[:length], grown_scores[:length] = items[:length], scores[:length]
    return grown_items, grown_scores
