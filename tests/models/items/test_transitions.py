"""Transitions by hand, and against brute force over random histories."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from recspark.data.blocks import MICROS_PER_DAY, Histories, QueryBlock, Ragged
from recspark.models.base import FitOptions
from recspark.models.items.transitions import (
    Transitions,
    TransitionsScorer,
    TransitionsSettings,
    followers_of,
    newest_items,
)
from recspark.models.scoring import topk
from recspark.testing import synth
from recspark.testing.case import ordered


def histories(rows: list[list[tuple[int, float, str]]]) -> Histories:
    """Of (item, age in days before 0, session), in time order."""
    events = [event for row in rows for event in row]
    return Histories(
        np.cumsum([0, *map(len, rows)]),
        np.array([item for item, _, _ in events], np.int32),
        np.array([-age * MICROS_PER_DAY for _, age, _ in events], np.int64),
        np.ones(len(events), np.float32),
        pa.array([session for _, _, session in events], pa.string()),
    )


event = st.tuples(st.integers(0, 5), st.sampled_from("abc"), st.sampled_from([0.0, 1.0, 1.0]))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(event, max_size=8), max_size=5),
    unit=st.sampled_from(["event", "session"]),
    window=st.integers(1, 4),
    half_life=st.sampled_from([None, 2.0]),
)
def test_followers_are_those_of_brute_force(
    rows: list[list[tuple[int, str, float]]], unit: str, window: int, half_life: float | None
) -> None:
    """Unit by unit: each pair of an item and another one within the window, counted once a unit. An
    event that weighs nothing neither follows nor ends a session.
    """
    timed = [
        [(item, float(len(row) - n), session, w) for n, (item, session, w) in enumerate(row)]
        for row in rows
    ]
    weights = np.array([w for row in timed for *_, w in row], np.float32)
    whole = histories([[happened[:3] for happened in row] for row in timed])
    aged = [[happened[:3] for happened in row if happened[3] > 0] for row in timed]
    made = TransitionsSettings(unit=unit, window=window, half_life_days=half_life)  # type: ignore[arg-type]
    batch = followers_of(replace(whole, weight=weights), 0, made)
    found = {(row["item_idx"], row["follower"]): row["steps"] / 2**20 for row in batch.to_pylist()}
    assert len(found) == batch.num_rows
    want: dict[tuple[int, int], float] = defaultdict(float)
    for row in aged:
        units: list[list[tuple[int, float, str]]] = []
        for happened in row:
            if unit == "session" and units and units[-1][-1][2] == happened[2]:
                units[-1].append(happened)
            else:
                units.append([happened])
        for n, first in enumerate(units):
            for distance in range(1, window + 1):
                if n + distance < len(units):
                    later = units[n + distance]
                    weight = 1 / distance
                    if half_life is not None:
                        weight *= 0.5 ** (later[0][1] / half_life)
                    for a in {item for item, _, _ in first}:
                        for b in {item for item, _, _ in later} - {a}:
                            want[a, b] += weight
    assert found == pytest.approx(want, abs=1e-4)


def test_the_newest_items_speak_by_their_place() -> None:
    """7 is acted on twice: its newest time counts; 9 is not known; the second user has nothing."""
    rows = [[(7, 5, "a"), (8, 4, "a"), (7, 3, "a"), (9, 2, "a"), (6, 1, "a")], []]
    row, item, place = newest_items(histories(rows), np.array([6, 7, 8], np.int32), 2)
    assert (row.tolist(), item.tolist(), place.tolist()) == ([0, 0], [0, 1], [1, 2])


def test_scores_by_hand() -> None:
    """Item 0 leads to 1 (.75) and 2 (.25), item 1 to 2 (1): newest 1, then 0 at half."""
    arrays = {
        "start": np.array([0, 2, 3, 3]),
        "followers": np.array([1, 2, 2], np.int32),
        "shares": np.array([0.75, 0.25, 1.0], np.float32),
    }
    shared = {name: topk.Shared(array) for name, array in arrays.items()}
    items = np.array([10, 20, 30], np.int32)
    block = QueryBlock(
        np.array([5, 6]),
        histories([[(10, 2, "a"), (20, 1, "a")], [(30, 1, "a")]]),
        Ragged(np.zeros(3, np.int64), np.zeros(0, np.int32)),
    )
    scores = TransitionsScorer(5, items, shared).score(block)
    assert scores.start.tolist() == [0, 2, 2]
    assert scores.items.tolist() == [1, 2]
    np.testing.assert_allclose(scores.scores, [0.75 / 2, 1 + 0.25 / 2])


@pytest.mark.spark
def test_a_planted_chain_is_found(spark: SparkSession) -> None:
    """Everybody goes from item to item along a circle; the next one comes first, then the one after."""
    rng = np.random.default_rng(3)
    events = []
    for user in range(60):
        begin = int(rng.integers(0, 20))
        events += [(user, (begin + n) % 20, float(10 - n)) for n in range(6)]
    data = synth.dataset(spark, synth.log(events))
    model = Transitions.from_dict({"last_n": 1}).fit(data, FitOptions())
    rows = ordered(model.recommend(synth.ask(data), 2))
    last = {user: item for user, item, _ in events}
    first = rows.filter(pa.array(rows.column("rank").to_numpy() == 1))
    assert {u: (last[u] + 1) % 20 for u in range(60)} == dict(
        zip(first.column("user_idx").to_pylist(), first.column("item_idx").to_pylist(), strict=True)
    )
    second = rows.filter(pa.array(rows.column("rank").to_numpy() == 2))
    assert all(
        (last[u] + 2) % 20 == i
        for u, i in zip(
            second.column("user_idx").to_pylist(),
            second.column("item_idx").to_pylist(),
            strict=True,
        )
    )
