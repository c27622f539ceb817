"""Histories and queries as flat numpy arrays, parsed from Arrow batches: the input of the kernels
that run in executors.
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
    """n rows of unequal length: row r holds `values[start[r]:start[r + 1]]`.

    `start` is int64 (n + 1,) with `start[0] == 0`; `values` has the shape (start[-1],).

    Example: the rows [5, 7], [] and [9] have `start` = [0, 2, 2, 3] and `values` = [5, 7, 9].
    """

    start: Array
    values: Array

    @property
    def lengths(self) -> Array:
        """The length of each row, int64 (n,)."""
        return np.diff(self.start)

    @property
    def rows(self) -> Array:
        """The row that each value belongs to, int64 (start[-1],)."""
        return np.repeat(np.arange(len(self.start) - 1), self.lengths)

    def part(self, rows: slice) -> Ragged:
        """Return a slice of the rows, without a step."""
        start = self.start[rows.start : rows.stop + 1]
        return Ragged(start - start[0], self.values[start[0] : start[-1]])


@dataclass(frozen=True)
class Histories:
    """The `history` column of a batch: row r has the events `start[r]:start[r + 1]`, newest last.

    `item_idx` is int32, `event_at` int64 (microseconds since 1970 UTC) and `weight` float32, each
    (n_events,). `session_id` holds strings (n_events,); None means that each row is one session.
    `event_type` holds strings (n_events,); None means that nobody knows them.
    """

    start: Array
    item_idx: Array
    event_at: Array
    weight: Array
    session_id: pa.Array | None = None
    event_type: pa.Array | None = None

    @property
    def rows(self) -> Array:
        """The row that each event belongs to, int64 (n_events,)."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def part(self, rows: slice) -> Histories:
        """Return a slice of the rows, without a step."""
        start = self.start[rows.start : rows.stop + 1]
        events = slice(start[0], start[-1])
        return Histories(
            start - start[0],
            self.item_idx[events],
            self.event_at[events],
            self.weight[events],
            None if self.session_id is None else self.session_id[events],
            None if self.event_type is None else self.event_type[events],
        )

    @property
    def session_starts(self) -> Array:
        """Whether each event is the first of its session, bool (n_events,).

        An event is the first of a session where it is the first of its row, or where its
        `session_id` differs from that of the event before it. Nothing tells that two events
        without a `session_id` (null) belong together, so each of them is a session of its own.
        """
        is_first = np.zeros(len(self.item_idx), bool)
        is_first[self.start[:-1][np.diff(self.start) > 0]] = True
        if self.session_id is not None and len(is_first) > 1:
            is_changed = pc.not_equal(self.session_id[1:], self.session_id[:-1]).fill_null(True)
            is_first[1:] |= is_changed.to_numpy(zero_copy_only=False)
        return is_first


@dataclass(frozen=True)
class QueryBlock:
    """A batch of n queries, parsed into arrays; see `parse_queries`."""

    user_idx: Array  # int64 (n,)
    history: Histories
    seen: Ragged  # item_idx int32: the items to mask
    # The input of `feature_encoding.parse_encoded`; None where the batch has no column `features`.
    features: pa.StructArray | None = None

    def __len__(self) -> int:
        return len(self.user_idx)

    def part(self, rows: slice) -> QueryBlock:
        """Return the queries of a slice of the rows, without a step."""
        return QueryBlock(
            self.user_idx[rows],
            self.history.part(rows),
            self.seen.part(rows),
            None if self.features is None else self.features[rows],
        )


def micros(moment: datetime) -> int:
    """Return `moment` in microseconds since 1970 UTC; a naive datetime is taken as UTC.

    >>> micros(datetime(1970, 1, 2))
    86400000000
    """
    utc = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    elapsed = utc - epoch
    return (elapsed.days * 86_400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds


def parse_queries(batch: pa.RecordBatch) -> QueryBlock:
    """Return the arrays of a batch of `schema.QUERIES`; null lists count as empty."""
    seen_start, seen = _flattened(batch.column("seen"))
    has_features = batch.schema.get_field_index("features") >= 0
    return QueryBlock(
        user_idx=_numpy(batch.column("user_idx"), np.int64),
        history=parse_histories(batch.column("history")),
        seen=Ragged(seen_start, _numpy(seen, np.int32)),
        features=batch.column("features") if has_features else None,
    )


def parse_histories(column: pa.ListArray) -> Histories:
    """Return the flat arrays of a `history` column; a null history counts as empty.

    Where the events have no field `session_id`, each row is one session. Where they have no field
    `weight`, each event weighs 1.
    """
    start, events = _flattened(column)
    event_at = events.field("event_at")
    names = ("weight", "session_id", "event_type")
    has_field = {name: events.type.get_field_index(name) >= 0 for name in names}
    if pa.types.is_timestamp(event_at.type):
        event_at = event_at.cast(pa.timestamp("us", event_at.type.tz)).cast(pa.int64())
    return Histories(
        start=start,
        item_idx=_numpy(events.field("item_idx"), np.int32),
        event_at=_numpy(event_at, np.int64),
        weight=_numpy(events.field("weight"), np.float32)
        if has_field["weight"]
        else np.ones(len(events), np.float32),
        session_id=events.field("session_id") if has_field["session_id"] else None,
        event_type=events.field("event_type") if has_field["event_type"] else None,
    )


def weigh(
    history: Histories,
    as_of: int,
    *,
    half_life_days: float | None,
    combine: Literal["sum", "last", "binary"],
) -> tuple[Ragged, Array]:
    """Return the distinct items of each row, ascending, and the weight of each (float32).

    Parameters
    ----------
    history : events before `as_of`
    as_of : the time at which an event has age 0, in microseconds since 1970 UTC
    half_life_days : an event of age a days counts weight × 0.5^(a / half_life_days); None = no
        decay
    combine : how the events of one item become one weight. `sum` adds them, in time order. `last`
        takes the heaviest decayed event (the newest one, where all events weigh the same).
        `binary` gives 1.

    Events whose weight is NaN (null in the table: no rating) are left out. Sums are computed in
    float64 in the order of the row, so the answer does not depend on batching.

    Example without decay: the row (item 7, weight 1), (item 3, weight 1), (item 7, weight 2) gives
    the items [3, 7], with the weights [1, 3] for `sum`, [1, 2] for `last` and [1, 1] for `binary`.
    """
    history = weighted_events(history)
    rows = history.rows
    weight = history.weight.astype(np.float64)
    if half_life_days is not None:
        age_days = (as_of - history.event_at) / MICROS_PER_DAY
        weight = weight * np.exp2(-age_days / half_life_days)
    # Sort by row and item. The sort is stable: the events of an item stay in time order.
    order = np.lexsort((history.item_idx, rows))
    row, item, weight = rows[order], history.item_idx[order], weight[order]
    is_first = np.ones(len(row), bool)  # of the events of its (row, item)
    is_first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    begin = np.flatnonzero(is_first)  # (n_pairs,)
    if combine == "binary":
        values = np.ones(len(begin))
    elif len(begin) == 0:
        values = np.zeros(0)
    elif combine == "sum":
        values = np.add.reduceat(weight, begin)
    elif combine == "last":
        values = np.maximum.reduceat(weight, begin)
    else:
        raise ValueError(f"combine = {combine!r}")
    n_items = np.bincount(row[begin], minlength=len(history.start) - 1)  # of each row
    start = np.concatenate([[0], np.cumsum(n_items)]).astype(np.int64)
    return Ragged(start, item[begin]), values.astype(np.float32)


def weighted_events(history: Histories) -> Histories:
    """Return `history` without the events whose weight is NaN (null in the table: no rating)."""
    has_weight = ~np.isnan(history.weight)
    return history if has_weight.all() else where(history, has_weight)


def local_index(items: Array, item_idx: Array) -> Array:
    """Return the position of each `item_idx` in `items` (ascending), or -1 if it is not in `items`.

    >>> local_index(np.array([3, 5, 9]), np.array([9, 4, 3]))
    array([ 2, -1,  0])
    """
    position = np.minimum(np.searchsorted(items, item_idx), len(items) - 1)
    return np.where(items[position] == item_idx, position, -1)


def where(history: Histories, is_kept: Array) -> Histories:
    """Return `history` with only the events for which `is_kept`, bool (n_events,), is True."""
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept)])  # (n_events + 1,)
    session_id, event_type = history.session_id, history.event_type
    return Histories(
        start=n_kept_before[history.start],
        item_idx=history.item_idx[is_kept],
        event_at=history.event_at[is_kept],
        weight=history.weight[is_kept],
        session_id=None if session_id is None else session_id.filter(pa.array(is_kept)),
        event_type=None if event_type is None else event_type.filter(pa.array(is_kept)),
    )


def _flattened(column: pa.Array) -> tuple[Array, pa.Array]:
    # A list column as `start`, int64 (n + 1,), and the values of all rows; a null list is empty.
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return start, column.flatten()


def _numpy(column: pa.Array, dtype: Any) -> Array:
    values: Array = column.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return values
