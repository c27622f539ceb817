"""Arrow batches of histories and queries as flat numpy arrays: what kernels in executors work
on.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Array = npt.NDArray[Any]
MICROS_PER_DAY = 86_400_000_000


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length: row r holds `values[start[r]:start[r + 1]]`.

    `start` int64 (n + 1,), `start[0] == 0`; `values` (start[-1],).
    """

    start: Array
    values: Array

    @property
    def lengths(self) -> Array:
        """int64 (n,): length of each row."""
        return np.diff(self.start)

    @property
    def rows(self) -> Array:
        """int64 (start[-1],): the row of each value."""
        return np.repeat(np.arange(len(self.start) - 1), self.lengths)


@dataclass(frozen=True)
class Histories:
    """The `history` column of a batch: events of row r at `start[r]:start[r + 1]`, newest last.

    `item_idx` int32, `event_at` int64 (microseconds since 1970 UTC), `weight` float32; all
    (n_events,). `session_id` strings (n_events,); None = a row is one session.
    """

    start: Array
    item_idx: Array
    event_at: Array
    weight: Array
    session_id: pa.Array | None = None

    @property
    def rows(self) -> Array:
        """int64 (n_events,): the row of each event."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    @property
    def session_starts(self) -> Array:
        """Where a row begins, or another `session_id` than the event before: bool (n_events,)."""
        first = np.zeros(len(self.item_idx), bool)
        first[self.start[:-1][np.diff(self.start) > 0]] = True
        if self.session_id is not None and len(first) > 1:
            ids = self.session_id.fill_null("")
            changed = pc.not_equal(ids[1:], ids[:-1])
            first[1:] |= changed.to_numpy(zero_copy_only=False)
        return first


@dataclass(frozen=True)
class QueryBlock:
    """A batch of queries, parsed."""

    user_idx: Array  # int64 (n,)
    history: Histories
    seen: Ragged  # item_idx int32; to mask
    features: pa.StructArray | None = None  # as `encoded.parse_encoded` reads; None = not asked for

    def __len__(self) -> int:
        return len(self.user_idx)


def micros(moment: datetime) -> int:
    """Return microseconds since 1970 UTC; a naive datetime is taken as UTC.

    >>> micros(datetime(1970, 1, 2))
    86400000000
    """
    utc = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    delta = utc - epoch
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def parse_queries(batch: pa.RecordBatch) -> QueryBlock:
    """Return the arrays of a batch of `schema.QUERIES`; null lists count as empty."""
    seen_start, seen = _list(batch.column("seen"))
    has_features = batch.schema.get_field_index("features") >= 0
    return QueryBlock(
        user_idx=_numpy(batch.column("user_idx"), np.int64),
        history=parse_histories(batch.column("history")),
        seen=Ragged(seen_start, _numpy(seen, np.int32)),
        features=batch.column("features") if has_features else None,
    )


def parse_histories(column: pa.ListArray) -> Histories:
    """Return the flat arrays of a `history` column; a null history counts as empty.

    Where its events have no field `session_id`, a row is one session; without `weight` each is 1.
    """
    start, events = _list(column)
    at = events.field("event_at")
    has = {name: events.type.get_field_index(name) >= 0 for name in ("weight", "session_id")}
    if pa.types.is_timestamp(at.type):
        at = at.cast(pa.timestamp("us", at.type.tz)).cast(pa.int64())
    return Histories(
        start=start,
        item_idx=_numpy(events.field("item_idx"), np.int32),
        event_at=_numpy(at, np.int64),
        weight=_numpy(events.field("weight"), np.float32)
        if has["weight"]
        else np.ones(len(events), np.float32),
        session_id=events.field("session_id") if has["session_id"] else None,
    )


def weigh(
    history: Histories,
    as_of: int,
    *,
    half_life_days: float | None,
    combine: Literal["sum", "last", "binary"],
) -> tuple[Ragged, Array]:
    """Return each row's distinct items, ascending, and the weight of each (float32).

    Parameters
    ----------
    history : events before `as_of`
    as_of : microseconds since 1970 UTC; age 0
    half_life_days : an event of age a days counts weight × 0.5^(a / half_life_days); None = no
        decay
    combine : `sum` over the item's events, in time order; `last` = its heaviest decayed event (the
        newest one, where event weights are equal); `binary` = 1

    Events that weigh NaN (null: no rating) are left out. Sums run in float64 in the order of the row,
    so the answer does not depend on batching.
    """
    history = weighed(history)
    rows = history.rows
    weight = history.weight.astype(np.float64)
    if half_life_days is not None:
        age = (as_of - history.event_at) / MICROS_PER_DAY
        weight = weight * np.exp2(-age / half_life_days)
    order = np.lexsort((history.item_idx, rows))  # stable: time order stays inside an item
    row, item, weight = rows[order], history.item_idx[order], weight[order]
    first = np.ones(len(row), bool)
    first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    at = np.flatnonzero(first)
    if combine == "binary":
        values = np.ones(len(at))
    elif len(at) == 0:
        values = np.zeros(0)
    elif combine == "sum":
        values = np.add.reduceat(weight, at)
    elif combine == "last":
        values = np.maximum.reduceat(weight, at)
    else:
        raise ValueError(f"combine = {combine!r}")
    counts = np.bincount(row[at], minlength=len(history.start) - 1)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Ragged(start, item[at]), values.astype(np.float32)


def weighed(history: Histories) -> Histories:
    """Return `history` without events that weigh NaN: null, which is no rating."""
    kept = ~np.isnan(history.weight)
    return history if kept.all() else where(history, kept)


def where(history: Histories, kept: Array) -> Histories:
    """Return the events of `history` where `kept`, bool (n_events,)."""
    before = np.concatenate([[0], np.cumsum(kept)])
    session = history.session_id
    return Histories(
        start=before[history.start],
        item_idx=history.item_idx[kept],
        event_at=history.event_at[kept],
        weight=history.weight[kept],
        session_id=None if session is None else session.filter(pa.array(kept)),
    )


def _list(column: pa.Array) -> tuple[Array, pa.Array]:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return start, column.flatten()


def _numpy(column: pa.Array, kind: Any) -> Array:
    out: Array = column.to_numpy(zero_copy_only=False).astype(kind, copy=False)
    return out
