"""What of a history a next-item model answers from: the open session, or the newest items."""

from __future__ import annotations

import numpy as np

from recspark.data.blocks import Array, Histories, Ragged
from recspark.data.windows import Unit
from recspark.models.scoring.topk import local_index


def contexts(history: Histories, items: Array, unit: Unit, length: int) -> Ragged:
    """Return each row's newest `length` known items, in time order: local, int64, repeats kept.

    Parameters
    ----------
    history : newest last
    items : int32 (n_items,) ascending: the vocabulary; other items are left out before the newest
        are taken
    unit : `session`: only those of the row's last session count; `history`: all do
    """
    first, last = history.start[:-1], history.start[1:]
    begin = first
    if unit == "session" and len(history.item_idx):
        starts = history.session_starts
        newest = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
        begin = np.where(last > first, newest[np.maximum(last, 1) - 1], first)
    local = local_index(items, history.item_idx)
    rows = history.rows
    kept = (local >= 0) & (np.arange(len(local)) >= begin[rows])
    before = np.concatenate([[0], np.cumsum(kept)])
    place = before[:-1]  # of an event among the kept ones
    kept &= place >= before[last][rows] - length
    before = np.concatenate([[0], np.cumsum(kept)])
    return Ragged(before[history.start], local[kept])
