"""What of a history counts as the open session."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recspark.data.blocks import Histories
from recspark.data.training_rows import Unit
from recspark.models.sequences.contexts import contexts

VOCABULARY = np.array([10, 20, 30, 40], np.int32)
# (item, session) of each row's events
ROWS = [
    [(10, "a"), (20, "a"), (30, "b"), (99, "b"), (40, "b"), (30, "b")],
    [],
    [(99, "c")],
    [(20, "d"), (20, "a")],
]


def history() -> Histories:
    events = [event for row in ROWS for event in row]
    return Histories(
        np.cumsum([0, *map(len, ROWS)]),
        np.array([item for item, _ in events], np.int32),
        np.arange(len(events)),
        np.ones(len(events), np.float32),
        pa.array([session for _, session in events]),
    )


@pytest.mark.parametrize(
    ("unit", "length", "want"),
    [
        ("session", 9, [[2, 3, 2], [], [], [1]]),
        ("session", 2, [[3, 2], [], [], [1]]),
        ("history", 9, [[0, 1, 2, 3, 2], [], [], [1, 1]]),
        ("history", 4, [[1, 2, 3, 2], [], [], [1, 1]]),
    ],
)
def test_the_newest_known_items(unit: Unit, length: int, want: list[list[int]]) -> None:
    found = contexts(history(), VOCABULARY, unit, length)
    rows = [found.values[a:b].tolist() for a, b in zip(found.start[:-1], found.start[1:])]
    assert rows == want


def test_no_rows() -> None:
    nothing = np.zeros(0, np.int32)
    none = Histories(np.zeros(1, np.int64), nothing, nothing, nothing)
    assert contexts(none, VOCABULARY, "session", 3).start.tolist() == [0]


def test_sessions_start_at_rows_and_where_the_id_changes() -> None:
    want = [1, 0, 1, 0, 0, 0, 1, 1, 1]
    assert history().session_starts.tolist() == [bool(flag) for flag in want]
