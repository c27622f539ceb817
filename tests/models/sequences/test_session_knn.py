"""VSKNN and STAN against the papers' equations: by hand, and by brute force over all sessions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark import schema
from recspark.data.blocks import MICROS_PER_DAY, Array, Histories, QueryBlock, Ragged, micros
from recspark.data.dataset import Dataset
from recspark.engines import session_index
from recspark.engines.session_index import SessionIndex
from recspark.engines.session_kernel import next_items
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models.base import FitOptions
from recspark.models.scoring.listed import ListedScores
from recspark.models.sequences.session_knn import (
    SessionKNN,
    SessionKNNModel,
    SessionKNNSettings,
    method_weights,
)

CUTOFF = datetime(2020, 1, 11, tzinfo=UTC)


def index_of(sessions: list[list[int]], n_items: int, n_newest: int) -> SessionIndex:
    """Session s ended s + 1 days before the cutoff."""
    n = len(sessions)
    lengths = np.array([len(s) for s in sessions])
    items = np.full((n, lengths.max()), -1)
    for row, session in zip(items, sessions, strict=True):
        row[: len(session)] = session
    start, item, place = session_index.last_places(items, lengths)
    order = np.random.default_rng(n).permutation(n)
    rows = pa.table(
        {
            "user_idx": pa.array(np.arange(n), pa.int64()),
            "position": pa.array(np.zeros(n), pa.int32()),
            "ended_at": pa.array(micros(CUTOFF) - (1 + np.arange(n)) * MICROS_PER_DAY, pa.int64()),
            "length": pa.array(lengths, pa.int32()),
            "items": pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(item)),
            "places": pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(place)),
        }
    )
    return session_index.build(rows.take(pa.array(order)), np.arange(n_items), n_newest)


def answers(
    settings: SessionKNNSettings, index: SessionIndex, item_weight: Array, opened: list[list[int]]
) -> Array:
    """Dense scores, 0 where an item is not listed."""
    start = np.cumsum([0, *map(len, opened)])
    values = np.array([item for row in opened for item in row], np.int64)
    weights = method_weights(settings, index, item_weight, micros(CUTOFF))
    begin, items, scores = next_items(
        Ragged(start, values), index, weights, settings.n_newest, settings.n_neighbours
    )
    out = np.zeros((len(opened), len(item_weight)))
    out[np.repeat(np.arange(len(opened)), np.diff(begin)), items] = scores
    return out


def test_vsknn_by_hand() -> None:
    """Open: 0, 1, so weights 1/2 and 1. Neighbours: {1, 2} similar by 1; {0, 2} by 1/2, two steps
    from the end: counts half; {0, 1} by 3/2.
    """
    index = index_of([[1, 3, 2], [0, 2], [0, 1]], 4, 10)
    settings = SessionKNNSettings(idf=0)
    found = answers(settings, index, np.ones(4), [[0, 1]])
    np.testing.assert_array_equal(found, [[1 / 4 + 3 / 2, 1 + 3 / 2, 1 + 1 / 4, 1]])
    two = answers(settings.model_copy(update={"n_neighbours": 2}), index, np.ones(4), [[0, 1]])
    np.testing.assert_array_equal(two, [[3 / 2, 1 + 3 / 2, 1, 1]])
    # Of item 1 the newest session is {1, 2}, of item 0 it is {0, 2}; the newest of both is first.
    newest = answers(settings.model_copy(update={"n_newest": 1}), index, np.ones(4), [[0, 1]])
    np.testing.assert_array_equal(newest, [[0, 1, 1, 1]])


def test_stan_by_hand() -> None:
    """Open: 0, 1. Neighbour 0, 2, 1 of three items, a day old: shares both, 1 at its place 2."""
    index = index_of([[0, 2, 1]], 3, 10)
    settings = SessionKNNSettings(
        method="stan", position_decay=2, recency_days=4, neighbour_decay=3
    )
    similarity = (np.exp(-1 / 2) + 1) / np.sqrt(2 * 3) * np.exp(-1 / 4)
    want = similarity * np.exp(-np.array([2, 0, 1]) / 3)
    found = answers(settings, index, np.ones(3), [[0, 1]])
    np.testing.assert_allclose(found, [want], rtol=1e-6)


def brute_force(
    settings: SessionKNNSettings, sessions: list[list[int]], item_weight: Array, opened: list[int]
) -> Array:
    """The equations, session by session; lists are short and ordered newest first."""
    length = len(opened)
    last = {item: p for p, item in enumerate(opened, 1)}
    compared = [s for s, items in enumerate(sessions) if set(items) & set(last)][
        : settings.n_newest
    ]
    found = []
    for s in compared:
        shared = set(sessions[s]) & set(last)
        newest = max(shared, key=lambda item: last[item])
        if settings.method == "vsknn":
            power = {"linear": 1, "quadratic": 2, "equal": 0}[settings.position_weight]
            similarity = sum((last[i] / length) ** power for i in shared)
            factor = similarity / (length - last[newest] + 1)
        else:
            similarity = sum(np.exp(-(length - last[i]) / settings.position_decay) for i in shared)
            similarity /= np.sqrt(length * len(sessions[s]))
            if settings.recency_days is not None:
                similarity *= np.exp(-(s + 1) / settings.recency_days)
            factor = similarity
        found.append((similarity, s, newest, factor))
    scores = np.zeros(len(item_weight))
    for _, s, newest, factor in sorted(found, key=lambda f: (-round(f[0], 12), f[1]))[
        : settings.n_neighbours
    ]:
        place = {item: p for p, item in enumerate(sessions[s])}
        for item, p in place.items():
            near = 1.0
            if settings.method == "stan":
                near = np.exp(-abs(p - place[newest]) / settings.neighbour_decay)
            scores[item] += factor * near * item_weight[item]
    return scores


@pytest.mark.parametrize(
    "settings",
    [
        {"n_newest": 8, "n_neighbours": 1000},
        {"n_newest": 1000, "n_neighbours": 1000, "position_weight": "quadratic"},
        {"n_newest": 1000, "n_neighbours": 1000, "position_weight": "equal"},
        {"method": "stan", "n_newest": 12, "n_neighbours": 5},
        {"method": "stan", "n_newest": 1000, "n_neighbours": 20, "recency_days": None},
    ],
)
def test_kernel_is_the_equations(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    sessions = [rng.integers(0, 25, n).tolist() for n in rng.integers(2, 9, 300)]  # with repeats
    opened = [rng.integers(0, 25, n).tolist() for n in rng.integers(1, 7, 40)] + [[]]
    item_weight = rng.uniform(1, 3, 25)
    made = SessionKNNSettings(**settings)
    index = index_of(sessions, 25, made.n_newest)
    found = answers(made, index, item_weight, opened)
    want = np.array([brute_force(made, sessions, item_weight, row) for row in opened])
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_listed_scores_are_what_was_listed() -> None:
    scores = ListedScores(
        np.array([0, 2, 2, 3]),
        np.array([1, 4, 0], np.int32),
        np.array([0.5, 2.0, 3.0], np.float32),
        5,
    )
    assert scores.known.tolist() == [True, False, True]
    pairs = np.array([2, 0, 0, 1, 2]), np.array([0, 4, 3, 1, 4])
    np.testing.assert_array_equal(scores.exact(*pairs), [3, 2, -np.inf, -np.inf, -np.inf])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_best_of_listed_scores_are_those_of_whole_rows(data: st.DataObject) -> None:
    """Ties, masks of the user and of all users, scores of -inf, rows without any item."""
    draw = data.draw
    n_rows, n_items = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    cell = st.sampled_from([None, -np.inf, -1.0, 0.0, 0.5, 2.0])
    table = [[draw(cell) for _ in range(n_items)] for _ in range(n_rows)]
    seen = [[i for i in range(n_items) if draw(st.booleans())] for _ in range(n_rows)]
    allowed = (
        np.array([draw(st.booleans()) for _ in range(n_items)]) if draw(st.booleans()) else None
    )
    k = draw(st.integers(1, n_items + 1))
    listed = [[i for i in range(n_items) if row[i] is not None] for row in table]
    scores = ListedScores(
        np.cumsum([0, *map(len, listed)]),
        np.array([i for row in listed for i in row], np.int32),
        np.array([s for row in table for s in row if s is not None], np.float32),
        n_items,
    )
    masked = Ragged(
        np.cumsum([0, *map(len, seen)]), np.array([i for r in seen for i in r], np.int64)
    )
    row, item, rank, score = scores.best(masked, k, allowed)
    want = []
    for r, values in enumerate(table):
        may = [
            (-s, i)
            for i, s in enumerate(values)
            if s is not None and s > -np.inf and i not in seen[r]
            and (allowed is None or allowed[i])
        ]  # fmt: skip
        want += [(r, i, n, -s) for n, (s, i) in enumerate(sorted(may)[:k], 1)]
    assert (
        list(zip(row.tolist(), item.tolist(), rank.tolist(), score.tolist(), strict=True)) == want
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_listed_scores_that_are_none_are_an_error(bad: float) -> None:
    scores = ListedScores(np.array([0, 1]), np.zeros(1, np.int32), np.array([bad], np.float32), 2)
    with pytest.raises(ModelError, match="NaN or infinite"):
        scores.best(Ragged(np.zeros(2, np.int64), np.zeros(0, np.int64)), 1)


# --- fit -----------------------------------------------------------------------------------------


def event(item: int, days: float, session: str) -> tuple[Any, ...]:
    return (item, CUTOFF - timedelta(days=days), "click", 1.0, 1.0, session, None)


@pytest.fixture(scope="module")
def data(spark: Any) -> Dataset:
    rows = [
        (1, [event(10, 9, "a"), event(20, 9, "a"), event(10, 3, "b"), event(30, 3, "b")]),
        (2, [event(20, 5, "c"), event(30, 5, "c"), event(20, 5, "c")]),
        (3, [event(40, 1, "d")]),  # one item: follows nothing
        (4, [event(20, 8, "e"), event(10, 7, "e")]),
    ]
    histories = spark.createDataFrame(
        rows, schema.columns(user_idx=schema.LONG, history=schema.HISTORY)
    )
    items = spark.createDataFrame([(i,) for i in (10, 20, 30, 40)], "item_idx int")
    return Dataset(CUTOFF, histories, items, histories, histories)


@pytest.mark.spark
def test_index_of_a_data_set(data: Dataset) -> None:
    model = SessionKNN(SessionKNNSettings(n_newest=2)).fit(data, FitOptions())
    index = model.index
    # Newest first: b {10, 30}, c {30, 20}, e {20, 10}, a {10, 20}; a is in no item's newest two.
    days = (micros(CUTOFF) - index.session_at) / MICROS_PER_DAY
    assert days.tolist() == [3, 5, 7]
    assert index.session_items.tolist() == [0, 2, 2, 1, 1, 0]
    assert index.session_places.tolist() == [0, 1, 1, 2, 0, 1]
    assert index.session_length.tolist() == [2, 3, 2]
    assert index.item_start.tolist() == [0, 2, 4, 6, 6]
    assert index.item_sessions.tolist() == [0, 2, 1, 2, 0, 1]
    np.testing.assert_allclose(
        model.item_weight, 1 + np.log([4 / 3, 4 / 3, 4 / 2, 1]), rtol=1e-12
    )  # 40 is in no session of two


@pytest.mark.spark
def test_users_as_sessions(data: Dataset) -> None:
    settings = SessionKNNSettings(train_on="history", length=3)
    index = SessionKNN(settings).fit(data, FitOptions()).index
    assert index.session_items.tolist() == [1, 0, 2, 2, 1, 1, 0]  # 1: its newest three; 2; 4
    assert index.session_length.tolist() == [3, 3, 2]


@pytest.mark.spark
def test_too_large_an_index_is_refused_before_it_is_collected(data: Dataset) -> None:
    with pytest.raises(CatalogueTooLargeError, match=r"8 items, max_entries is 5; lower models\."):
        SessionKNN(SessionKNNSettings(max_entries=5)).fit(data, FitOptions())


def test_the_open_session_is_asked_about() -> None:
    index = index_of([[0, 1], [2, 3]], 4, 10)
    vocabulary = np.array([10, 20, 30, 40], np.int32)
    history = Histories(
        np.array([0, 3]),
        np.array([30, 10, 99], np.int32),
        np.zeros(3, np.int64),
        np.ones(3, np.float32),
        pa.array(["a", "b", "b"]),
    )
    none = Ragged(np.zeros(2, np.int64), np.zeros(0, np.int32))
    block = QueryBlock(np.zeros(1, np.int64), history, none)
    for context, want in (("session", [10, 20]), ("history", [10, 20, 30, 40])):
        settings = SessionKNNSettings(context=context, idf=0)  # type: ignore[arg-type]
        model = SessionKNNModel(settings, CUTOFF, vocabulary, index, np.ones(4))
        scores = model.scorer().score(block)
        assert vocabulary[scores.items].tolist() == want
