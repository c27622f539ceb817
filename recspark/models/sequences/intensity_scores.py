"""The score of `coevolve`: the log of the intensity of each item for a user, at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from recspark.data.blocks import MICROS_PER_DAY, Array, Histories, QueryBlock, local_index
from recspark.engines.compiled import compiled_in_order
from recspark.engines.event_walk import SHORTEST_GAP_DAYS, gap_days, move_to_front, place_of
from recspark.models.scoring import topk
from recspark.models.scoring.candidates import dot_pairs

_UNIT = 2.0**-24  # unit roundoff of float32
# Events of a history that are read where no state of the user is stored: the newest ones
_LONGEST = 512


def item_vectors(arrays: Mapping[str, Array]) -> Array:
    """Return the vectors of all items, float32 (n_items, d + 2); see `CoevolveNet.item_vectors`."""
    vectors = arrays["item_state"] * arrays["item_gate"] + arrays["item_start.weight"]  # (m, d)
    bias = arrays["item_bias.weight"][:, 0] + np.einsum("nd,d->n", vectors, arrays["item_rate"])
    return np.column_stack([vectors, bias, np.ones_like(bias)]).astype(np.float32)


def user_vectors(arrays: Mapping[str, Array], state: Array, own: Array) -> Array:
    """Return the vectors of users with `state` and a start of their `own`, float32 (n, d) each:
    float32 (n, d + 2); see `CoevolveNet.user_vectors`.
    """
    vectors = state * arrays["user_gate"] + arrays["user_start"] + own  # (n, d)
    rate = np.einsum("nd,d->n", vectors, arrays["user_rate"]) + arrays["base"]
    return np.column_stack([vectors, np.ones_like(rate), rate]).astype(np.float32)


@dataclass(frozen=True)
class UserStates:
    """What is known of n users: `state` float32 (n, d), `at` int64 (n,) microseconds since 1970
    UTC, `recent` int32 (n, M) local items, newest first, -1 = none; see `Clocks`.
    """

    state: Array
    at: Array
    recent: Array


@dataclass(frozen=True)
class IntensityScorer:
    """Scores items for users whose states are stored, or computed from their histories.

    A user's stored state is used where the history has the event that the state was last changed
    by; later events of the history change it further. Any other user starts anew, and the newest
    512 events of the history are read. The vectors of items are then those at the cutoff (a stored
    state has met each item as it was at the time). Whatever the history, a user whom the training
    knew keeps the start of their own.

    Parameters
    ----------
    as_of : the moment of the intensity, microseconds since 1970 UTC
    items : item_idx int32 (n_items,), ascending
    vectors : see `item_vectors`
    arrays : see `ARRAYS`, arrays of `CoevolveModel`
    """

    shape: float
    as_of: int
    items: Array
    vectors: topk.Shared
    arrays: Mapping[str, topk.Shared]

    ARRAYS: ClassVar[tuple[str, ...]] = (
        "user_idx", "user_state", "user_at", "recent_items", "item_at", "origin",
        "user_start", "user_own.weight", "user_gate", "user_rate", "base", "place",
        "user_cell.weight_ih", "user_cell.weight_hh", "user_cell.bias_ih", "user_cell.bias_hh",
    )  # fmt: skip

    def score(self, block: QueryBlock) -> IntensityScores:
        """See `topk.Scorer`. A user without a known item in the history gets no list."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        vectors = np.asarray(self.vectors.array)
        local = local_index(self.items, block.history.item_idx)
        row = block.history.rows
        stored = local_index(arrays["user_idx"], block.user_idx)  # (n,): rows of stored states
        users = self._states(block, arrays, vectors, local, stored)
        is_known = (stored >= 0)[:, None]
        own = np.where(is_known, arrays["user_own.weight"][stored], np.float32(0))
        return IntensityScores(
            user_vectors(arrays, users.state, own),
            vectors,
            (self.shape - 1) * _log_gap(self.as_of, users.at),
            (self.shape - 1) * _log_gap(self.as_of, arrays["item_at"]),
            self.shape < 1,
            users.recent,
            arrays["place"].astype(np.float64),
            np.bincount(row[local >= 0], minlength=len(block)) > 0,
        )

    def _states(
        self,
        block: QueryBlock,
        arrays: dict[str, Array],
        vectors: Array,
        local: Array,
        stored: Array,
    ) -> UserStates:
        history, row = block.history, block.history.rows
        is_last = (stored >= 0)[row] & (history.event_at == arrays["user_at"][stored][row])
        if arrays["recent_items"].shape[1]:
            is_last &= local == arrays["recent_items"][stored, 0][row]
        is_carried = np.bincount(row[is_last], minlength=len(block)) > 0  # (n,)
        state = np.where(is_carried[:, None], arrays["user_state"][stored], np.float32(0))
        at = np.where(is_carried, arrays["user_at"][stored], arrays["origin"][0])
        recent = np.where(is_carried[:, None], arrays["recent_items"][stored], np.int32(-1))
        is_new = (local >= 0) & (~is_carried[row] | (history.event_at > at[row]))
        is_new &= np.arange(len(row)) >= history.start[1:][row] - _LONGEST
        users = UserStates(state, at, recent)
        return folded(users, history, is_new, local, arrays, vectors) if is_new.any() else users


def folded(
    users: UserStates,
    history: Histories,
    is_new: Array,
    local: Array,
    arrays: Mapping[str, Array],
    vectors: Array,
) -> UserStates:
    """Return the states of users after the events `is_new`, bool (n_events,), of their histories.

    `local` (n_events,) are the local items of the events. Computed in float64, each row by itself.
    """
    row, item, event_at = history.rows[is_new], local[is_new], history.event_at[is_new]
    at, recent = users.at.copy(), users.recent.copy()
    gap, place = np.empty(len(row)), np.empty(len(row), np.int64)
    _facts(row, item, event_at, at, recent, gap, place)
    facts = np.column_stack([np.log1p(gap * 1440) / 10, place < recent.shape[1], place == 0])
    step = np.arange(len(row)) - np.searchsorted(row, row)  # number of the event in its row
    state = users.state.astype(np.float64)
    size = state.shape[1]
    for number in range(step.max() + 1):
        events = np.flatnonzero(step == number)
        read = np.column_stack([vectors[item[events], :size], facts[events]])  # (b, d + 3)
        state[row[events]] = next_state(arrays, read, state[row[events]])
    return UserStates(state.astype(np.float32), at, recent)


def next_state(arrays: Mapping[str, Array], read: Array, state: Array) -> Array:
    """Return what the users' cell, a `GRUCell` or `RNNCell` of torch, makes of `state`, (b, d)."""

    def layer(values: Array, which: str) -> Array:
        weight = arrays[f"user_cell.weight_{which}"].astype(np.float64)
        # Not a matrix product: its sums depend on the number of rows.
        return np.einsum("bi,oi->bo", values, weight) + arrays[f"user_cell.bias_{which}"]

    from_read, from_state = layer(read, "ih"), layer(state, "hh")
    size = state.shape[1]
    if from_read.shape[1] == size:
        return np.asarray(np.tanh(from_read + from_state))
    reset, update = (
        1 / (1 + np.exp(-(from_read[:, part] + from_state[:, part])))
        for part in (slice(0, size), slice(size, 2 * size))
    )
    new = np.tanh(from_read[:, 2 * size :] + reset * from_state[:, 2 * size :])
    return np.asarray((1 - update) * new + update * state)


@compiled_in_order
def _facts(
    row: Array, item: Array, event_at: Array, at: Array, recent: Array, gap: Array, place: Array
) -> None:
    """Fill `gap` and `place` of each event, and move `at` and `recent` on, as a walk does."""
    for e in range(len(row)):
        values = recent[row[e]]
        place[e] = place_of(values, item[e])
        gap[e] = gap_days(event_at[e], at[row[e]])
        at[row[e]] = event_at[e]
        move_to_front(values, item[e])


def _log_gap(as_of: int, at: Array) -> Array:
    """Return the log of the days since `at`, float64; a second at least."""
    return np.asarray(np.log(np.maximum((as_of - at) / MICROS_PER_DAY, SHORTEST_GAP_DAYS)))


@dataclass(frozen=True)
class IntensityScores:
    """Scores of all items: users @ items.T + the time's part + the part of the user's own items.

    Parameters
    ----------
    users, items : float32 (n, d + 2), (m, d + 2)
    user_time, item_time : float64 (n,), (m,): (shape - 1) log(days since the last event). The
        shorter of both gaps counts: the larger of both numbers where `shape_below_1`, else the
        smaller
    recent : int32 (n, M), local items, distinct, -1 = none: item of place p gets `place[p]` more
    place : float64 (M,)
    known : bool (n,)
    """

    users: Array
    items: Array
    user_time: Array
    item_time: Array
    shape_below_1: bool
    recent: Array
    place: Array
    known: Array

    def approximate(self, rows: slice) -> Array:
        """See `topk.Scores`."""
        out = np.asarray(self.users[rows] @ self.items.T)
        user_time = self.user_time[rows].astype(np.float32)[:, None]
        item_time = self.item_time.astype(np.float32)[None, :]
        out += self._shorter(user_time, item_time)
        row, place = np.nonzero(self.recent[rows] >= 0)
        out[row, self.recent[rows][row, place]] += self.place[place].astype(np.float32)
        return out

    def exact(self, rows: Array, items: Array) -> Array:
        """See `topk.Scores`."""
        scores = dot_pairs(self.users, self.items, rows, items)
        scores += self._shorter(self.user_time[rows], self.item_time[items])
        is_own = self.recent[rows] == items[:, None]  # (p, M): True once at most in a row
        return np.asarray(scores + is_own @ self.place)

    def error(self, rows: slice) -> Array:
        """See `topk.Scores`. The bound of `DotScores`, with three more terms in the sum."""
        n_terms = self.items.shape[1] + 8
        gamma = n_terms * _UNIT / (1 - n_terms * _UNIT)
        user_lengths = np.sqrt(np.square(self.users[rows], dtype=np.float64).sum(axis=1))
        terms = user_lengths * self._longest_item + self._largest_time
        terms += np.abs(self.user_time[rows]) + np.abs(self.place).max(initial=0.0)
        return np.asarray(gamma * terms + n_terms * float(np.finfo(np.float32).tiny))

    def _shorter(self, user_time: Array, item_time: Array) -> Array:
        pick = np.maximum if self.shape_below_1 else np.minimum
        return np.asarray(pick(user_time, item_time))

    @cached_property
    def _longest_item(self) -> float:
        squares = np.square(self.items, dtype=np.float64).sum(axis=1)
        return float(np.sqrt(squares.max(initial=0.0)))

    @cached_property
    def _largest_time(self) -> float:
        return float(np.abs(self.item_time).max(initial=0.0))
