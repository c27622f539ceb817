"""Similarities against a loop over the last items of one user."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recspark.data.blocks import MICROS_PER_DAY, Array, Histories
from recspark.data.pair_similarity import (
    HALF_LIFE_DAYS,
    LAST_ITEMS,
    ItemVectors,
    similarities,
    similarity_names,
)

AS_OF = 1000 * MICROS_PER_DAY
# Item 9 has no direction, and item 8 is not among the items that have a vector.
RAW = {n: np.array([math.cos(n), math.sin(n), n % 3]) for n in (5, 1, 2, 3, 4, 6, 7)} | {
    9: np.zeros(3)
}
VECTORS = ItemVectors.of(np.array([*RAW], np.int32), np.array([*RAW.values()]))
Event = tuple[int, int, float]  # item, days before the cutoff, weight


def histories(users: list[list[Event]]) -> Histories:
    """Events of each user, oldest first."""
    events = [event for user in users for event in sorted(user, key=lambda event: -event[1])]
    return Histories(
        np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64),
        np.array([item for item, *_ in events], np.int32),
        np.array([AS_OF - days * MICROS_PER_DAY for _, days, _ in events], np.int64),
        np.array([weight for *_, weight in events], np.float32),
    )


def compared(users: list[list[Event]], pairs: list[tuple[int, int]]) -> tuple[Array, Array, Array]:
    row, item = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    return similarities(row, item.astype(np.int32), histories(users), AS_OF, VECTORS)


def cosine(left: int, right: int) -> float:
    a, b = RAW[left], RAW[right]
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_hand(user: list[Event], item: int) -> tuple[float, float, float]:
    age: dict[int, int] = {}
    for other, days, weight in sorted(user, key=lambda event: event[1]):  # newest first
        if weight > 0 and other not in age and len(age) < LAST_ITEMS:
            age[other] = days
    has_vector = {n for n, vector in RAW.items() if vector.any()}
    cosines = {
        n: cosine(item, n) for n in age if n != item and n in has_vector and item in has_vector
    }
    if not cosines:
        return (math.nan,) * 3
    decayed = sum(value * 0.5 ** (age[n] / HALF_LIFE_DAYS) for n, value in cosines.items())
    return max(cosines.values()), sum(cosines.values()) / len(cosines), decayed


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(1, 9), st.integers(1, 400), st.sampled_from([0.0, 1.0, math.nan])),
            max_size=8, unique_by=lambda event: event[1],
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_as_a_loop_over_the_users_items(users: list[list[Event]]) -> None:
    pairs = [(row, item) for row in range(len(users)) for item in range(1, 10)]
    expected = np.array([by_hand(users[row], item) for row, item in pairs]).T
    np.testing.assert_allclose(compared(users, pairs), expected, rtol=1e-5, atol=1e-6)


def test_only_the_last_items_count() -> None:
    """The item that the user acted on before twenty others is forgotten, until it is acted on again."""
    items = np.arange(100, dtype=np.int32)
    vectors = ItemVectors.of(items, np.eye(100))
    vectors.vectors[99] = vectors.vectors[0]  # item 99 is like item 0 and no other
    others = [(n, 30 - n, 1.0) for n in range(1, LAST_ITEMS + 1)]
    forgotten, again = [(0, 500, 1.0), *others], [(0, 500, 1.0), *others, (0, 1, 1.0)]
    row, item = np.array([0, 1]), np.array([99, 99], np.int32)
    largest, mean, decayed = similarities(row, item, histories([forgotten, again]), AS_OF, vectors)
    assert largest == pytest.approx([0, 1])
    assert mean == pytest.approx([0, 1 / LAST_ITEMS])
    assert decayed == pytest.approx([0, 0.5 ** (1 / HALF_LIFE_DAYS)], abs=1e-6)


def test_pairs_in_many_steps_are_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    users = [[(n, n, 1.0) for n in range(1, 8)], [(3, 2, 1.0)], []]
    pairs = [(row, item) for row in range(3) for item in range(1, 10)]
    whole = compared(users, pairs)
    monkeypatch.setattr("recspark.data.pair_similarity._VALUES_AT_ONCE", 1)
    np.testing.assert_array_equal(compared(users, pairs), whole)


def test_without_any_vector_nothing_is_known() -> None:
    nothing = ItemVectors.of(np.zeros(0, np.int32), np.zeros((0, 1), np.float32))
    values = similarities(
        np.array([0]), np.array([1], np.int32), histories([[(1, 1, 1.0)]]), AS_OF, nothing
    )
    assert np.isnan(values).all()


def test_the_names_are_those_of_the_model() -> None:
    assert similarity_names(["als"]) == ("als_similar_max", "als_similar_mean", "als_similar_sum")
