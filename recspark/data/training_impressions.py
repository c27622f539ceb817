"""Impressions (items that users were shown) beside acts, as fixed-length rows for networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features
from recspark.data.blocks import Array, Histories, micros, parse_histories
from recspark.data.training_rows import (
    NO_ITEM,
    Unit,
    earlier,
    fixed_lists,
    sequences,
    spread,
    window_columns,
)

_FIELDS = ("event_at", "item_idx", "session_id")  # of an act or an impression
# Training table -> what is cut into its rows: each session, or the whole history.
TABLES: dict[str, Unit] = {
    "training_session_impressions": "session",
    "training_history_impressions": "history",
}


def impressions(
    sessions: DataFrame, user_ids: DataFrame, item_ids: DataFrame, cutoff: datetime
) -> DataFrame:
    """Return `user_idx, shown`: the items that each user was shown before `cutoff`.

    `shown` is array<struct<event_at, item_idx, session_id>>, in time order. Sessions without a user
    are left out, and so are users without impressions. `user_ids` and `item_ids` are the
    dictionaries. Lazy. Cost: the dictionaries are joined to the sessions with impressions, then
    the impressions are shuffled by user once.
    """
    impression = F.explode("shown").alias("one")
    rows = (
        sessions.where((F.size("shown") > 0) & F.col("user_id").isNotNull())
        .select("user_id", "session_id", impression)
        .select("user_id", "session_id", "one.event_at", "one.item_id")
        .where(F.col("event_at") < F.lit(cutoff))
    )
    return (
        rows.join(user_ids.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(item_ids.select("item_id", "item_idx"), on="item_id", how="inner")
        .groupBy("user_idx")
        .agg(F.sort_array(F.collect_list(F.struct(*_FIELDS))).alias("shown"))
    )


def training_impressions(
    histories: DataFrame,
    shown: DataFrame,
    cutoff: datetime,
    features: Features,
    n_files: int,
    *,
    unit: Unit,
) -> DataFrame:
    """Return the rows of `training_rows.training_sequences`, with the impressions between their items.

    Parameters
    ----------
    histories : user_idx, history (newest last, may be null or empty)
    shown : as `impressions` returns them
    cutoff : events at or after this time are left out; UTC
    features : see `training_rows.training_sequences`; `max_shown` = M
    n_files : see `training_rows.training_bags`
    unit : what is cut into windows: each `session`, or the whole `history`

    Returns
    -------
    `schema.TRAINING_IMPRESSIONS`. Each row has its newest M impressions among those that come after
    one of its items. `shown` are their items in time order, padded with -1 to M. Beside each
    impression, `shown_after` is the number of items of the row before the impression, at least 1,
    and `clicked` is 1 where the user acted on the item later in the same session, else 0. Where an
    impression and an act have equal times, the impression comes first. A sequence of one item is a
    row only where something was shown after the item. Lazy. Cost: a shuffle of histories and of
    impressions by user, and a shuffle that spreads the rows.
    """
    as_of, max_shown = micros(cutoff), features.max_shown
    length, newest = features.sequence_length, features.max_training_items

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = earlier(parse_histories(batch.column("history")), as_of)
            shown_before = earlier(parse_histories(batch.column("shown")), as_of)
            row, position, items, lengths, *impression_arrays = sequences_shown(
                history, shown_before, unit, length, newest, max_shown
            )
            yield pa.RecordBatch.from_arrays(
                [
                    *window_columns(batch, as_of, row, position, items, lengths),
                    *[fixed_lists(values) for values in impression_arrays],
                ],
                names=schema.TRAINING_IMPRESSIONS.names,
            )

    acts = F.transform(
        "history", lambda event: F.struct(*[event[name].alias(name) for name in _FIELDS])
    )
    acts_and_shown = histories.select("user_idx", acts.alias("history")).join(
        shown, on="user_idx", how="left"
    )
    packed = acts_and_shown.mapInArrow(pack, schema.TRAINING_IMPRESSIONS)
    return spread(packed, F.xxhash64("user_idx", "position"), n_files)


def sequences_shown(
    history: Histories, shown: Histories, unit: Unit, length: int, newest: int, max_shown: int
) -> tuple[Array, ...]:
    """Return the arrays of `training_rows.sequences`, and beside them shown, shown_after and clicked.

    The last three are int32 (n, max_shown) for n windows; see `training_impressions`. Acts
    (`history`) and impressions (`shown`) are in time order, with their `session_id`, and have the
    same rows. An impression belongs to the window that has the act before the impression. Where two
    windows share that act, the impression belongs to the older window, which has read more items by
    then.

    Example: one session of the acts a b c; item x was shown between a and b, and item b between x
    and the act on b. With `length` 3 this is one window with items [a, b, c], shown [x, b],
    shown_after [1, 1] and clicked [0, 1].
    """
    row, position, items, lengths = sequences(history, unit, length, newest, shortest=1)
    shown_items = np.full((len(row), max_shown), NO_ITEM, np.int32)
    shown_after, clicked = np.zeros_like(shown_items), np.zeros_like(shown_items)
    if len(row):  # n windows, S impressions
        next_act = _next_acts(history, shown)  # (S,)
        session, has_begun = _sessions(history, shown, next_act)  # (S,) each
        follows_an_act = has_begun if unit == "session" else next_act > history.start[shown.rows]
        begin = history.start[row] + position  # (n,)
        window = _windows(begin, begin + lengths, next_act - 1)  # (S,)
        kept = np.flatnonzero(follows_an_act & (window >= 0))  # indices of kept impressions
        kept = kept[np.argsort(window[kept], kind="stable")]  # by window, each in time order
        end_of_window = np.cumsum(np.bincount(window[kept], minlength=len(row)))  # (n,), in `kept`
        kept = kept[end_of_window[window[kept]] - np.arange(len(kept)) <= max_shown]  # the newest
        window = window[kept]
        column = np.arange(len(kept)) - np.searchsorted(window, window)
        shown_items[window, column] = shown.item_idx[kept]
        shown_after[window, column] = next_act[kept] - begin[window]
        clicked[window, column] = _acted_on(history, shown, session)[kept]
    has_examples = (lengths > 1) | (shown_items[:, 0] != NO_ITEM)
    return tuple(
        array[has_examples]
        for array in (row, position, items, lengths, shown_items, shown_after, clicked)
    )


def _next_acts(history: Histories, shown: Histories) -> Array:
    """Return the position of the first act at or after each impression, int64 (S,).

    A position counts the acts of all rows from 0, as in the arrays of `history`. For an impression
    after the last act of its row, it is the position where the next row begins.
    """
    # All impressions, then all acts; sorted by row and time, an impression before an act at the
    # same time. The number of acts up to an impression is the position of the act after it.
    rows = np.concatenate([shown.rows, history.rows])
    event_at = np.concatenate([shown.event_at, history.event_at])
    is_act = np.arange(len(rows)) >= len(shown.item_idx)
    order = np.lexsort((is_act, event_at, rows))
    n_acts = np.zeros(len(rows), np.int64)  # up to and including each event
    n_acts[order] = np.cumsum(is_act[order])
    return n_acts[~is_act]


def _sessions(history: Histories, shown: Histories, next_act: Array) -> tuple[Array, Array]:
    """Return the session of each impression, int64 (S,), and whether it has begun, bool (S,).

    It has begun where the act before the impression is of the same session.

    Only the acts next to the impression are looked at: the one before it and the one after it
    (`next_act`, as `_next_acts` returns it). Sessions are numbered from 1 in the order of their
    acts; 0 means that neither act is of the impression's session. `history` has at least one act.
    """
    assert history.session_id is not None
    assert shown.session_id is not None
    session_number, act_session_ids, shown_session_ids = (
        np.cumsum(history.session_starts),  # of each act
        history.session_id,
        shown.session_id,
    )

    # Whether each act is of the impression's row and session, and the number of the act's session.
    def is_session_of(act: Array) -> tuple[Array, Array]:
        is_in_row = (act >= history.start[shown.rows]) & (act < history.start[shown.rows + 1])
        act = np.clip(act, 0, len(session_number) - 1)
        has_equal_id = pc.equal(act_session_ids.take(pa.array(act)), shown_session_ids).fill_null(
            False
        )
        return is_in_row & has_equal_id.to_numpy(zero_copy_only=False), session_number[act]

    (has_begun, session_before), (goes_on, session_after) = (
        is_session_of(next_act - 1),
        is_session_of(next_act),
    )
    return np.where(has_begun, session_before, np.where(goes_on, session_after, 0)), has_begun


def _windows(begin: Array, end: Array, positions: Array) -> Array:
    """Return the index of the window [begin, end) that has each position, int64 (S,); -1 = none.

    Two windows share at most one position, the last of the older and the first of the newer window.
    The older window gets the shared position.

    Example: the windows [0, 3) and [2, 5) have the positions 0, 2, 4 and 6 in the windows 0, 0, 1
    and -1.
    """
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    older = np.searchsorted(begin, positions) - 1  # the last window that begins before the position
    newer = np.minimum(older + 1, len(begin) - 1)
    is_in_older = (older >= 0) & (positions < end[older])
    window = np.where(is_in_older, older, np.where(begin[newer] == positions, newer, -1))
    return np.where(window >= 0, order[window], -1)


def _acted_on(history: Histories, shown: Histories, session: Array) -> Array:
    """Return 1 where an act on the shown item follows in the same session, else 0: int64 (S,)."""
    n_items = 1 + max(history.item_idx.max(initial=0), shown.item_idx.max(initial=0))
    # One key per pair of session and item.
    keys = np.cumsum(history.session_starts) * int(n_items) + history.item_idx
    order = np.lexsort((history.event_at, keys))
    keys, event_at = keys[order], history.event_at[order]
    shown_keys = session * int(n_items) + shown.item_idx
    newest_act = np.searchsorted(keys, shown_keys, side="right") - 1  # with the key, or a smaller
    has_act = (newest_act >= 0) & (keys[newest_act] == shown_keys)
    return (has_act & (event_at[newest_act] >= shown.event_at)).astype(np.int64)
