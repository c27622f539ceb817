"""Small data sets with a known answer, as the `Dataset` that models are fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config import Features
from recspark.data import features, texts
from recspark.data.blocks import (
    MICROS_PER_DAY,
    Array,
    Histories,
    QueryBlock,
    Ragged,
    micros,
    parse_histories,
)
from recspark.data.dataset import Dataset, TrainingSet
from recspark.data.impressions import TABLES as IMPRESSION_TABLES
from recspark.data.impressions import sequences_shown
from recspark.data.interactions import before, queries
from recspark.data.windows import Unit, bags, sequences, training_item_bags
from recspark.models.base import RetrieverModel
from recspark.models.scoring import topk

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
    answer: all the user's neighbours like it. Times are random, so that an order of items, if a
    model looks for one, says no more than the set. Source: implicit, tests/recommender_base_test.py.
    """
    rng = np.random.default_rng(1)
    held_out = {user: user % n_items for user in range(n_users)}
    events = [
        (user, item, float(rng.uniform(1, 6)))
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
    """Return events of users with tastes: nine in ten fall in the user's group.

    Item `i` belongs to group `i % n_groups`, popularity within it falls as 1 / (place + 2). Times
    fall within 100 days before the cutoff; indices have gaps: all are multiples of 3.
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


def hold_out_newest(events: Log) -> tuple[Log, dict[int, int]]:
    """Return the log without each user's newest event, and that event's item by user.

    Only where the item is new to the user, and others acted on it; else nothing is held out.
    """
    kept = np.ones(len(events.age), bool)
    held_out = {}
    for user in np.unique(events.user_idx):
        mine = np.flatnonzero(events.user_idx == user)
        newest = mine[np.argmin(events.age[mine])]
        item = events.item_idx[newest]
        same = events.item_idx == item
        if same[mine].sum() == 1 and (same & kept).sum() > 1:
            kept[newest] = False
            held_out[int(user)] = int(item)
    return events.only(kept), held_out


def histories(spark: SparkSession, events: Log, n_partitions: int = 2) -> DataFrame:
    """Return `user_idx, history` of all events, spread by user; history in time order."""
    users, column = history_column(events)
    rows = pa.table({"user_idx": pa.array(users, pa.int64()), "history": column})
    frame = spark.createDataFrame(
        rows, schema.columns(user_idx=schema.LONG, history=schema.HISTORY)
    )
    return frame.repartition(n_partitions, "user_idx")


def tastes(
    n_users: int = 400, n_items: int = 120, n_liked: int = 24, seed: int = 1
) -> tuple[Log, Array]:
    """Return events of planted tastes, and what was held back of them, bool (n_users, n_items).

    A user's items are drawn one after the other by exp(a taste of 4 numbers times the item's + the
    item's popularity); every fourth is held back. All users have as many.
    """
    rng = np.random.default_rng(seed)
    liking = 1.2 * rng.normal(size=(n_users, 4)) @ rng.normal(size=(4, n_items))
    noise = rng.gumbel(size=liking.shape)  # the largest sums are such a draw
    order = np.argsort(-(liking + rng.normal(size=n_items) + noise), axis=1)[:, :n_liked]
    held = np.zeros(liking.shape, bool)
    np.put_along_axis(held, order[:, ::4], True, axis=1)
    kept = np.ones(n_liked, bool)
    kept[::4] = False
    item = order[:, kept].ravel()
    user = np.repeat(np.arange(n_users), kept.sum())
    n = len(user)
    return Log(user, item.astype(np.int32), np.ones(n), np.ones(n, np.float32)), held


def scores(model: RetrieverModel, events: Log) -> Array:
    """Return what a model whose lists come from `DotScores` gives every item, (n_users, n_items)."""
    users, column = history_column(events)
    nothing = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    found = model.scorer().score(QueryBlock(users, parse_histories(column), nothing))
    assert isinstance(found, topk.DotScores)
    return found.approximate(slice(0, len(users)))


def ndcg(scored: Array, events: Log, held: Array, k: int = 10) -> float:
    """Return NDCG@k of what was held back, the mean of the users, their own items masked."""
    masked = scored.copy()
    masked[events.user_idx, events.item_idx] = -np.inf
    top = np.argsort(-masked, axis=1, kind="stable")[:, :k]
    gains = 1 / np.log2(np.arange(k) + 2)
    ideal = np.cumsum(gains)[np.minimum(held.sum(axis=1), k) - 1]
    return float((np.take_along_axis(held, top, axis=1) @ gains / ideal).mean())


def history_column(events: Log) -> tuple[Array, pa.ListArray]:
    """Return the users, ascending, and their histories (`schema.HISTORY`), newest last."""
    order = np.lexsort((-events.age, events.user_idx))
    users, first = np.unique(events.user_idx[order], return_index=True)
    at = micros(CUTOFF) - np.rint(events.age[order] * MICROS_PER_DAY).astype(np.int64)
    days = [f"s{u}-{d}" for u, d in zip(events.user_idx[order], at // MICROS_PER_DAY)]
    struct = pa.StructArray.from_arrays(
        [
            pa.array(events.item_idx[order], pa.int32()),
            pa.array(at, pa.timestamp("us", "UTC")),
            pa.array(["purchase"] * len(order), pa.string()),
            pa.array(events.weight[order], pa.float32()),
            pa.array(np.ones(len(order)), pa.float32()),
            pa.array(days, pa.string()),
            pa.array(days, pa.string()),
        ],
        names=schema.HISTORY_EVENT.names,
    )
    start = pa.array(np.append(first, len(order)), pa.int32())
    return users, pa.ListArray.from_arrays(start, struct)


def write_training(
    events: Log, folder: str, table: str, n_files: int = 2, length: int = 32
) -> TrainingSet:
    """Write the events before `CUTOFF` as training table `table`, rows dealt over `n_files`."""
    users, column = history_column(events.only(events.age > 0))
    history = parse_histories(column)
    if table == "training_bags":
        items, weights, lengths = bags(history, micros(CUTOFF), None, length)
        made = {"weights": pa.array(list(weights), pa.list_(pa.float32()))}
    elif table in IMPRESSION_TABLES:
        row, position, items, lengths, *shown = sequences_shown(
            history, shown_with(history), IMPRESSION_TABLES[table], length, 512, 2 * length
        )
        users, made = users[row], {"position": pa.array(position, pa.int32())}
        for name, values in zip(("shown", "shown_after", "clicked"), shown, strict=True):
            made[name] = pa.array(list(values), pa.list_(pa.int32()))
    else:
        unit: Unit = "session" if table == "training_sessions" else "history"
        row, position, items, lengths = sequences(history, unit, length, 512)
        users, made = users[row], {"position": pa.array(position, pa.int32())}
    rows = pa.table(
        {
            "user_idx": pa.array(users, pa.int64()),
            **made,
            "items": pa.array(list(items), pa.list_(pa.int32())),
            "length": pa.array(lengths, pa.int32()),
        }
    )
    return write_files(rows, folder, table, n_files)


def shown_with(history: Histories, seed: int = 1) -> Histories:
    """Return impressions: with each act its item and another, drawn evenly, shown just before it."""
    items = np.unique(history.item_idx)
    drawn = np.random.default_rng(seed).choice(items, len(history.item_idx))
    return Histories(
        start=2 * history.start,
        item_idx=np.stack([history.item_idx, drawn], axis=1).ravel(),
        event_at=np.repeat(history.event_at, 2),
        weight=np.repeat(history.weight, 2),
        session_id=history.session_id.take(np.repeat(np.arange(len(drawn)), 2))
        if history.session_id is not None
        else None,
    )


def write_files(rows: pa.Table, folder: str, table: str, n_files: int) -> TrainingSet:
    """Write `rows` as a training set of `n_files` Parquet files below a local `folder`."""
    files = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for n in range(n_files):
        part = rows.take(pa.array(np.arange(n, rows.num_rows, n_files)))
        pq.write_table(part, f"{folder}/{n}.parquet")
        files.append((f"file://{folder}/{n}.parquet", part.num_rows))
    return TrainingSet(table, 0, tuple(files))


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


def dataset(
    spark: SparkSession,
    events: Log,
    n_partitions: int = 2,
    training: Mapping[str, str] | None = None,
) -> Dataset:
    """Return what a model is fitted on: `events` before `CUTOFF` (later ones are sliced away).

    `training` : table to the folder that its training set is written to; None = there is none.
    """
    sliced = before(histories(spark, events, n_partitions), CUTOFF)
    catalogue = items(spark, events.item_idx[events.age > 0])
    sets = {}
    for table, folder in (training or {}).items():
        if table in (texts.TABLE, "training_item_bags"):
            settings = Features()  # type: ignore[call-arg]
            frame = (
                texts.training_texts(catalogue, CUTOFF, settings, 1)
                if table == texts.TABLE
                else training_item_bags(sliced, CUTOFF, settings, 1)
            )
            rows = frame.drop("cutoff").toArrow().sort_by("item_idx")
            sets[table] = write_files(rows, folder, table, 2)
        else:
            sets[table] = write_training(events, folder, table)
    return Dataset(
        cutoff=CUTOFF,
        histories=sliced,
        items=catalogue,
        user_features=features.user_features(sliced, CUTOFF).drop("cutoff"),
        item_features=features.item_features(sliced, catalogue, CUTOFF).drop("cutoff"),
        training=sets,
    )


def ask(data: Dataset, mode: str = "novel") -> DataFrame:
    """Return the queries of all users of `data`."""
    return queries(data.histories, mode)


def _fields(events: Log) -> tuple[Array, Array, Array, Array]:
    return events.user_idx, events.item_idx, events.age, events.weight
