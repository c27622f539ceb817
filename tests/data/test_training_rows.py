from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Features
from recspark.data import training_rows
from recspark.data.blocks import MICROS_PER_DAY, Histories
from recspark.pipeline.training_sets import training_set
from recspark.testing import synth

CUTOFF = datetime(2020, 1, 11, tzinfo=UTC)
DAY = MICROS_PER_DAY


def history(rows: list[list[tuple[int, float, float]]]) -> Histories:
    """Rows of (item, day, weight)."""
    flat = [event for row in rows for event in row]
    return Histories(
        start=np.cumsum([0, *map(len, rows)]),
        item_idx=np.array([e[0] for e in flat], np.int32),
        event_at=np.array([int(e[1] * DAY) for e in flat], np.int64),
        weight=np.array([e[2] for e in flat], np.float32),
    )


def test_bags_by_hand() -> None:
    """Half-life of 2 days, seen from day 10: an event of day 8 counts half, one of day 6 a
    quarter.
    """
    rows = history([[(7, 6, 1), (3, 8, 1), (7, 8, 2)], [], [(5, 10, 3)]])
    items, weights, lengths = training_rows.bags(rows, 10 * DAY, 2.0, 3)
    np.testing.assert_array_equal(items, [[3, 7, -1], [-1, -1, -1], [5, -1, -1]])
    np.testing.assert_array_equal(weights, [[0.5, 1.25, 0], [0, 0, 0], [3, 0, 0]])
    np.testing.assert_array_equal(lengths, [2, 0, 1])
    assert (items.dtype, weights.dtype, lengths.dtype) == (np.int32, np.float32, np.int32)


def test_newest_items_stay_and_the_smaller_of_equals() -> None:
    rows = history([[(9, 1, 1), (4, 2, 1), (8, 2, 1), (6, 2, 1), (1, 0, 1), (1, 3, 1)]])
    items, weights, lengths = training_rows.bags(rows, 10 * DAY, None, 3)
    # 1 is newest though also oldest; of 4, 6, 8 at day 2, the smaller two.
    np.testing.assert_array_equal(items, [[1, 4, 6]])
    np.testing.assert_array_equal(weights, [[2, 1, 1]])
    np.testing.assert_array_equal(lengths, [3])


def event(item: int, days_before: float, weight: float = 1.0) -> tuple[Any, ...]:
    at = CUTOFF - timedelta(days=days_before)
    return (item, at, "purchase", weight, 1.0, "session", None)


@pytest.fixture(scope="module")
def histories(spark: Any) -> Any:
    rows = [(user, [event(user % 7, 2), event(user % 5, 1)], [], 0) for user in range(1000)]
    rows += [(1000, [], [], 0), (1001, None, [], 0), (1002, [event(3, 0), event(4, -1)], [], 0)]
    rows += [(1003, [event(6, 2, 4.0), event(9, -2)], [], 0)]
    return spark.createDataFrame(rows, schema.HISTORIES)


@pytest.mark.spark
def test_a_row_per_user_with_events_before_the_cutoff(histories: Any) -> None:
    features = Features(max_training_items=4, half_life_days=2.0)  # type: ignore[call-arg]
    frame = training_rows.training_bags(histories, CUTOFF, features, 4)
    assert [(f.name, f.dataType) for f in frame.schema] == [
        (f.name, f.dataType) for f in schema.TRAINING_BAGS
    ]
    rows = {row.user_idx: row for row in frame.collect()}
    assert sorted(rows) == [*range(1000), 1003]
    assert rows[1003].asDict() == {
        "cutoff": CUTOFF.replace(tzinfo=None),
        "user_idx": 1003,
        "items": [6, -1, -1, -1],
        "weights": [2.0, 0.0, 0.0, 0.0],
        "length": 1,
    }
    assert rows[8].items == [1, 3, -1, -1]
    assert rows[8].weights == [0.5, pytest.approx(math.sqrt(0.5)), 0.0, 0.0]


@pytest.mark.spark
@pytest.mark.parametrize("n_files", [1, 2, 3, 7, 16])
def test_partitions_are_even_and_one_shuffle_makes_them(histories: Any, n_files: int) -> None:
    features = Features(max_training_items=4)  # type: ignore[call-arg]
    frame = training_rows.training_bags(histories, CUTOFF, features, n_files)
    plan = frame._jdf.queryExecution().executedPlan().toString()
    sizes = np.array(frame.rdd.mapPartitions(lambda rows: [sum(1 for _ in rows)]).collect())
    assert len(sizes) == n_files
    assert sizes.sum() == 1001
    fair = 1001 / n_files
    assert np.abs(sizes - fair).max() <= 4 * math.sqrt(fair)
    assert plan.count("Exchange") == 1


@pytest.mark.spark
def test_training_set_is_the_slice_of_the_pinned_version(
    spark: Any, catalog: Any, histories: Any
) -> None:
    features = Features(max_training_items=4)  # type: ignore[call-arg]
    other = CUTOFF - timedelta(days=1)
    for cutoff in (other, CUTOFF):
        frame = training_rows.training_bags(histories, cutoff, features, 4)
        first = catalog.replace_slice("training_bags", frame, {"cutoff": cutoff}, n_files=4)
    found = training_set(catalog, "training_bags", first.version, {"cutoff": CUTOFF})
    assert (found.table, found.version) == ("training_bags", first.version)
    assert len(found.files) == 4
    assert found.n_rows == first.rows == 1001
    # Rows of a file are sorted, so that the order of training does not depend on the cluster.
    uris = [uri for uri, _ in found.files]
    assert uris == sorted(uris)
    for uri in uris:
        users = [row.user_idx for row in spark.read.parquet(uri).collect()]
        assert users == sorted(users)

    # A later version has other files; the pinned one keeps its own.
    fewer = training_rows.training_bags(histories.where("user_idx < 100"), CUTOFF, features, 2)
    second = catalog.replace_slice("training_bags", fewer, {"cutoff": CUTOFF}, n_files=2)
    again = training_set(catalog, "training_bags", first.version, {"cutoff": CUTOFF})
    assert again == found
    later = training_set(catalog, "training_bags", second.version, {"cutoff": CUTOFF})
    assert (len(later.files), later.n_rows) == (2, 100)


def in_sessions(rows: list[list[tuple[int, str | None]]]) -> Histories:
    """Rows of (item, session)."""
    flat = [event for row in rows for event in row]
    return Histories(
        start=np.cumsum([0, *map(len, rows)]),
        item_idx=np.array([item for item, _ in flat], np.int32),
        event_at=np.arange(len(flat)),
        weight=np.ones(len(flat), np.float32),
        session_id=pa.array([session for _, session in flat], pa.string()),
    )


def windows_of(
    unit: training_rows.Unit, length: int, newest: int = 99
) -> list[tuple[int, int, Any]]:
    rows = in_sessions(
        [
            [(1, "a"), (2, "a"), (3, "a"), (4, "a"), (5, "a"), (6, "b"), (7, "c"), (7, "c")],
            [],
            [(8, None), (9, None)],
            [(5, "c")],
        ]
    )
    row, position, items, lengths = training_rows.sequences(rows, unit, length, newest)
    assert items.shape == (len(row), length)
    assert all((i[n:] == training_rows.NO_ITEM).all() for i, n in zip(items, lengths, strict=True))
    return [
        (int(r), int(p), i[:n].tolist())
        for r, p, i, n in zip(row, position, items, lengths, strict=True)
    ]


def test_sessions_by_hand() -> None:
    """A session of five items gives steps 1-2-3-4-5 once each in windows of three; one item gives
    none. Events without a session are sessions of one item.
    """
    assert windows_of("session", 3) == [(0, 2, [3, 4, 5]), (0, 0, [1, 2, 3]), (0, 6, [7, 7])]
    assert windows_of("session", 4) == [(0, 1, [2, 3, 4, 5]), (0, 0, [1, 2]), (0, 6, [7, 7])]


def test_only_the_newest_events_of_a_user_count() -> None:
    assert windows_of("session", 9, 5) == [(0, 3, [4, 5]), (0, 6, [7, 7])]
    assert windows_of("history", 9, 5) == [(0, 3, [4, 5, 6, 7, 7]), (2, 0, [8, 9])]
    assert windows_of("history", 5) == [
        (0, 3, [4, 5, 6, 7, 7]),
        (0, 0, [1, 2, 3, 4]),
        (2, 0, [8, 9]),
    ]


@pytest.mark.parametrize("length", [2, 3, 7])
def test_every_step_of_a_session_is_in_one_row(length: int) -> None:
    rng = np.random.default_rng(length)
    rows = [[(i, f"{i // 5}") for i in range(n)] for n in rng.integers(0, 30, 200)]
    row, position, items, lengths = training_rows.sequences(
        in_sessions(rows), "session", length, 99
    )
    steps = [
        (r, i[j], i[j + 1])
        for r, i, n in zip(row, items, lengths, strict=True)
        for j in range(n - 1)
    ]
    want = [(r, i, i + 1) for r, n in enumerate(rows) for i in range(len(n) - 1) if (i + 1) % 5]
    assert sorted(steps) == want
    assert (items[:, 0] == position).all()  # items are places in the history here


@pytest.mark.spark
@pytest.mark.parametrize("unit", ["session", "history"])
def test_training_sequences_as_a_table(
    histories: Any, catalog: Any, unit: training_rows.Unit
) -> None:
    features = Features(sequence_length=4)  # type: ignore[call-arg]
    table = {"session": "training_sessions", "history": "training_histories"}[unit]
    frame = training_rows.TRAINING_TABLES[table](histories, CUTOFF, features, 4)
    where = {"cutoff": CUTOFF}
    written = catalog.replace_slice(table, frame, where, n_files=4)
    found = training_set(catalog, table, written.version, where)
    assert (found.table, found.n_rows, len(found.files)) == (table, 1000, 4)
    assert min(rows for _, rows in found.files) > 200
    rows = catalog.read(table, written.version).toArrow().sort_by("user_idx").to_pylist()
    # Users 1002 and 1003 have one event before the cutoff.
    assert [r["user_idx"] for r in rows] == list(range(1000))
    assert rows[12]["items"] == [12 % 7, 12 % 5, -1, -1]
    assert (rows[12]["position"], rows[12]["length"]) == (0, 2)


def test_item_bags_are_bags_on_their_side(spark: SparkSession) -> None:
    """The newest three users of an item; weights added up; events at the cutoff left out."""
    features = Features(max_training_users=3)  # type: ignore[call-arg]
    events = synth.log(
        [(3, 5, 1.0), (4, 5, 9.0), (7, 5, 2.0), (7, 5, 3.0), (9, 5, 4.0), (9, 8, 5.0), (2, 8, -1.0)]
    )
    histories = synth.histories(spark, events)
    frame = training_rows.training_item_bags(histories, synth.CUTOFF, features, 2)
    assert frame.schema.simpleString() == schema.TRAINING_ITEM_BAGS.simpleString()
    found = {row["item_idx"]: row[2:] for row in frame.collect()}
    assert found == {5: ([3, 7, 9], [1, 2, 1], 3), 8: ([9, -1, -1], [1, 0, 0], 1)}


def test_events_before_the_cutoff_have_a_row_each(spark: SparkSession) -> None:
    """Of three users with 5, 1 and 0 events before the cutoff; no setting caps them."""
    rows = [(1, [event(i, 6 - i) for i in range(5)] + [event(9, -1)]), (2, [event(7, 3)]), (3, [])]
    users = spark.createDataFrame(rows, f"user_idx bigint, history {schema.HISTORY.simpleString()}")
    settings = Features(max_training_items=3)  # type: ignore[call-arg]
    table = training_rows.training_events(users, CUTOFF, settings, 2)
    assert table.schema.simpleString() == schema.TRAINING_EVENTS.simpleString()
    found = table.orderBy("user_idx", "position").drop("cutoff").collect()
    as_of = CUTOFF.timestamp() * 1e6
    expected = [(1, p, p, as_of - (6 - p) * DAY) for p in range(5)] + [(2, 0, 7, as_of - 3 * DAY)]
    assert [tuple(row) for row in found] == expected


def test_timelines_have_the_ages_of_the_newest_events(spark: SparkSession) -> None:
    """In time order, repeats kept; users with one event before the cutoff are left out."""
    features = Features(max_training_items=3)  # type: ignore[call-arg]
    events = synth.log(
        [(3, 5, 9.0), (3, 6, 2.0), (3, 5, 1.5), (3, 8, 0.25), (4, 5, 9.0), (4, 5, -1.0)]
        + [(7, 8, 3.0), (7, 8, 2.0), (7, 6, -2.0)]
    )
    frame = training_rows.training_timelines(
        synth.histories(spark, events), synth.CUTOFF, features, 2
    )
    assert frame.schema.simpleString() == schema.TRAINING_TIMELINES.simpleString()
    found = {row["user_idx"]: row[2:] for row in frame.collect()}
    day = 86_400
    assert found == {
        3: ([6, 5, 8], [2 * day, 3 * day // 2, day // 4], 3),
        7: ([8, 8, -1], [3 * day, 2 * day, 0], 2),
    }


def test_typed_timelines_have_the_types_beside_the_items(spark: SparkSession) -> None:
    """Of the newest events only, in their order; an event without a type has the code 0."""
    features = Features(max_training_items=3)  # type: ignore[call-arg]
    types = ("look", "buy", None, "look")

    def typed(item: int, days_before: float, event_type: str | None) -> tuple[Any, ...]:
        fields = event(item, days_before)
        return (*fields[:2], event_type, *fields[3:])

    events = [typed(5 + n, 6 - n, event_type) for n, event_type in enumerate(types)]
    few = [typed(n, 9 - n, "buy") for n in (1, 2)]
    users = spark.createDataFrame(
        [(1, events), (2, few), (3, few[:1])],
        f"user_idx bigint, history {schema.HISTORY.simpleString()}",
    )
    table = training_rows.TRAINING_TABLES["training_typed_timelines"]
    frame = table(users, CUTOFF, features, 2)
    assert frame.schema.simpleString() == schema.TRAINING_TYPED_TIMELINES.simpleString()
    plain = training_rows.training_timelines(users, CUTOFF, features, 2)
    assert sorted(frame.drop("types").collect()) == sorted(plain.collect())
    look, buy = training_rows.type_code("look"), training_rows.type_code("buy")
    found = {row["user_idx"]: (row["items"], row["types"]) for row in frame.collect()}
    assert found == {1: ([6, 7, 8], [buy, 0, look]), 2: ([1, 2, -1], [buy, buy, 0])}
