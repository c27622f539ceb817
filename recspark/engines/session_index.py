"""The newest sessions of every item: session kNN looks up its neighbours in this index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.blocks import Array, parse_histories
from recspark.data.training_rows import Unit, sequences

SESSIONS = schema.columns(
    user_idx=schema.LONG,
    position=schema.INT,  # where the session's first event is in the user's history
    ended_at=schema.LONG,  # time of the last event, microseconds since 1970 UTC
    length=schema.INT,  # number of events
    items=schema.ITEM_IDXS,  # distinct items, sorted by their last place in the session
    places=schema.ITEM_IDXS,  # last place of each of `items`, counted from 0
)
_EVERY_EVENT = 1 << 62  # a number of newest events that no history exceeds


@dataclass(frozen=True)
class SessionIndex:
    """Sessions, newest first, and for each item the sessions that contain it.

    Session s has the items `session_items[session_start[s]:session_start[s + 1]]` (local, int32),
    which are at the places `session_places` (int32) among its `session_length[s]` (int32) events.
    It ended at `session_at[s]` (int64, microseconds since 1970 UTC). Item i is in the sessions
    `item_sessions[item_start[i]:item_start[i + 1]]` (int32, ascending, which is newest first).
    """

    session_start: Array
    session_items: Array
    session_places: Array
    session_length: Array
    session_at: Array
    item_start: Array
    item_sessions: Array

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> Self:
        """Return the index made of the arrays with its fields' names; ignore any other arrays."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def sessions(histories: DataFrame, unit: Unit, length: int) -> DataFrame:
    """Return the sessions of every user that have at least two distinct items, as `SESSIONS`.

    With `unit` session, each session of a history is a session; one with more than `length` events
    counts as several (see `training_rows.sequences`). With `unit` history, each user's newest `length`
    events are one session. Narrow: no shuffle, no action.
    """
    n_newest_events = length if unit == "history" else _EVERY_EVENT

    def cut_into_sessions(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = parse_histories(batch.column("history"))
            history_row, position, items, lengths = sequences(
                history, unit, length, n_newest_events
            )
            start, item, place = last_places(items, lengths)
            ended_at = history.event_at[history.start[history_row] + position + lengths - 1]
            session_batch = pa.RecordBatch.from_arrays(
                [
                    batch.column("user_idx").take(pa.array(history_row)),
                    pa.array(position, pa.int32()),
                    pa.array(ended_at, pa.int64()),
                    pa.array(lengths, pa.int32()),
                    pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(item)),
                    pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(place)),
                ],
                names=SESSIONS.names,
            )
            yield session_batch.filter(pa.array(np.diff(start) > 1))

    return histories.select("user_idx", "history").mapInArrow(cut_into_sessions, SESSIONS)


def last_places(items: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Return the distinct items of each row, sorted by their last place in the row.

    `items` (n, width); row r has `lengths[r]` items. Returns start int64 (n + 1,), and item and
    place, both int32: those of row r are `start[r]:start[r + 1]`.

    >>> last_places(np.array([[7, 5, 7, -1]]), np.array([3]))
    (array([0, 2]), array([5, 7], dtype=int32), array([1, 2], dtype=int32))
    """
    row, place = np.nonzero(np.arange(items.shape[1]) < lengths[:, None])
    item = items[row, place]
    # By row, item and place, the last entry of each (row, item) is before a different (row, item).
    order = np.lexsort((place, item, row))
    next_entry = np.append(order[1:], order[:1])
    is_last = (row[order] != row[next_entry]) | (item[order] != item[next_entry])
    is_last[-1:] = True
    last_entries = np.sort(order[is_last])  # back in the order of row, then place
    start = np.concatenate([[0], np.cumsum(np.bincount(row[last_entries], minlength=len(lengths)))])
    return start, item[last_entries].astype(np.int32), place[last_entries].astype(np.int32)


def newest(session_rows: DataFrame, n_newest: int) -> DataFrame:
    """Return the `SESSIONS` that are among the `n_newest` newest of at least one of their items.

    Of sessions that ended at the same time, the smaller user_idx counts as newer, then the smaller
    position. Cost: two shuffles, by item and by session. Where `n_newest` is at most 1000, Spark
    takes the newest of each partition before the first shuffle.
    """
    session_key = ["user_idx", "position"]
    newest_first = Window.partitionBy("item").orderBy(F.desc("ended_at"), *session_key)
    chosen = (
        session_rows.select(*session_key, "ended_at", F.explode("items").alias("item"))
        .withColumn("nth", F.row_number().over(newest_first))
        .where(F.col("nth") <= n_newest)
        .select(*session_key)
        .distinct()
    )
    return session_rows.join(chosen, on=session_key, how="left_semi").select(*SESSIONS.names)


def build(rows: pa.Table, items: Array, n_newest: int) -> SessionIndex:
    """Return the index over `rows` of `SESSIONS`, given in any order.

    Each item lists at most its `n_newest` newest sessions. `items` int32 (n_items,) ascending holds
    every item of `rows`; its indices are the local items.
    """
    rows = rows.combine_chunks()
    user_idx, position, ended_at = (
        rows.column(name).to_numpy() for name in ("user_idx", "position", "ended_at")
    )
    rows = rows.take(pa.array(np.lexsort((position, user_idx, -ended_at)))).combine_chunks()
    item_lists = rows.column("items").combine_chunks()
    lengths = item_lists.value_lengths().to_numpy(zero_copy_only=False)
    start = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    local_items = np.searchsorted(items, item_lists.flatten().to_numpy()).astype(np.int32)
    places = rows.column("places").combine_chunks().flatten().to_numpy().astype(np.int32)
    by_item = np.argsort(local_items, kind="stable")  # stable: newest session first in each item
    counts = np.bincount(local_items, minlength=len(items))
    rank_in_item = np.arange(len(local_items)) - np.repeat(np.cumsum(counts) - counts, counts)
    session = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[by_item]
    return SessionIndex(
        session_start=start,
        session_items=local_items,
        session_places=places,
        session_length=rows.column("length").to_numpy().astype(np.int32),
        session_at=rows.column("ended_at").to_numpy().astype(np.int64),
        item_start=np.concatenate([[0], np.cumsum(np.minimum(counts, n_newest))]).astype(np.int64),
        item_sessions=session[rank_in_item < n_newest],
    )
