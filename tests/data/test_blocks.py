"""Flat arrays of histories: weights against a plain loop, under any batching."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark.data.blocks import MICROS_PER_DAY, parse_histories, weigh, where

EVENT = pa.struct(
    [("item_idx", pa.int32()), ("event_at", pa.timestamp("us", "UTC")), ("weight", pa.float32())]
)
rows = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40), st.sampled_from([0.5, 1.0, 2.0])), max_size=8),
    max_size=6,
)  # fmt: skip


def column(users: list[list[tuple[int, int, float]]]) -> pa.ListArray:
    in_time = [sorted(user, key=lambda event: event[1]) for user in users]
    return pa.array(
        [
            [{"item_idx": i, "event_at": d * MICROS_PER_DAY, "weight": w} for i, d, w in user]
            for user in in_time
        ],
        pa.list_(EVENT),
    )


def plain(
    user: list[tuple[int, int, float]], half_life: float | None, combine: str
) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for item, day, weight in sorted(user, key=lambda e: e[1]):
        found[item].append(weight * (0.5 ** ((50 - day) / half_life) if half_life else 1.0))
    how: Any = {"sum": sum, "last": max, "binary": lambda _: 1.0}[combine]
    return {item: how(values) for item, values in found.items()}


@settings(deadline=None, max_examples=60)
@given(rows, st.sampled_from([None, 3.0]), st.sampled_from(["sum", "last", "binary"]))
def test_weights_equal_a_plain_loop(
    users: list[Any], half_life: float | None, combine: Any
) -> None:
    items, weights = weigh(
        parse_histories(column(users)),
        50 * MICROS_PER_DAY,
        half_life_days=half_life,
        combine=combine,
    )
    for row, user in enumerate(users):
        span = slice(items.start[row], items.start[row + 1])
        want = plain(user, half_life, combine)
        assert items.values[span].tolist() == sorted(want)
        assert weights[span].tolist() == pytest.approx([want[i] for i in sorted(want)], rel=1e-6)


@given(rows.filter(len))
def test_a_row_alone_weighs_the_same(users: list[Any]) -> None:
    together = weigh(
        parse_histories(column(users)), 50 * MICROS_PER_DAY, half_life_days=7.0, combine="sum"
    )
    for row in range(len(users)):
        sliced = parse_histories(column(users).slice(row, 1))
        alone = weigh(sliced, 50 * MICROS_PER_DAY, half_life_days=7.0, combine="sum")
        span = slice(together[0].start[row], together[0].start[row + 1])
        assert np.array_equal(alone[1], together[1][span])


def test_types_of_events_stay_beside_their_events() -> None:
    assert parse_histories(column([[(1, 2, 1.0)]])).event_type is None
    event = pa.struct([*EVENT, ("event_type", pa.string())])
    users = [["look", "buy", "look"], [], [None, "buy"]]
    rows_of_users = [
        [
            {"item_idx": n, "event_at": n, "weight": 1.0, "event_type": t}
            for n, t in enumerate(types)
        ]
        for types in users
    ]
    history = parse_histories(pa.array(rows_of_users, pa.list_(event)))
    assert history.event_type.to_pylist() == ["look", "buy", "look", None, "buy"]
    assert history.part(slice(1, 3)).event_type.to_pylist() == [None, "buy"]
    later = where(history, history.item_idx > 0)
    assert later.event_type.to_pylist() == ["buy", "look", "buy"]
    assert later.start.tolist() == [0, 2, 2, 3]
