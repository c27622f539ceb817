"""What was shown beside what was done: windows and labels by hand and against a plain loop."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Features
from recspark.data.blocks import Histories
from recspark.data.training_impressions import impressions, sequences_shown, training_impressions
from recspark.data.training_rows import Unit
from recspark.testing import synth

Event = tuple[int, int, str]  # item, time, session


def flat(rows: list[list[Event]]) -> Histories:
    events = [event for row in rows for event in row]
    return Histories(
        start=np.cumsum([0, *map(len, rows)]),
        item_idx=np.array([item for item, _, _ in events], np.int32),
        event_at=np.array([at for _, at, _ in events], np.int64),
        weight=np.ones(len(events), np.float32),
        session_id=pa.array([session for *_, session in events], pa.string()),
    )


def found(
    acts: list[list[Event]],
    shown: list[list[Event]],
    unit: Unit,
    length: int,
    most: int,
    newest: int = 99,
) -> dict[tuple[int, int], tuple[list[int], list[tuple[int, int, int]]]]:
    """Row and position of each window -> its items, and (item, after, clicked) of what was shown."""
    columns = sequences_shown(flat(acts), flat(shown), unit, length, newest, most)
    out = {}
    for n in range(len(columns[0])):
        row, position, items, size_of_row, what, after, clicked = (column[n] for column in columns)
        size = int((what >= 0).sum())
        assert (what[size:] == -1).all()
        assert not after[size:].any()
        assert not clicked[size:].any()
        rows = zip(what[:size].tolist(), after.tolist(), clicked.tolist(), strict=False)
        out[int(row), int(position)] = (items[:size_of_row].tolist(), list(rows))
    return out


ACTS = [
    [(1, 10, "a"), (2, 20, "a"), (3, 30, "a"), (7, 90, "b")],
    [],
    [(5, 10, "c")],
]
SHOWN = [
    [
        (2, 5, "a"),  # before any act of the session: nothing is known yet
        (2, 12, "a"),
        (9, 13, "a"),
        (1, 15, "a"),  # acted on, but before
        (3, 30, "a"),  # shown at the moment of the act: before it
        (3, 31, "a"),
        (7, 40, "a"),  # acted on in another session
        (7, 85, "b"),  # before the first act of its session
        (8, 95, "b"),
    ],
    [(4, 1, "d")],
    [(5, 11, "c"), (6, 50, "e")],  # a session without acts
]


def test_sessions_by_hand() -> None:
    assert found(ACTS, SHOWN, "session", 9, 9) == {
        (0, 0): ([1, 2, 3], [(2, 1, 1), (9, 1, 0), (1, 1, 0), (3, 2, 1), (3, 3, 0), (7, 3, 0)]),
        (0, 3): ([7], [(8, 1, 0)]),
        (2, 0): ([5], [(5, 1, 0)]),
    }
    # Windows of two share item 2: what follows it belongs to the older one. The newest two stay.
    assert found(ACTS, SHOWN, "session", 2, 2) == {
        (0, 1): ([2, 3], [(3, 2, 0), (7, 2, 0)]),
        (0, 0): ([1, 2], [(1, 1, 0), (3, 2, 1)]),
        (0, 3): ([7], [(8, 1, 0)]),
        (2, 0): ([5], [(5, 1, 0)]),
    }


def test_a_history_reads_on_but_a_click_belongs_to_its_session() -> None:
    assert found(ACTS, SHOWN, "history", 9, 3) == {
        (0, 0): ([1, 2, 3, 7], [(7, 3, 0), (7, 3, 1), (8, 4, 0)]),
        (2, 0): ([5], [(5, 1, 0), (6, 1, 0)]),
    }


@pytest.mark.parametrize("unit", ["session", "history"])
@pytest.mark.parametrize("newest", [5, 99])
def test_every_impression_after_an_act_is_in_one_row(unit: Unit, newest: int) -> None:
    """Against a plain loop over random rows, with ties in time and capped users."""
    rng = np.random.default_rng(1)
    acts, shown = [], []
    for _ in range(150):
        parts: list[list[Event]] = [[], []]
        for session in range(rng.integers(0, 5)):
            for part, n in zip(parts, rng.integers(0, 9, 2), strict=True):
                times = np.sort(rng.integers(0, 8, n)) + 10 * session
                part += [(int(rng.integers(4)), int(at), f"s{session}") for at in times]
        acts.append(parts[0])
        shown.append(parts[1])
    want = []
    for row, (done, was_shown) in enumerate(zip(acts, shown, strict=True)):
        for item, at, session in was_shown:
            before = [place for place, act in enumerate(done) if act[1] < at]
            mine = [place for place in before if unit == "history" or done[place][2] == session]
            if mine and mine[-1] >= len(done) - newest:
                clicked = any(a[0] == item and a[1] >= at and a[2] == session for a in done)
                want.append((row, item, before[-1], int(clicked)))
    windows = found(acts, shown, unit, 4, 99, newest)
    have = [
        (row, item, position + after - 1, clicked)
        for (row, position), (_, those) in windows.items()
        for item, after, clicked in those
    ]
    assert sorted(have) == sorted(want)
    assert len(have) > 300
    ends = {
        (row, position + len(items) - 1)
        for (row, position), (items, _) in windows.items()
        if len(items) > 1
    }
    firsts = {
        key for key, (_, those) in windows.items() if any(after == 1 for _, after, _ in those)
    }
    assert firsts
    assert not firsts & ends  # of two windows that share an act, the one that has read more


@pytest.mark.spark
def test_as_a_table(spark: SparkSession, catalog: Any) -> None:
    """Nothing from the cutoff on, nothing of sessions without a user; ids as in the dictionaries."""
    day = synth.CUTOFF - timedelta(days=1)

    def at(minute: int) -> Any:
        return day + timedelta(minutes=minute)

    late = 24 * 60
    sessions = [
        ("s1", "u1", None, [], [("b", at(2)), ("a", at(3)), ("b", at(9)), ("b", at(late))]),
        ("s2", None, "key", ["a"], [("a", at(3))]),
        ("s3", "u2", None, ["a"], []),
        ("s4", "u3", None, [], [("a", at(4))]),
    ]
    rows = [
        (name, user, key, day, day, len(items), items, shown, day.date())
        for name, user, key, items, shown in sessions
    ]
    frame = spark.createDataFrame(rows, schema.SESSIONS)
    users = spark.createDataFrame([(f"u{n}", n, day.date()) for n in range(9)], schema.USER_IDS)
    items = spark.createDataFrame([("a", 5, day.date()), ("b", 7, day.date())], schema.ITEM_IDS)
    shown = impressions(frame, users, items, synth.CUTOFF)
    assert {row["user_idx"]: [e["item_idx"] for e in row["shown"]] for row in shown.collect()} == {
        1: [7, 5, 7],
        3: [5],
    }

    def act(item: int, minute: int, session: str) -> tuple[Any, ...]:
        return (item, at(minute), "click", 1.0, 1.0, session, None)

    history = [
        (1, [act(5, 2, "s1"), act(7, 5, "s1"), act(5, late, "s1")], [], 0),
        (2, [act(5, 1, "s3"), act(5, 2, "s3")], [], 0),
        (4, [act(5, 1, "s5")], [], 0),
    ]
    histories = spark.createDataFrame(history, schema.HISTORIES)
    features = Features(sequence_length=4, max_shown=3)  # type: ignore[call-arg]
    table = "training_session_impressions"
    frame = training_impressions(histories, shown, synth.CUTOFF, features, 2, unit="session")
    where = {"cutoff": synth.CUTOFF}
    written = catalog.replace_slice(table, frame, where, n_files=2)
    made = catalog.read(table, written.version).drop("cutoff").toArrow().sort_by("user_idx")
    assert [tuple(row.values()) for row in made.to_pylist()] == [
        # b at minute 2 was shown when item a was acted on, so before it; at 9 nothing follows.
        (1, 0, [5, 7, -1, -1], 2, [5, 7, -1], [1, 2, 0], [0, 0, 0]),
        (2, 0, [5, 5, -1, -1], 2, [-1, -1, -1], [0, 0, 0], [0, 0, 0]),
    ]
