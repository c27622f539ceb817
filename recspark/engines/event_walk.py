"""One walk through a window of events in time order, for the model `coevolve`.

The walk computes everything that does not depend on the weights of the network: how long ago a user
and an item last acted, in which order events can be computed side by side, and, for the survival
term of the likelihood, what a few other items and users looked like just before each event.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recspark.data.blocks import MICROS_PER_DAY, Array
from recspark.engines.compiled import compiled_in_order

SHORTEST_GAP_DAYS = 1 / 86_400  # a gap of less than a second counts as one second


@dataclass
class Clocks:
    """What has happened so far; a walk changes it in place.

    Parameters
    ----------
    user_at, item_at : int64 (n_users,), (n_items,): the time of the last event, in microseconds
        since 1970 UTC; before the first event, the time at which the observation began
    recent_items : int32 (n_users, n_recent): the user's newest distinct items, newest first, padded
        with -1
    recent_users : int32 (n_items, n_recent): the item's newest distinct users, likewise
    """

    user_at: Array
    item_at: Array
    recent_items: Array
    recent_users: Array

    @classmethod
    def started(cls, n_users: int, n_items: int, n_recent: int, origin: int) -> Clocks:
        """Return the clocks at `origin`, before the first event."""
        return cls(
            np.full(n_users, origin, np.int64),
            np.full(n_items, origin, np.int64),
            np.full((n_users, n_recent), -1, np.int32),
            np.full((n_items, n_recent), -1, np.int32),
        )


@dataclass(frozen=True)
class Others:
    """For each event of a window, the other side of pairs that may have acted: (W, C) each.

    Parameters
    ----------
    ids : int32, items (or users); -1 = nothing
    slot : int32, the event of the window that made the state which was valid just before the event
        of the row; -1 = the state at the beginning of the window
    gap : float32, days since the last event of the user or the item of the pair, whichever is later
    place : int32, place of the pair's item among the newest distinct items of the pair's user, from
        0; n_recent = not among them
    weight : float32, how many pairs this one stands for
    """

    ids: Array
    slot: Array
    gap: Array
    place: Array
    weight: Array


@dataclass(frozen=True)
class Walk:
    """What a walk gives for the W events of a window; arrays are (W,).

    Parameters
    ----------
    level : int32. An event is one level above the last event of its user or its item in the
        window, whichever is higher, else 0. So no user and no item is twice in a level, and the
        events of a level can be computed side by side (t-batches, Kumar et al. 2019)
    user_slot, item_slot : int32, as `Others.slot`
    user_gap, item_gap : float32, days since the last event of the user, of the item
    place : int32, as `Others.place`
    user_place : int32, place of the user among the newest distinct users of the item
    items : items whose pair with the user of the event may have acted. Column 0 is the item of the
        event, the next `n_recent` columns are the user's newest items, then come the sampled items
    users : users whose pair with the item of the event may have acted, without the user of the
        event: first the item's newest users, then the sampled users
    """

    level: Array
    user_slot: Array
    item_slot: Array
    user_gap: Array
    item_gap: Array
    place: Array
    user_place: Array
    items: Others
    users: Others


def walk(
    clocks: Clocks,
    user: Array,
    item: Array,
    event_at: Array,
    sampled_items: Array,
    sampled_users: Array,
) -> Walk:
    """Walk through the events of a window, and move `clocks` on to its end.

    Parameters
    ----------
    user, item : int32 (W,), local indices
    event_at : int64 (W,), microseconds since 1970 UTC, not decreasing
    sampled_items, sampled_users : int32, distinct: a uniform sample of all items, of all users. One
        sample serves all events of the window; those of them that are in other columns of a row get
        weight 0, and the rest stand for all others

    Example: the events (u0, i0), (u1, i0), (u1, i1), (u2, i2) have the levels 0, 1, 2, 0.

    Cost: W * (samples) * n_recent comparisons, compiled.
    """
    n_events, n_recent = len(user), clocks.recent_items.shape[1]
    columns = 1 + n_recent + len(sampled_items), n_recent + len(sampled_users)
    single = [np.empty(n_events, np.int32) for _ in range(5)]
    gaps = [np.empty(n_events, np.float32) for _ in range(2)]
    others = [
        (
            np.full((n_events, width), -1, np.int32),
            np.full((n_events, width), -1, np.int32),
            np.full((n_events, width), SHORTEST_GAP_DAYS, np.float32),
            np.full((n_events, width), n_recent, np.int32),
            np.zeros((n_events, width), np.float32),
        )
        for width in columns
    ]
    user_slots = np.full(len(clocks.user_at), -1, np.int32)
    item_slots = np.full(len(clocks.item_at), -1, np.int32)
    _walk(
        (clocks.user_at, clocks.item_at, clocks.recent_items, clocks.recent_users),
        (user.astype(np.int32), item.astype(np.int32), event_at.astype(np.int64)),
        (sampled_items.astype(np.int32), sampled_users.astype(np.int32)),
        (user_slots, item_slots),
        (single[0], single[1], single[2], single[3], single[4]),
        (gaps[0], gaps[1]),
        others[0],
        others[1],
    )
    level, user_slot, item_slot, place, user_place = single
    return Walk(
        level,
        user_slot,
        item_slot,
        gaps[0],
        gaps[1],
        place,
        user_place,
        Others(*others[0]),
        Others(*others[1]),
    )


@compiled_in_order
def place_of(values: Array, wanted: int) -> int:
    """Return the first position of `wanted` in `values`; the length where it is not in there."""
    for place in range(len(values)):
        if values[place] == wanted:
            return place
    return len(values)


@compiled_in_order
def move_to_front(values: Array, newest: int) -> None:
    """Put `newest` first; what was before it moves back one place, and the last one drops out."""
    last = min(place_of(values, newest), len(values) - 1)
    for place in range(last, 0, -1):
        values[place] = values[place - 1]
    if len(values):
        values[0] = newest


@compiled_in_order
def gap_days(event_at: int, last_at: int) -> float:
    """Return the days from `last_at` to `event_at`; a second at least."""
    return max((event_at - last_at) / MICROS_PER_DAY, SHORTEST_GAP_DAYS)


@compiled_in_order
def _walk(
    clocks: tuple[Array, ...],
    events: tuple[Array, ...],
    samples: tuple[Array, ...],
    slots: tuple[Array, ...],
    single: tuple[Array, ...],
    gaps: tuple[Array, ...],
    items: tuple[Array, ...],
    users: tuple[Array, ...],
) -> None:
    user_at, item_at, recent_items, recent_users = clocks
    user, item, event_at = events
    sampled_items, sampled_users = samples
    user_slots, item_slots = slots
    level, user_slot, item_slot, place, user_place = single
    user_gap, item_gap = gaps
    n_recent = recent_items.shape[1]
    for e in range(len(user)):
        u, i, now = user[e], item[e], event_at[e]
        own, visitors = recent_items[u], recent_users[i]
        user_slot[e], item_slot[e] = user_slots[u], item_slots[i]
        user_gap[e] = gap_days(now, user_at[u])
        item_gap[e] = gap_days(now, item_at[i])
        place[e], user_place[e] = place_of(own, i), place_of(visitors, u)
        level[e] = 0
        if user_slot[e] >= 0:
            level[e] = level[user_slot[e]] + 1
        if item_slot[e] >= 0:
            level[e] = max(level[e], level[item_slot[e]] + 1)

        ids, slot, gap, pair_place, weight = items
        n_certain = 0  # pairs that are counted one by one
        for c in range(1 + n_recent):
            j = i if c == 0 else own[c - 1]
            if j < 0 or (c > 0 and j == i):
                continue
            ids[e, c], slot[e, c], weight[e, c] = j, item_slots[j], 1
            gap[e, c] = gap_days(now, max(user_at[u], item_at[j]))
            pair_place[e, c] = place[e] if c == 0 else c - 1
            n_certain += 1
        n_sampled = 0
        for s in range(len(sampled_items)):
            j = sampled_items[s]
            if j == i or place_of(own, j) < n_recent:
                continue
            c = 1 + n_recent + s
            ids[e, c], slot[e, c] = j, item_slots[j]
            gap[e, c] = gap_days(now, max(user_at[u], item_at[j]))
            n_sampled += 1
        if n_sampled:
            share = (len(item_at) - n_certain) / n_sampled
            for c in range(1 + n_recent, ids.shape[1]):
                if ids[e, c] >= 0:
                    weight[e, c] = share

        ids, slot, gap, pair_place, weight = users
        n_certain = 1  # the user of the event is counted among the items
        for c in range(n_recent):
            v = visitors[c]
            if v < 0 or v == u:
                continue
            ids[e, c], slot[e, c], weight[e, c] = v, user_slots[v], 1
            gap[e, c] = gap_days(now, max(user_at[v], item_at[i]))
            pair_place[e, c] = place_of(recent_items[v], i)
            n_certain += 1
        n_sampled = 0
        for s in range(len(sampled_users)):
            v = sampled_users[s]
            if v == u or place_of(visitors, v) < n_recent:
                continue
            c = n_recent + s
            ids[e, c], slot[e, c] = v, user_slots[v]
            gap[e, c] = gap_days(now, max(user_at[v], item_at[i]))
            pair_place[e, c] = place_of(recent_items[v], i)
            n_sampled += 1
        if n_sampled:
            share = (len(user_at) - n_certain) / n_sampled
            for c in range(n_recent, ids.shape[1]):
                if ids[e, c] >= 0:
                    weight[e, c] = share

        user_slots[u] = item_slots[i] = e
        user_at[u] = item_at[i] = now
        move_to_front(own, i)
        move_to_front(visitors, u)
