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
from recspark.models.scoring import topk
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
    rows: list[list[tuple[float, Order]]],
    items: list[int],
    made: OwnItemsSettings,
    popularity: list[float],
) -> list[dict[int, float]]:
    """The scores of each row by item_idx; checks that the items of a row are ascending."""
    shares = topk.Shared(np.array(popularity, np.float32))
    listed = OwnItemsScorer(made, 0, np.array(items, np.int32), shares).score(block_of(rows))
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
    popularity = [0.5, 1.0, 0.0]

    def found(**values: float) -> list[dict[int, float]]:
        return scores_of(rows, [7, 8, 9], OwnItemsSettings(**values), popularity)

    wanted = [{7: 0.81 + 0.9, 8: 0.81, 9: 1.0}, {8: 0.81}, {}, {7: 1.0}]
    approximate = [pytest.approx(row, rel=1e-6) for row in wanted]
    assert found(order_decay=0.9, popularity_weight=0) == approximate
    wanted = [{7: 0.81 + 0.9 + 0.05, 8: 0.81 + 0.1, 9: 1.0}, {8: 0.81 + 0.1}, {}, {7: 1.0 + 0.05}]
    approximate = [pytest.approx(row, rel=1e-6) for row in wanted]
    assert found(order_decay=0.9, popularity_weight=0.1) == approximate
    wanted = [{7: 2**-9 + 2**-8, 8: 2**-9, 9: 0.5}, {8: 2**-4}, {}, {7: 0.25}]
    assert found(order_decay=1.0, half_life_days=1.0, popularity_weight=0) == wanted


@pytest.mark.parametrize("n_orders", [1, 20])
def test_equal_counts_go_to_the_popular_item(n_orders: int) -> None:
    """Also where the count is 20 and the popularities differ by 1/400 of the largest one. Item 0 is
    the most popular one by far, but its count is smaller or larger.
    """
    orders: list[tuple[float, Order]] = [
        (30 - n, [(1, 1), (2, 1), (3, 1)]) for n in range(n_orders)
    ]
    rows = [[*orders, (1, [(0, 1)]), (1, [(0, 1)])]]
    items, popularity = [0, 1, 2, 3], [1.0, 0.1, 0.105, 0.1025]
    [scores] = scores_of(rows, items, OwnItemsSettings(order_decay=1), popularity)
    assert len(set(scores.values())) == 4
    by_score = sorted(items, key=lambda item: -scores[item])
    assert by_score == ([0, 2, 3, 1] if n_orders == 1 else [2, 3, 1, 0])
    without = OwnItemsSettings(order_decay=1, popularity_weight=0)
    assert scores_of(rows, items, without, popularity) == [
        {0: 2, 1: n_orders, 2: n_orders, 3: n_orders}
    ]


order = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.5, 1.0, 0.0, -1.0, np.nan])), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(order, max_size=6), max_size=5),
    decay=st.sampled_from([0.5, 0.9, 1.0]),
    half_life=st.sampled_from([None, 2.0]),
    weight=st.sampled_from([0.0, 0.001, 2.0]),
    popularity=st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5),
)
def test_scores_are_those_of_brute_force(
    rows: list[list[Order]],
    decay: float,
    half_life: float | None,
    weight: float,
    popularity: list[float],
) -> None:
    """Order by order, from the newest: item 5 is not in the vocabulary."""
    timed = [[(float(len(row) - n), order) for n, order in enumerate(row)] for row in rows]
    made = OwnItemsSettings(order_decay=decay, half_life_days=half_life, popularity_weight=weight)
    wanted = []
    for row in timed:
        sums: dict[int, float] = defaultdict(float)
        n_later = 0
        for age, order in reversed(row):
            counting = {item for item, event_weight in order if event_weight > 0}
            for item in counting - {5}:
                sums[item] += decay**n_later * (0.5 ** (age / half_life) if half_life else 1)
            n_later += bool(counting)
        with_popularity = {item: sums[item] + weight * popularity[item] for item in sums}
        wanted.append(pytest.approx(with_popularity, rel=1e-6))
    assert scores_of(timed, [0, 1, 2, 3, 4], made, popularity) == wanted


@pytest.mark.spark
def test_the_items_of_the_newest_and_most_orders_come_first(spark: SparkSession) -> None:
    """In mode repeat: a fit on events, where each day is an order. Seen items masked: nothing."""
    events = [(0, 1, 9.5), (0, 2, 8.5), (0, 1, 7.5), (0, 3, 1.5), (1, 2, 3.5)]
    data = synth.dataset(spark, synth.log(events))
    settings = {"order_decay": 0.8, "popularity_weight": 0}
    model = OwnItems.from_dict(settings).fit(data, FitOptions())
    lists = ordered(model.recommend(synth.ask(data, "repeat"), 10)).to_pylist()
    assert [(row["user_idx"], row["item_idx"]) for row in lists] == [(0, 1), (0, 3), (0, 2), (1, 2)]
    assert [row["score"] for row in lists] == pytest.approx([0.8 + 0.8**3, 1, 0.8**2, 1])
    assert model.recommend(synth.ask(data, "novel"), 10).toArrow().num_rows == 0


EVENTS = [(0, 3, 0.0001), (1, 3, 2.0), (2, 4, 1.0), (3, 5, 4.0), (3, 6, 3.0), (0, 5, 4.0)]


@pytest.mark.spark
@pytest.mark.parametrize(
    ("half_life", "popularity"),
    [(None, [1, 0.5, 1, 0.5]), (1.0, [1, 0.4, 0.1, 0.1]), (2.0, [1, 2**0.5 / 3, 1 / 3, 2**-1.5 / 1.5])],
)  # fmt: skip
def test_popularity_by_hand(
    spark: SparkSession, half_life: float | None, popularity: list[float]
) -> None:
    """Decayed by a half-life of its own, divided by the largest one."""
    values = {"popularity_half_life_days": half_life, "half_life_days": 400.0}
    model = OwnItems.from_dict(values).fit(synth.dataset(spark, synth.log(EVENTS)), FitOptions())
    found = model.arrays()["popularity"]
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array(popularity), rel=1e-4)


@pytest.mark.spark
def test_popularity_of_events_without_weight(spark: SparkSession) -> None:
    """An event of weight 0 or less adds nothing to the popularity; nor do all events together."""
    log = synth.log(EVENTS)
    signs = [(1, [1, 0.5, 1, 0.5]), (-1, [0, 0, 0, 0]), (0, [0, 0, 0, 0])]
    for sign, popularity in signs:
        weight = np.full(len(EVENTS), sign, np.float32)
        log = synth.Log(log.user_idx, log.item_idx, log.age, weight)
        data = synth.dataset(spark, log)
        model = OwnItems.from_dict({"popularity_half_life_days": None}).fit(data, FitOptions())
        assert model.arrays()["popularity"].tolist() == popularity


@pytest.mark.spark
def test_equal_counts_after_a_fit(spark: SparkSession) -> None:
    """User 9 bought the items 1 and 2 once each. More users bought item 1, but long ago; by a long
    half-life it is the more popular one. The bits do not depend on the partitions.
    """
    rng = np.random.default_rng(0)
    others = [(user, 1 if user < 5 else 2, float(rng.uniform(50, 60) if user < 5 else rng.uniform(1, 5)))
              for user in range(8)]  # fmt: skip
    log = synth.log([(9, 1, 3.0), (9, 2, 3.0), *others])

    def fitted_and_listed(n_partitions: int, **values: float | None) -> tuple[bytes, list[int]]:
        data = synth.dataset(spark, log, n_partitions)
        model = OwnItems.from_dict(values).fit(data, FitOptions())
        queries = synth.ask(data, "repeat").where("user_idx = 9")
        lists = ordered(model.recommend(queries, 10))
        return model.arrays()["popularity"].tobytes(), lists.column("item_idx").to_pylist()

    bits, listed = fitted_and_listed(2)
    assert listed == [2, 1]
    assert fitted_and_listed(7) == (bits, [2, 1])
    assert fitted_and_listed(2, popularity_weight=0) == (bits, [1, 2])
    assert fitted_and_listed(2, popularity_half_life_days=None)[1] == [1, 2]
