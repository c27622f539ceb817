"""The part of a history that a next-item model reads at scoring: last session, or newest items."""

from __future__ import annotations

import numpy as np

from recspark.data.blocks import Array, Histories, Ragged, local_index
from recspark.data.training_rows import Unit


def contexts(history: Histories, items: Array, unit: Unit, length: int) -> Ragged:
    """Return the newest `length` known items of each row, in time order: local indices, int64.

    An item that a row has several times is returned several times.

    Parameters
    ----------
    history : newest event last
    items : item_idx int32 (n_items,), ascending: the vocabulary. Other items are left out before
        the newest `length` are taken
    unit : `session` = only the last session of a row counts; `history` = all events of a row count

    Example: the vocabulary is [10, 20, 30], and a row has the items 10, 20 | 30, 99, 20 (a bar
    between two sessions). By session, with `length` 9, the result is [2, 1]. By history, with
    `length` 3, it is [1, 2, 1].
    """
    first, end = history.start[:-1], history.start[1:]  # of each row, as indices of events
    begin = first  # of each row: the first event that counts
    if unit == "session" and len(history.item_idx):
        starts_session = history.session_starts
        # (n_events,): index of the first event of the session that the event belongs to
        session_start = np.maximum.accumulate(
            np.where(starts_session, np.arange(len(starts_session)), 0)
        )
        begin = np.where(end > first, session_start[np.maximum(end, 1) - 1], first)
    local = local_index(items, history.item_idx)
    rows = history.rows
    is_kept = (local >= 0) & (np.arange(len(local)) >= begin[rows])
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept)])
    kept_position = n_kept_before[:-1]  # position of an event among the kept events of all rows
    is_kept &= kept_position >= n_kept_before[end][rows] - length
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept)])
    return Ragged(n_kept_before[history.start], local[is_kept])
