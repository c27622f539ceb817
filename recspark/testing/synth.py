"""Small data sets with a known answer, as the `Dataset` that models are fitted on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.data import features
from recspark.data.blocks import MICROS_PER_DAY, Array, micros
from recspark.data.dataset import Dataset
from recspark.data.interactions import before, interactions, queries

CUTOFF = datetime(2020, 7, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Log:
    """Events as flat arrays, one entry an event.

    `user_idx` int64, `item_idx` int32, `age` float64 (days before `CUTOFF`; negative = after it),
    `weight` float32.
    """

    user_idx: Array
    item_idx: Array
    age: Array
    weight: Array

    def __add__(self, other: Log) -> Log:
        return Log(*(np.concatenate(both) for both in zip(_fields(self), _fields(other))))

    def only(self, kept: Array) -> Log:
        """Return the events that `kept` (bool or positions) picks, in that order."""
        return Log(*(field[kept] for field in _fields(self)))


def log(events: Iterable[tuple[int, int, float]]) -> Log:
    """Return the log of `(user, item, age in days)` events of weight 1."""
    user, item, age = zip(*events)
    return Log(
        np.array(user, np.int64),
        np.array(item, np.int32),
        np.array(age, np.float64),
        np.ones(len(user), np.float32),
    )


def checkerboard(n_users: int, n_items: int) -> tuple[Log, dict[int, int]]:
    """Return events and the right first recommendation of each user.

    Even users like all even items, odd users odd ones; each user's own item is held out, and is the
    answer: all the user's neighbours like it. Source: implicit, tests/recommender_base_test.py.
    """
    held_out = {user: user % n_items for user in range(n_users)}
    events = [
        (user, item, 1.0 + (user + item) % 5)
        for user in range(n_users)
        for item in range(user % 2, n_items, 2)
        if item != held_out[user]
    ]
    return log(events), held_out


def drift(n_users: int, n_items: int, seed: int = 1) -> tuple[Log, set[int]]:
    """Return events whose items change 60 days before the cutoff, and the items of the late half.

    Early events (120 to 60 days old) outnumber late ones (10 to 0 days old) three to one: a model
    without decay prefers early items, one with decay late ones.
    """
    rng = np.random.default_rng(seed)
    half = n_items // 2
    events = []
    for user in range(n_users):
        for item in rng.choice(half, 6, replace=False):
            events += [(user, int(item), float(age)) for age in rng.uniform(60, 120, 2)]
        for item in half + rng.choice(n_items - half, 4, replace=False):
            events.append((user, int(item), float(rng.uniform(0.1, 10))))
    return log(events), set(range(half, n_items))


def power_law(
    n_users: int, n_items: int, n_groups: int = 4, mean_length: int = 12, seed: int = 1
) -> Log:
    """Return events of users with tastes: nine in ten fall in the user's group of items.

    Item `i` belongs to group `i % n_groups`; within a group, popularity falls as 1 / (place + 2). Times
    fall within 100 days before the cutoff; indices have gaps: users and items are multiples of 3.
    """
    rng = np.random.default_rng(seed)
    lengths = 2 + rng.poisson(mean_length, n_users)
    user = np.repeat(np.arange(n_users), lengths)
    weight = 1 / (np.arange(n_items) // n_groups + 2.0)
    at_home = rng.random(len(user)) < 0.9
    group = np.where(at_home, user % n_groups, rng.integers(0, n_groups, len(user)))
    share = [np.where(np.arange(n_items) % n_groups == g, weight, 0) for g in range(n_groups)]
    bounds = np.stack([np.cumsum(s) / s.sum() for s in share])  # (n_groups, n_items)
    item = (rng.random(len(user))[:, None] > bounds[group]).sum(axis=1)
    age = rng.uniform(0.01, 100, len(user))
    return Log(user * 3, (item * 3).astype(np.int32), age, np.ones(len(user), np.float32))


def histories(spark: SparkSession, events: Log, n_partitions: int = 2) -> DataFrame:
    """Return `user_idx, history, seen` of all events, rows by user, history in time order."""
    order = np.lexsort((-events.age, events.user_idx))
    user, item = events.user_idx[order], events.item_idx[order]
    users, first = np.unique(user, return_index=True)
    at = micros(CUTOFF) - np.rint(events.age[order] * MICROS_PER_DAY).astype(np.int64)
    day = [f"s{u}-{d}" for u, d in zip(user, at // MICROS_PER_DAY)]
    struct = pa.StructArray.from_arrays(
        [
            pa.array(item, pa.int32()),
            pa.array(at, pa.timestamp("us", "UTC")),
            pa.array(["purchase"] * len(user), pa.string()),
            pa.array(events.weight[order], pa.float32()),
            pa.array(np.ones(len(user)), pa.float32()),
            pa.array(day, pa.string()),
            pa.array(day, pa.string()),
        ],
        names=schema.HISTORY_EVENT.names,
    )
    start = np.append(first, len(user))
    rows = pa.table(
        {
            "user_idx": pa.array(users, pa.int64()),
            "history": pa.ListArray.from_arrays(pa.array(start, pa.int32()), struct),
        }
    )
    kind = schema.columns(user_idx=schema.LONG, history=schema.HISTORY)
    frame = spark.createDataFrame(rows, kind)
    return frame.repartitionByRange(n_partitions, "user_idx") if n_partitions > 1 else frame


def items(spark: SparkSession, item_idx: Array) -> DataFrame:
    """Return a catalogue of the items: `item_id` "i<idx>", a name, a category, a price."""
    index = np.unique(item_idx)
    rows = pa.table(
        {
            "item_idx": pa.array(index, pa.int32()),
            "item_id": [f"i{i}" for i in index],
            "item_name": [f"item {i}" for i in index],
            "category": [[f"c{i % 4}"] for i in index],
            "price": pa.array(1.0 + index % 7, pa.float64()),
            "text": [f"words of item {i}" for i in index],
        }
    )
    return spark.createDataFrame(rows)


def dataset(spark: SparkSession, events: Log, n_partitions: int = 2) -> Dataset:
    """Return what a model is fitted on: `events` before `CUTOFF` (later ones are sliced away)."""
    sliced = before(histories(spark, events, n_partitions), CUTOFF)
    catalogue = items(spark, events.item_idx[events.age > 0])
    return Dataset(
        cutoff=CUTOFF,
        histories=sliced,
        interactions=interactions(sliced, CUTOFF, None).drop("cutoff"),
        items=catalogue,
        user_features=features.user_features(sliced, CUTOFF).drop("cutoff"),
        item_features=features.item_features(sliced, catalogue, CUTOFF).drop("cutoff"),
    )


def ask(data: Dataset, mode: str = "novel") -> DataFrame:
    """Return the queries of all users of `data`."""
    return queries(data.histories, data.cutoff, None, mode)


def _fields(events: Log) -> tuple[Array, Array, Array, Array]:
    return events.user_idx, events.item_idx, events.age, events.weight
