"""Own items by hand, and against brute force over random histories."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from recspark.data.blocks import MICROS_PER_DAY, Histories, QueryBlock, Ragged
from recspark.models.base import FitOptions
from recspark.models.items.own_items import OwnItems, OwnItemsScorer, OwnItemsSettings
from recspark.testing import synth
from recspark.testing.case import ordered

Order = list[tuple[int, float]]  # (item, weight)


def block_of(rows: list[list[tuple[float, Order]]]) -> QueryBlock:
    """Of each row the orders, oldest first: (age in days before 0, its items and their weights)."""
    events = [
        (item, age, weight, f"{row}-{n}")
        for row, orders in enumerate(rows)
        for n, (age, order) in enumerate(orders)
        for item, weight in order
    ]
    lengths = [sum(len(order) for _, order in orders) for orders in rows]
    history = Histories(
        np.cumsum([0, *lengths]),
        np.array([item for item, *_ in events], np.int32),
        np.array([-age * MICROS_PER_DAY for _, age, *_ in events], np.int64),
        np.array([weight for _, _, weight, _ in events], np.float32),
        pa.array([session_id for *_, session_id in events], pa.string()),
    )
    n = len(rows)
    return QueryBlock(
        np.arange(n), history, Ragged(np.zeros(n + 1, np.int64), np.zeros(0, np.int32))
    )


def scores_of(
    rows: list[list[tuple[float, Order]]], items: list[int], made: OwnItemsSettings
) -> list[dict[int, float]]:
    """The scores of each row by item_idx; checks that the items of a row are ascending."""
    listed = OwnItemsScorer(made, 0, np.array(items, np.int32)).score(block_of(rows))
    assert (listed.start.dtype, listed.items.dtype, listed.scores.dtype) == ("i8", "i4", "f4")
    found = []
    for begin, end in zip(listed.start[:-1], listed.start[1:], strict=True):
        assert (np.diff(listed.items[begin:end]) > 0).all()
        names = [items[local] for local in listed.items[begin:end]]
        found.append(dict(zip(names, listed.scores[begin:end].tolist(), strict=True)))
    return found


def test_scores_by_hand() -> None:
    """The newest order counts 1; an item twice in an order counts once; 5 is not known, but its
    order is one; events that weigh nothing are no order. Nobody else's orders count.
    """
    nan = float("nan")
    rows: list[list[tuple[float, Order]]] = [
        [(9, [(7, 1), (8, 2)]), (8, [(7, 1)]), (5, [(8, 0), (9, nan), (7, -1)]), (1, [(9, 1)] * 2)],
        [(4, [(8, 1)]), (3, [(5, 1)]), (2, [(5, 1), (8, 0)])],
        [],
        [(2, [(7, 1)])],
    ]
    found = scores_of(rows, [7, 8, 9], OwnItemsSettings(order_decay=0.9))
    wanted = [{7: 0.81 + 0.9, 8: 0.81, 9: 1.0}, {8: 0.81}, {}, {7: 1.0}]
    assert found == [pytest.approx(row, rel=1e-6) for row in wanted]
    found = scores_of(rows, [7, 8, 9], OwnItemsSettings(order_decay=1.0, half_life_days=1.0))
    wanted = [{7: 2**-9 + 2**-8, 8: 2**-9, 9: 0.5}, {8: 2**-4}, {}, {7: 0.25}]
    assert found == wanted


order = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.5, 1.0, 0.0, -1.0, np.nan])), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(order, max_size=6), max_size=5),
    decay=st.sampled_from([0.5, 0.9, 1.0]),
    half_life=st.sampled_from([None, 2.0]),
)
def test_scores_are_those_of_brute_force(
    rows: list[list[Order]], decay: float, half_life: float | None
) -> None:
    """Order by order, from the newest: item 5 is not in the vocabulary."""
    timed = [[(float(len(row) - n), order) for n, order in enumerate(row)] for row in rows]
    made = OwnItemsSettings(order_decay=decay, half_life_days=half_life)
    wanted = []
    for row in timed:
        sums: dict[int, float] = defaultdict(float)
        n_later = 0
        for age, order in reversed(row):
            counting = {item for item, weight in order if weight > 0}
            for item in counting - {5}:
                sums[item] += decay**n_later * (0.5 ** (age / half_life) if half_life else 1)
            n_later += bool(counting)
        wanted.append(pytest.approx(dict(sums), rel=1e-6))
    assert scores_of(timed, [0, 1, 2, 3, 4], made) == wanted


@pytest.mark.spark
def test_the_items_of_the_newest_and_most_orders_come_first(spark: SparkSession) -> None:
    """In mode repeat: a fit on events, where each day is an order. Seen items masked: nothing."""
    events = [(0, 1, 9.5), (0, 2, 8.5), (0, 1, 7.5), (0, 3, 1.5), (1, 2, 3.5)]
    data = synth.dataset(spark, synth.log(events))
    model = OwnItems.from_dict({"order_decay": 0.8}).fit(data, FitOptions())
    lists = ordered(model.recommend(synth.ask(data, "repeat"), 10)).to_pylist()
    assert [(row["user_idx"], row["item_idx"]) for row in lists] == [(0, 1), (0, 3), (0, 2), (1, 2)]
    assert [row["score"] for row in lists] == pytest.approx([0.8 + 0.8**3, 1, 0.8**2, 1])
    assert model.recommend(synth.ask(data, "novel"), 10).toArrow().num_rows == 0
