"""The newest sessions of every item: what session kNN looks neighbours up in."""

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
from recspark.data.windows import Unit, sequences

SESSIONS = schema.columns(
    user_idx=schema.LONG,
    position=schema.INT,  # of its first event, in the user's history
    ended_at=schema.LONG,  # microseconds since 1970 UTC
    length=schema.INT,  # events
    items=schema.ITEM_IDXS,  # different ones, by their last place
    places=schema.ITEM_IDXS,  # of each, from 0
)
_EVERY_EVENT = 1 << 62


@dataclass(frozen=True)
class SessionIndex:
    """Sessions, newest first, and which of them have an item.

    Session s has items `session_items[session_start[s]:session_start[s + 1]]` (local, int32) at
    `session_places` (int32) of its `session_length[s]` (int32) events, and ended at `session_at[s]`
    (int64, microseconds since 1970 UTC). Item i is in sessions
    `item_sessions[item_start[i]:item_start[i + 1]]` (int32, ascending: newest first).
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
        """Return the index that `arrays()` was taken from; further arrays are left out."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def sessions(histories: DataFrame, unit: Unit, length: int) -> DataFrame:
    """Return `SESSIONS` with at least two different items, of every user.

    `unit` session: each session of a history; a longer one than `length` events counts as several
    (see `windows.sequences`). `unit` history: each user's newest `length` events are one session.
    Narrow: no shuffle, no action.
    """
    newest = length if unit == "history" else _EVERY_EVENT

    def cut(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            history = parse_histories(batch.column("history"))
            row, position, items, lengths = sequences(history, unit, length, newest)
            start, item, place = last_places(items, lengths)
            ended = history.event_at[history.start[row] + position + lengths - 1]
            made = pa.RecordBatch.from_arrays(
                [
                    batch.column("user_idx").take(pa.array(row)),
                    pa.array(position, pa.int32()),
                    pa.array(ended, pa.int64()),
                    pa.array(lengths, pa.int32()),
                    pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(item)),
                    pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(place)),
                ],
                names=SESSIONS.names,
            )
            yield made.filter(pa.array(np.diff(start) > 1))

    return histories.select("user_idx", "history").mapInArrow(cut, SESSIONS)


def last_places(items: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Return start int64 (n + 1,), item and place int32: each row's different items, by last place.

    >>> last_places(np.array([[7, 5, 7, -1]]), np.array([3]))
    (array([0, 2]), array([5, 7], dtype=int32), array([1, 2], dtype=int32))
    """
    row, place = np.nonzero(np.arange(items.shape[1]) < lengths[:, None])
    item = items[row, place]
    order = np.lexsort((place, item, row))
    after = np.append(order[1:], order[:1])
    is_last = (row[order] != row[after]) | (item[order] != item[after])
    is_last[-1:] = True
    kept = np.sort(order[is_last])  # by row, then place
    start = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=len(lengths)))])
    return start, item[kept].astype(np.int32), place[kept].astype(np.int32)


def newest(made: DataFrame, n_newest: int) -> DataFrame:
    """Return the `SESSIONS` that are among the `n_newest` newest of one of their items.

    Ties by the smaller user_idx, then position. Cost: two shuffles, by item and by session; Spark
    takes the newest of each partition before the first one where `n_newest` is at most 1000.
    """
    key = ["user_idx", "position"]
    order = Window.partitionBy("item").orderBy(F.desc("ended_at"), *key)
    chosen = (
        made.select(*key, "ended_at", F.explode("items").alias("item"))
        .withColumn("nth", F.row_number().over(order))
        .where(F.col("nth") <= n_newest)
        .select(*key)
        .distinct()
    )
    return made.join(chosen, on=key, how="left_semi").select(*SESSIONS.names)


def build(rows: pa.Table, items: Array, n_newest: int) -> SessionIndex:
    """Return the index over `rows` of `SESSIONS` in any order; item lists end at `n_newest`.

    `items` int32 (n_items,) ascending, with every item of `rows`.
    """
    rows = rows.combine_chunks()
    user, position, ended = (
        rows.column(name).to_numpy() for name in ("user_idx", "position", "ended_at")
    )
    rows = rows.take(pa.array(np.lexsort((position, user, -ended)))).combine_chunks()
    lists = rows.column("items").combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    start = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    local = np.searchsorted(items, lists.flatten().to_numpy()).astype(np.int32)
    places = rows.column("places").combine_chunks().flatten().to_numpy().astype(np.int32)
    by_item = np.argsort(local, kind="stable")  # newest first in each item
    counts = np.bincount(local, minlength=len(items))
    nth = np.arange(len(local)) - np.repeat(np.cumsum(counts) - counts, counts)
    session = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[by_item]
    return SessionIndex(
        session_start=start,
        session_items=local,
        session_places=places,
        session_length=rows.column("length").to_numpy().astype(np.int32),
        session_at=rows.column("ended_at").to_numpy().astype(np.int64),
        item_start=np.concatenate([[0], np.cumsum(np.minimum(counts, n_newest))]).astype(np.int64),
        item_sessions=session[nth < n_newest],
    )
