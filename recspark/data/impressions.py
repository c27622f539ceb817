"""Impressions: what users were shown, beside what they did, as fixed-length rows for networks."""

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
from recspark.data.windows import (
    NO_ITEM,
    Unit,
    earlier,
    fixed_lists,
    sequences,
    spread,
    window_columns,
)

_FIELDS = ("event_at", "item_idx", "session_id")  # of an act or an impression
# training table -> what ends a row of it
TABLES: dict[str, Unit] = {
    "training_session_impressions": "session",
    "training_history_impressions": "history",
}


def impressions(
    sessions: DataFrame, user_ids: DataFrame, item_ids: DataFrame, cutoff: datetime
) -> DataFrame:
    """Return `user_idx, shown`: what each user was shown before `cutoff`.

    `shown` array<struct<event_at, item_idx, session_id>>, in time order. Sessions without a user are
    left out, and so are users without impressions. Lazy. Cost: the dictionaries joined to sessions
    with impressions, then one shuffle of those by user.
    """
    one = F.explode("shown").alias("one")
    rows = (
        sessions.where((F.size("shown") > 0) & F.col("user_id").isNotNull())
        .select("user_id", "session_id", one)
        .select("user_id", "session_id", "one.event_at", "one.item_id")
        .where(F.col("event_at") < F.lit(cutoff))
    )
    return (
        rows.join(user_ids.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(F.broadcast(item_ids.select("item_id", "item_idx")), on="item_id", how="inner")
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
    """Return the rows of `windows.training_sequences` with what was shown on the way.

    Parameters
    ----------
    histories : user_idx, history (newest last, may be null or empty)
    shown : as `impressions` returns them
    cutoff : events from it on are left out; UTC
    features : see `windows.training_sequences`; `max_shown` = M
    n_files : see `windows.training_bags`
    unit : whose end ends a row: `session` or `history`

    Returns
    -------
    `schema.TRAINING_IMPRESSIONS`. `shown` in time order, padded with -1 to M: the row's newest
    impressions that come after one of its items. Beside each, `shown_after` = items of the row before
    it, at least 1, and `clicked` = 1 where the user acted on the item later in the same session. Times
    that are equal put an impression before an act. A sequence of one item is a row where something was
    shown after it. Lazy. Cost: a shuffle of histories and of impressions by user, and one that spreads
    the rows.
    """
    as_of, most = micros(cutoff), features.max_shown
    length, newest = features.sequence_length, features.max_training_items

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = earlier(parse_histories(batch.column("history")), as_of)
            before = earlier(parse_histories(batch.column("shown")), as_of)
            row, position, items, lengths, *found = sequences_shown(
                history, before, unit, length, newest, most
            )
            yield pa.RecordBatch.from_arrays(
                [
                    *window_columns(batch, as_of, row, position, items, lengths),
                    *[fixed_lists(values) for values in found],
                ],
                names=schema.TRAINING_IMPRESSIONS.names,
            )

    acts = F.transform("history", lambda e: F.struct(*[e[name].alias(name) for name in _FIELDS]))
    both = histories.select("user_idx", acts.alias("history")).join(
        shown, on="user_idx", how="left"
    )
    packed = both.mapInArrow(pack, schema.TRAINING_IMPRESSIONS)
    return spread(packed, F.xxhash64("user_idx", "position"), n_files)


def sequences_shown(
    history: Histories, shown: Histories, unit: Unit, length: int, newest: int, most: int
) -> tuple[Array, ...]:
    """Return what `windows.sequences` does, and shown, shown_after and clicked, int32 (n, most) each.

    See `training_impressions`. Events of both are in time order, with their `session_id`. An
    impression belongs to the window with the act before it, of two that share the act to the older
    one, which has read more.
    """
    row, position, items, lengths = sequences(history, unit, length, newest, shortest=1)
    what = np.full((len(row), most), NO_ITEM, np.int32)
    after, clicked = np.zeros_like(what), np.zeros_like(what)
    if len(row):
        upcoming = _next_acts(history, shown)  # (S,)
        session, begun = _sessions(history, shown, upcoming)  # (S,) each
        usable = begun if unit == "session" else upcoming > history.start[shown.rows]
        begin = history.start[row] + position  # (n,)
        window = _windows(begin, begin + lengths, upcoming - 1)  # (S,)
        kept = np.flatnonzero(usable & (window >= 0))
        kept = kept[np.argsort(window[kept], kind="stable")]  # of a window, in time order
        last = np.cumsum(np.bincount(window[kept], minlength=len(row)))
        kept = kept[last[window[kept]] - np.arange(len(kept)) <= most]
        window = window[kept]
        column = np.arange(len(kept)) - np.searchsorted(window, window)
        what[window, column] = shown.item_idx[kept]
        after[window, column] = upcoming[kept] - begin[window]
        clicked[window, column] = _acted_on(history, shown, session)[kept]
    kept = (lengths > 1) | (what[:, 0] != NO_ITEM)
    return tuple(a[kept] for a in (row, position, items, lengths, what, after, clicked))


def _next_acts(history: Histories, shown: Histories) -> Array:
    """Return the place of the first act at or after each impression, int64 (S,).

    A place counts the acts of all rows; after the last act of a row it is where the next row begins.
    """
    rows = np.concatenate([shown.rows, history.rows])
    at = np.concatenate([shown.event_at, history.event_at])
    is_act = np.arange(len(rows)) >= len(shown.item_idx)
    order = np.lexsort((is_act, at, rows))
    places = np.zeros(len(rows), np.int64)
    places[order] = np.cumsum(is_act[order])
    return places[~is_act]


def _sessions(history: Histories, shown: Histories, upcoming: Array) -> tuple[Array, Array]:
    """Return each impression's session, int64 (S,), and whether acts of it come before, bool (S,).

    Sessions are numbered by their acts, from 1; 0 = it has none. There are acts.
    """
    assert history.session_id is not None
    assert shown.session_id is not None
    number, acts, wanted = np.cumsum(history.session_starts), history.session_id, shown.session_id

    def holds(place: Array) -> tuple[Array, Array]:
        inside = (place >= history.start[shown.rows]) & (place < history.start[shown.rows + 1])
        place = np.clip(place, 0, len(number) - 1)
        same = pc.equal(acts.take(pa.array(place)), wanted).fill_null(False)
        return inside & same.to_numpy(zero_copy_only=False), number[place]

    (begun, before), (goes_on, next_one) = holds(upcoming - 1), holds(upcoming)
    return np.where(begun, before, np.where(goes_on, next_one, 0)), begun


def _windows(begin: Array, end: Array, places: Array) -> Array:
    """Return which window [begin, end) holds each place, int64 (S,); -1 = none does.

    Windows share at most their first or last place; of two the older has it, but at its own begin.
    """
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    older = np.searchsorted(begin, places) - 1  # the last one that begins before the place
    first = np.minimum(older + 1, len(begin) - 1)
    inside = (older >= 0) & (places < end[older])
    found = np.where(inside, older, np.where(begin[first] == places, first, -1))
    return np.where(found >= 0, order[found], -1)


def _acted_on(history: Histories, shown: Histories, session: Array) -> Array:
    """Return 1 where an act on the item follows in the same session, else 0: int64 (S,)."""
    n_items = 1 + max(history.item_idx.max(initial=0), shown.item_idx.max(initial=0))
    keys = np.cumsum(history.session_starts) * int(n_items) + history.item_idx
    order = np.lexsort((history.event_at, keys))
    keys, at = keys[order], history.event_at[order]
    wanted = session * int(n_items) + shown.item_idx
    newest = np.searchsorted(keys, wanted, side="right") - 1
    same = (newest >= 0) & (keys[newest] == wanted)
    return (same & (at[newest] >= shown.event_at)).astype(np.int64)
