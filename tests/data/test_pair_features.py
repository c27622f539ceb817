"""Features of pairs against a loop over the events of one user, and that they look at nobody else."""

from __future__ import annotations

import math
import re
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recspark.config import Examples
from recspark.data.blocks import MICROS_PER_DAY, Histories
from recspark.data.pair_features import (
    FEATURES,
    ORDER_DECAY,
    Catalogue,
    Pairs,
    names,
    pair_features,
)
from tests.conftest import ROOT

NAN = math.nan
AS_OF = 100 * MICROS_PER_DAY
CATALOGUE = Catalogue(
    np.array([1, 2, 3, 4], np.int32),
    np.array([2.0, 4.0, NAN, 8.0]),
    np.array([0, 1, 0, -1], np.int32),
)
GROUPS = tuple(FEATURES)
# An event: item, days before the cutoff (whole or half), order (None = it is not known), weight.
Event = tuple[int, float, str | None, float]


def pairs_of(users: list[list[Event]], pairs: list[tuple[int, int]]) -> Pairs:
    events = [event for user in users for event in user]
    history = Histories(
        np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64),
        np.array([item for item, *_ in events], np.int32),
        np.array([AS_OF - days * MICROS_PER_DAY for _, days, *_ in events], np.int64),
        np.array([weight for *_, weight in events], np.float32),
        pa.array([order for _, _, order, _ in events], pa.string()),
    )
    row, item = (np.array([pair[n] for pair in pairs], np.int64) for n in (0, 1))
    return Pairs(row, item.astype(np.int32), history, AS_OF, CATALOGUE)


def by_hand(events: list[Event], item: int) -> dict[str, float]:
    """The features of one user and one item by a plain loop; events are in time order."""
    events = [event for event in events if event[3] > 0]
    orders: list[list[Event]] = []
    for event in events:
        if not orders or event[2] is None or orders[-1][-1][2] != event[2]:
            orders.append([])
        orders[-1].append(event)
    own = [  # of each order with the item: its number, and the age of the item's first event in it
        (number, next(days for i, days, *_ in order if i == item))
        for number, order in enumerate(orders)
        if any(i == item for i, *_ in order)
    ]
    n = len(orders)
    first, last = (own[0], own[-1]) if own else ((NAN, NAN), (NAN, NAN))
    gap = (first[1] - last[1]) / (len(own) - 1) if len(own) > 1 else NAN
    span = (events[0][1] - events[-1][1]) / (n - 1) if n > 1 else NAN
    price = dict(zip(CATALOGUE.items.tolist(), CATALOGUE.price.tolist(), strict=True))
    category = dict(zip(CATALOGUE.items.tolist(), CATALOGUE.category.tolist(), strict=True))
    prices = [price[i] for i, *_ in events if not math.isnan(price.get(i, NAN))]
    of_category = [i for i, *_ in events if category.get(i, -1) == category.get(item, -1)]
    has_category = category.get(item, -1) >= 0 and bool(events)
    values = {
        "n_orders": len(own),
        "order_share": len(own) / n if n else NAN,
        "share_since_first": len(own) / (n - first[0]) if own else NAN,
        "days_since_last": last[1],
        "days_since_first": first[1],
        "orders_since_last": n - 1 - last[0],
        "gap_days": gap,
        "due": last[1] / gap if gap > 0 else NAN,
        "due_by_user": last[1] / span if span > 0 else NAN,
        **{f"decayed_{h}d": sum(0.5 ** (days / h) for _, days in own) for h in (7, 30, 90)},
        "decayed_orders": sum(ORDER_DECAY ** (n - 1 - number) for number, _ in own),
        "price_ratio": price.get(item, NAN) / (sum(prices) / len(prices)) if prices else NAN,
        "category_share": len(of_category) / len(events) if has_category else NAN,
    }
    return {f"pair_{name}": float(value) for name, value in values.items()}


@st.composite
def users(draw: st.DrawFn) -> list[list[Event]]:
    """Histories of a few users, in time order; an order has events of one or several days. Some
    events weigh nothing, or have no weight, or no order.
    """
    histories = []
    for _ in range(draw(st.integers(1, 4))):
        ages = sorted(draw(st.lists(st.integers(1, 60), max_size=12)), reverse=True)
        order, history = 0, []
        for age in ages:
            order += draw(st.booleans())
            name = draw(st.sampled_from([f"o{order}", f"o{order}", None]))
            weight = draw(st.sampled_from([1.0, 2.0, 1.0, 0.0, -1.0, NAN]))
            history.append((draw(st.integers(1, 5)), age / 2, name, weight))
        histories.append(history)
    return histories


@given(users())
def test_features_are_those_of_a_loop(histories: list[list[Event]]) -> None:
    pairs = [(row, item) for row in range(len(histories)) for item in (5, 1, 4, 2, 3, 9)]
    features = pair_features(pairs_of(histories, pairs), GROUPS)
    assert tuple(features) == names(GROUPS)
    for name, values in features.items():
        expected = [by_hand(histories[row], item)[name] for row, item in pairs]
        np.testing.assert_allclose(values, expected, rtol=1e-12, err_msg=name)


@given(users())
def test_a_user_has_the_same_bits_alone(histories: list[list[Event]]) -> None:
    items = (1, 2, 3, 4, 5)
    together = pair_features(
        pairs_of(histories, [(row, i) for row in range(len(histories)) for i in items]), GROUPS
    )
    for row, history in enumerate(histories):
        alone = pair_features(pairs_of([history], [(0, item) for item in items]), GROUPS)
        for name, values in alone.items():
            part = together[name][row * len(items) : (row + 1) * len(items)]
            assert values.tobytes() == part.tobytes(), name


def test_an_example_by_hand() -> None:
    """Two orders of the item: 40 and 10 days ago; an order without it lies between and one after."""
    history: list[Event] = [
        (1, 40, "a", 1), (2, 40, "a", 1), (2, 20, "b", 3), (1, 10, "c", 1), (1, 10, "c", 1),
        (2, 4, "d", 1), (1, 3, "e", 0), (1, 2, "f", NAN), (1, 1, "g", -1),
    ]  # fmt: skip
    features = pair_features(pairs_of([history], [(0, 1)]), GROUPS)
    shown = {name.removeprefix("pair_"): values[0] for name, values in features.items()}
    assert shown == {
        "n_orders": 2, "order_share": 0.5, "share_since_first": 0.5, "days_since_last": 10,
        "days_since_first": 40, "orders_since_last": 1, "gap_days": 30,
        "due": pytest.approx(1 / 3), "due_by_user": pytest.approx(10 / 12),
        "decayed_7d": pytest.approx(2 ** (-10 / 7) + 2 ** (-40 / 7)),
        "decayed_30d": pytest.approx(2 ** (-1 / 3) + 2 ** (-4 / 3)),
        "decayed_90d": pytest.approx(2 ** (-1 / 9) + 2 ** (-4 / 9)),
        "decayed_orders": pytest.approx(0.9 + 0.9**3), "price_ratio": pytest.approx(2 / 3),
        "category_share": 0.5,
    }  # fmt: skip


def test_the_setting_names_the_groups_and_the_page_every_feature() -> None:
    field = Examples.model_fields["features"]
    assert get_args(get_args(field.annotation)[0]) == GROUPS == field.default
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(pair_\w+)` \|", page, re.MULTILINE))
    assert named == set(names(GROUPS))
