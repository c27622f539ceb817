"""User kNN against brute force over random logs, on planted groups, and at its limits."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from recspark.data.blocks import MICROS_PER_DAY, Histories, QueryBlock, Ragged, micros
from recspark.errors import CatalogueTooLargeError
from recspark.models.base import FitOptions
from recspark.models.items.user_knn import (
    UserKNN,
    UserKNNModel,
    UserKNNSettings,
    build_index,
    weighted_items,
    weights_of,
)
from recspark.models.scoring import memory, topk
from recspark.models.scoring.listed import ListedScores, SlicedScores
from recspark.testing import synth
from recspark.testing.case import ordered

CUTOFF = datetime(2020, 1, 11, tzinfo=UTC)
NAN = float("nan")
Event = tuple[int, float, float]  # item, age in days, weight


def history_of(rows: list[list[Event]]) -> Histories:
    """Of each row its events, in any order."""
    events = [event for row in rows for event in sorted(row, key=lambda event: -event[1])]
    return Histories(
        np.cumsum([0, *map(len, rows)]),
        np.array([item for item, _, _ in events], np.int32),
        np.array([micros(CUTOFF) - age * MICROS_PER_DAY for _, age, _ in events], np.int64),
        np.array([weight for _, _, weight in events], np.float32),
    )


def fitted(
    users: dict[int, list[Event]], items: list[int], made: UserKNNSettings, n_batches: int = 1
) -> UserKNNModel:
    """The model of these users: user_idx -> events. Batches of users come in reverse order."""
    vocabulary, rules = np.array(items, np.int32), weights_of(made, micros(CUTOFF))
    parts = np.array_split(np.array([*users], np.int64), n_batches)
    batches = [
        weighted_items(
            pa.array(part), history_of([users[user] for user in part]), vocabulary, rules
        )
        for part in reversed(parts)
    ]
    arrays = build_index(pa.Table.from_batches(batches), len(items))
    return UserKNNModel(made, CUTOFF, vocabulary, arrays)


def answers(model: UserKNNModel, queries: dict[int, list[Event]]) -> ListedScores:
    """The scores of all queries, as one slice."""
    scores = sliced_answers(model, queries)
    return scores.score_rows(slice(0, scores.n_rows))


def sliced_answers(model: UserKNNModel, queries: dict[int, list[Event]]) -> SlicedScores:
    n = len(queries)
    nothing_seen = Ragged(np.zeros(n + 1, np.int64), np.zeros(0, np.int32))
    user_idx = np.array([*queries], np.int64)
    return model.scorer().score(QueryBlock(user_idx, history_of([*queries.values()]), nothing_seen))  # type: ignore[return-value]


def by_query(model: UserKNNModel, queries: dict[int, list[Event]]) -> list[dict[int, float]]:
    """The scores of each query by item_idx; checks that the items of a query are ascending."""
    listed = answers(model, queries)
    assert (listed.start.dtype, listed.items.dtype, listed.scores.dtype) == ("i8", "i4", "f4")
    found = []
    for begin, end in zip(listed.start[:-1], listed.start[1:], strict=True):
        assert (np.diff(listed.items[begin:end]) > 0).all()
        names = model.items[listed.items[begin:end]].tolist()
        found.append(dict(zip(names, listed.scores[begin:end].tolist(), strict=True)))
    return found


# --- brute force ----------------------------------------------------------------------------------


def decayed(events: list[Event], items: list[int], half_life: float | None) -> dict[int, float]:
    """Of each known item, ascending, its heaviest decayed event; none that weighs 0 or less."""
    weights: dict[int, float] = {}
    for item in items:
        of_item = [
            weight * (0.5 ** (age / half_life) if half_life else 1)
            for i, age, weight in events
            if i == item and not math.isnan(weight)
        ]
        if of_item and np.float32(max(of_item)) > 0:
            weights[item] = float(np.float32(max(of_item)))
    return weights


def unit(weights: dict[int, float]) -> dict[int, float]:
    squares = 0.0
    for weight in weights.values():
        squares += weight * weight
    return {item: weight / math.sqrt(squares) for item, weight in weights.items()}


def brute_force(
    users: dict[int, list[Event]],
    items: list[int],
    made: UserKNNSettings,
    query_user: int,
    query: list[Event],
) -> dict[int, float]:
    vector = unit(decayed(query, items, made.half_life_days))
    similar = []
    for user, events in users.items():
        other = unit(decayed(events, items, made.half_life_days))
        similarity = 0.0
        for item in vector:  # ascending
            similarity += vector[item] * other.get(item, 0.0)
        if user != query_user and similarity > 0:
            similar.append((-similarity, user))
    scores: dict[int, float] = {}
    for negative, user in sorted(similar)[: made.n_neighbours]:
        for item, vote in decayed(users[user], items, made.vote_half_life_days).items():
            scores[item] = scores.get(item, 0.0) - negative * vote
    return scores


event = st.tuples(
    st.integers(0, 6),
    st.sampled_from([0.0, 3.0, 3.0, 40.0, 1000.0]),
    st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.0, -1.0, NAN]),
)


@settings(max_examples=200, deadline=None)
@given(
    histories=st.lists(st.lists(event, max_size=6), max_size=9),
    strangers=st.lists(st.lists(event, max_size=6), max_size=2),
    n_neighbours=st.integers(1, 4),
    half_lives=st.sampled_from([(None, None), (20.0, 5.0), (5.0, None)]),
)
def test_scores_are_those_of_brute_force(
    histories: list[list[Event]],
    strangers: list[list[Event]],
    n_neighbours: int,
    half_lives: tuple[float | None, float | None],
) -> None:
    """Few ages and items, so that similarities are often equal. An event of 1,000 days ago weighs
    nothing by a half-life of 5 days. Item 6 is not in the vocabulary.
    """
    users = {3 * n + 1: events for n, events in enumerate(histories)}
    queries = {**users, **{100 + n: events for n, events in enumerate(strangers)}}
    items = [0, 1, 2, 3, 4, 5]
    made = UserKNNSettings(
        n_neighbours=n_neighbours,
        half_life_days=half_lives[0],
        vote_half_life_days=half_lives[1],
    )
    found = by_query(fitted(users, items, made), queries)
    wanted = [brute_force(users, items, made, user, events) for user, events in queries.items()]
    assert [{*row} for row in found] == [{*row} for row in wanted]
    assert found == [pytest.approx(row, rel=1e-6) for row in wanted]


def random_users(n_users: int, n_items: int, seed: int) -> dict[int, list[Event]]:
    rng = np.random.default_rng(seed)
    return {
        2 * user: [
            (int(item), float(rng.integers(0, 50)), 1.0)
            for item in rng.integers(0, n_items, rng.integers(1, 15))
        ]
        for user in range(n_users)
    }


def seen_of(users: dict[int, list[Event]]) -> Ragged:
    """Every other item of each user, to be masked."""
    seen = [sorted({item for item, _, _ in events})[::2] for events in users.values()]
    return Ragged(
        np.cumsum([0, *map(len, seen)]),
        np.array([item for items in seen for item in items], np.int32),
    )


def bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def test_neither_batches_nor_slices_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    users, items, made = random_users(60, 25, 1), [*range(25)], UserKNNSettings(n_neighbours=7)
    model = fitted(users, items, made)
    assert bits(fitted(users, items, made, n_batches=7).arrays()) == bits(model.arrays())
    whole = answers(model, users)
    rows, wanted = np.repeat(np.arange(60), 25)[::-1], np.tile(np.arange(25), 60)
    block = QueryBlock(np.array([*users]), history_of([*users.values()]), seen_of(users))
    lists = topk.answer(block, model.items, model.scorer(), 5)
    assert lists.num_rows > 5 * 50
    for n_bytes, n_rows in ((0, 1), (12 * 60 * 7, 7)):
        monkeypatch.setattr(memory, "block_bytes", lambda n_bytes=n_bytes: n_bytes)
        sliced = sliced_answers(model, users)
        assert sliced.rows_at_once == n_rows
        assert sliced.exact(rows, wanted).tobytes() == whole.exact(rows, wanted).tobytes()
        assert topk.answer(block, model.items, model.scorer(), 5) == lists


def test_the_votes_of_a_slice_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few users with long histories: their votes take more than the similarities."""
    users: dict[int, list[Event]] = {
        user: [(item, 1.0, 1.0) for item in range(100 * user, 100 * user + 150)]
        for user in range(4)
    }
    model = fitted(users, [*range(450)], UserKNNSettings(n_neighbours=2))
    monkeypatch.setattr(memory, "block_bytes", lambda: 20 * (2 * 150) * 3)
    assert sliced_answers(model, users).rows_at_once == 3
    made = UserKNNSettings(n_neighbours=50)  # a list has no more items than there are
    model = fitted(users, [*range(450)], made)
    monkeypatch.setattr(memory, "block_bytes", lambda: 20 * 450 * 3)
    assert sliced_answers(model, users).rows_at_once == 3


# --- planted answers ------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """Users 1 and 2 share item 0 with the query: cosines 1 / sqrt(2) and 1 / sqrt(3). Without
    decay each votes 1 for its items; by a half-life of 1 day, item 1 has .25 and the others .5.
    """
    users = {1: [(0, 1.0, 1.0), (1, 2.0, 1.0)], 2: [(0, 1.0, 1.0), (2, 1.0, 1.0), (3, 1.0, 1.0)]}
    query = {7: [(0, 0.0, 1.0)]}
    a, b = 1 / math.sqrt(2), 1 / math.sqrt(3)
    made = UserKNNSettings(half_life_days=None, vote_half_life_days=None)
    [found] = by_query(fitted(users, [0, 1, 2, 3], made), query)
    assert found == pytest.approx({0: a + b, 1: a, 2: b, 3: b}, rel=1e-6)
    made = made.model_copy(update={"vote_half_life_days": 1.0})
    [found] = by_query(fitted(users, [0, 1, 2, 3], made), query)
    assert found == pytest.approx({0: (a + b) / 2, 1: a / 4, 2: b / 2, 3: b / 2}, rel=1e-6)
    made = made.model_copy(update={"n_neighbours": 1})
    [found] = by_query(fitted(users, [0, 1, 2, 3], made), query)
    assert found == pytest.approx({0: a / 2, 1: a / 4}, rel=1e-6)


def test_the_own_user_is_no_neighbour() -> None:
    """The index has user 5; a stranger with the same history has user 5 as neighbour."""
    events = [(0, 1.0, 1.0), (1, 1.0, 1.0)]
    model = fitted({5: events, 6: [(2, 1.0, 1.0)]}, [0, 1, 2], UserKNNSettings(n_neighbours=1))
    own, stranger = by_query(model, {5: events, 4: events})
    assert own == {}
    assert set(stranger) == {0, 1}


def test_of_equally_similar_users_those_of_smaller_user_idx_vote() -> None:
    """User 2 is more similar than all others, who are alike but for an item that has no part in
    the similarity: it is too old to weigh anything there.
    """
    users: dict[int, list[Event]] = {
        9 - n: [(0, 0.0, 1.0), (1, 0.0, 1.0), (2 + n, 400.0, 1.0)] for n in range(5)
    }
    users[20] = [(0, 0.0, 1.0)]
    made = UserKNNSettings(half_life_days=1.0, vote_half_life_days=None, n_neighbours=3)
    [found] = by_query(fitted(users, [*range(7)], made), {1: [(0, 0.0, 1.0)]})
    assert set(found) == {0, 1, 6, 5}  # of the users 20, 5 and 6
    assert found[0] == pytest.approx(1 + 2 / math.sqrt(2))


def test_an_index_without_users_lists_nothing() -> None:
    model = fitted({1: [(9, 1.0, 1.0)]}, [0, 1], UserKNNSettings())
    assert len(model.arrays()["user_idx"]) == 0
    assert by_query(model, {1: [(0, 1.0, 1.0)], 2: []}) == [{}, {}]
    assert by_query(model, {}) == []
    no_queries = QueryBlock(np.zeros(0, np.int64), history_of([]), seen_of({}))
    assert topk.answer(no_queries, model.items, model.scorer(), 5).num_rows == 0


def groups(n_users: int) -> synth.Log:
    """Even users act on five of the items 0 to 9, odd ones on those of 10 to 19, days ago. All of a
    group but the last two act on item 20 (even), 21 (odd) today, and on 30, 31 a month ago.
    """
    rng = np.random.default_rng(2)
    events = []
    for user in range(n_users):
        group = user % 2
        events += [
            (user, int(item), float(rng.uniform(5, 9)))
            for item in 10 * group + rng.choice(10, 5, replace=False)
        ]
        if user < n_users - 4:
            events += [(user, 20 + group, 0.1), (user, 30 + group, 30.0)]
    return synth.log(events)


@pytest.mark.spark
def test_the_newest_item_of_the_group_comes_first(spark: SparkSession) -> None:
    """With votes that do not decay, the two items of the group have the same score."""
    data = synth.dataset(spark, groups(40))
    model = UserKNN.from_dict({"vote_half_life_days": 3.0}).fit(data, FitOptions())
    listed = ordered(model.recommend(synth.ask(data), 10)).to_pylist()
    for user in (36, 37, 38, 39):
        group = user % 2
        items = [row["item_idx"] for row in listed if row["user_idx"] == user]
        assert items[0] == 20 + group
        assert items[-1] == 30 + group
        assert set(items[1:-1]) == set(range(10 * group, 10 * group + 10)) - set(
            data.histories.where(f"user_idx = {user}").first()["seen"]  # type: ignore[index]
        )
    steady = UserKNN.from_dict({"vote_half_life_days": None}).fit(data, FitOptions())
    first = ordered(steady.recommend(synth.ask(data).where("user_idx = 36"), 2)).to_pylist()
    assert [row["item_idx"] for row in first] == [20, 30]
    assert first[0]["score"] == first[1]["score"]


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.spark
def test_of_too_many_users_a_sample_is_compared(spark: SparkSession) -> None:
    """The same one for any partitions, about as large as asked for; the seed draws another one."""
    events = synth.power_law(200, 30)

    def users_of(n_partitions: int, seed: int, **values: Any) -> list[int]:
        data = synth.dataset(spark, events, n_partitions)
        options = FitOptions()
        options = FitOptions(train=options.train.model_copy(update={"seed": seed}))
        model = UserKNN.from_dict(values).fit(data, options)
        return model.arrays()["user_idx"].tolist()  # type: ignore[no-any-return]

    assert users_of(2, 1) == np.unique(events.user_idx).tolist()
    sample = users_of(2, 1, max_users=50)
    assert 25 < len(sample) < 75
    assert users_of(5, 1, max_users=50) == sample
    assert users_of(2, 2, max_users=50) != sample


@pytest.mark.spark
def test_an_index_above_the_limit_is_refused(spark: SparkSession) -> None:
    """Before it is collected. The limit is that of the sampled users."""
    data = synth.dataset(spark, synth.log([(0, 1, 1.0), (0, 1, 2.0), (1, 1, 1.0), (1, 2, 1.0)]))
    assert UserKNN.from_dict({"max_entries": 3}).fit(data, FitOptions()).arrays()["votes"].size == 3
    with pytest.raises(CatalogueTooLargeError, match="have 3 items, max_entries is 2; lower"):
        UserKNN.from_dict({"max_entries": 2}).fit(data, FitOptions())
