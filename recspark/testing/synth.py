"""Small synthetic data sets with a known answer, and the `Dataset` that models are fitted on.

A `Log` holds the events. `checkerboard`, `drift`, `power_law` and `tastes` make one; `dataset`
turns one into a `Dataset`.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Features
from recspark.data import features, training_texts
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
from recspark.data.interactions import before, queries
from recspark.data.training_impressions import TABLES as IMPRESSION_TABLES
from recspark.data.training_impressions import sequences_shown
from recspark.data.training_rows import (
    Unit,
    bags,
    newest_types,
    sequences,
    timelines,
    training_item_bags,
)
from recspark.models.base import RetrieverModel
from recspark.models.scoring import topk

CUTOFF = datetime(2020, 7, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Log:
    """Events as flat arrays with one entry per event.

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
        """Return the events that `kept` selects, by a bool array or by positions, in that order."""
        return Log(*(field[kept] for field in _fields(self)))


def log(events: Iterable[tuple[int, int, float]]) -> Log:
    """Return a log of events `(user, item, age in days)`, all with weight 1."""
    user, item, age = zip(*events)
    return Log(
        np.array(user, np.int64),
        np.array(item, np.int32),
        np.array(age, np.float64),
        np.ones(len(user), np.float32),
    )


def checkerboard(n_users: int, n_items: int) -> tuple[Log, dict[int, int]]:
    """Return events, and the right first recommendation of each user.

    Even users act on even items, and odd users on odd items. Each user acts on all of them but one:
    item `user % n_items` is held out. It is the right answer, since the other users of the user's
    colour act on it. Times are random, so that the order of the items holds no more information
    than the set, if a model looks for an order. Source: implicit, tests/recommender_base_test.py.
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
    """Return events in which users move on to other items, and the set of the late items.

    The first half of the items has events 120 to 60 days before the cutoff, and the second half has
    events in the last 10 days. There are three early events per late one. So a model without decay
    prefers early items, and one with decay prefers late items.
    """
    rng = np.random.default_rng(seed)
    n_early_items = n_items // 2
    events = []
    for user in range(n_users):
        for item in rng.choice(n_early_items, 6, replace=False):
            events += [(user, int(item), float(age)) for age in rng.uniform(60, 120, 2)]
        for item in n_early_items + rng.choice(n_items - n_early_items, 4, replace=False):
            events.append((user, int(item), float(rng.uniform(0.1, 10))))
    return log(events), set(range(n_early_items, n_items))


def power_law(
    n_users: int, n_items: int, n_groups: int = 4, mean_length: int = 12, seed: int = 1
) -> Log:
    """Return events of users who prefer one group of items.

    Item `i` belongs to group `i % n_groups`, and user `u` prefers group `u % n_groups`: nine events
    in ten fall in it, the others in a random group. Within a group popularity falls as 1 / (p + 2),
    where p = 0, 1, 2, ... is the item's position in the group. Times are random in the 100 days
    before the cutoff. User and item indices are multiplied by 3 at the end, so that they have gaps.
    """
    rng = np.random.default_rng(seed)
    lengths = 2 + rng.poisson(mean_length, n_users)
    user = np.repeat(np.arange(n_users), lengths)
    popularity = 1 / (np.arange(n_items) // n_groups + 2.0)
    is_in_group = rng.random(len(user)) < 0.9
    group = np.where(is_in_group, user % n_groups, rng.integers(0, n_groups, len(user)))
    popularity_in_group = [
        np.where(np.arange(n_items) % n_groups == g, popularity, 0) for g in range(n_groups)
    ]
    cumulative_shares = np.stack(
        [np.cumsum(p) / p.sum() for p in popularity_in_group]
    )  # (n_groups, n_items)
    item = (rng.random(len(user))[:, None] > cumulative_shares[group]).sum(axis=1)
    age = rng.uniform(0.01, 100, len(user))
    return Log(user * 3, (item * 3).astype(np.int32), age, np.ones(len(user), np.float32))


def hold_out_newest(events: Log) -> tuple[Log, dict[int, int]]:
    """Return the log without each user's newest event, and the item of that event, by user.

    Nothing is held out for a user whose newest item occurs in another of the user's events, or in
    no other event that is still in the log.
    """
    is_kept = np.ones(len(events.age), bool)
    held_out = {}
    for user in np.unique(events.user_idx):
        events_of_user = np.flatnonzero(events.user_idx == user)
        newest = events_of_user[np.argmin(events.age[events_of_user])]
        item = events.item_idx[newest]
        is_of_item = events.item_idx == item
        if is_of_item[events_of_user].sum() == 1 and (is_of_item & is_kept).sum() > 1:
            is_kept[newest] = False
            held_out[int(user)] = int(item)
    return events.only(is_kept), held_out


def histories(spark: SparkSession, events: Log, n_partitions: int = 2) -> DataFrame:
    """Return a frame `user_idx, history`, partitioned by user. Histories are in time order."""
    users, column = history_column(events)
    rows = pa.table({"user_idx": pa.array(users, pa.int64()), "history": column})
    user_histories = spark.createDataFrame(
        rows, schema.columns(user_idx=schema.LONG, history=schema.HISTORY)
    )
    return user_histories.repartition(n_partitions, "user_idx")


def tastes(
    n_users: int = 400, n_items: int = 120, n_liked: int = 24, seed: int = 1
) -> tuple[Log, Array]:
    """Return events of users with planted tastes, and the pairs held out, bool (n_users, n_items).

    Users and items have vectors of 4 random numbers. A user's `n_liked` items are drawn one after
    the other, without replacement, with probabilities proportional to exp(1.2 user . item +
    popularity of the item). The first of each four drawn items is held out.
    """
    rng = np.random.default_rng(seed)
    affinity = 1.2 * rng.normal(size=(n_users, 4)) @ rng.normal(size=(4, n_items))
    noise = rng.gumbel(size=affinity.shape)  # the largest sums with Gumbel noise are that draw
    order = np.argsort(-(affinity + rng.normal(size=n_items) + noise), axis=1)[:, :n_liked]
    held_out = np.zeros(affinity.shape, bool)
    np.put_along_axis(held_out, order[:, ::4], True, axis=1)
    is_kept = np.ones(n_liked, bool)
    is_kept[::4] = False
    item = order[:, is_kept].ravel()
    user = np.repeat(np.arange(n_users), is_kept.sum())
    n_events = len(user)
    return Log(
        user, item.astype(np.int32), np.ones(n_events), np.ones(n_events, np.float32)
    ), held_out


def scores(model: RetrieverModel, events: Log) -> Array:
    """Return a model's scores of every item for every user, (n_users, n_items).

    The scorer of the model must return `DotScores`. No item is masked.
    """
    users, column = history_column(events)
    no_seen_items = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    dot_scores = model.scorer().score(QueryBlock(users, parse_histories(column), no_seen_items))
    assert isinstance(dot_scores, topk.DotScores)
    return dot_scores.approximate(slice(0, len(users)))


def ndcg(scored: Array, events: Log, held: Array, k: int = 10) -> float:
    """Return NDCG@k of the held-out items, as the mean over users.

    `scored` is (n_users, n_items), `held` bool of the same shape: the held-out items. Items of the
    user's `events` are masked.
    """
    masked_scores = scored.copy()
    masked_scores[events.user_idx, events.item_idx] = -np.inf
    top_items = np.argsort(-masked_scores, axis=1, kind="stable")[:, :k]
    gains = 1 / np.log2(np.arange(k) + 2)
    ideal = np.cumsum(gains)[np.minimum(held.sum(axis=1), k) - 1]
    return float((np.take_along_axis(held, top_items, axis=1) @ gains / ideal).mean())


def history_column(events: Log) -> tuple[Array, pa.ListArray]:
    """Return the users, ascending, and their histories (`schema.HISTORY`), newest event last.

    All events of a user on one day (UTC) are one session and one order.
    """
    order = np.lexsort((-events.age, events.user_idx))
    users, first_positions = np.unique(events.user_idx[order], return_index=True)
    event_at = micros(CUTOFF) - np.rint(events.age[order] * MICROS_PER_DAY).astype(np.int64)
    day_ids = [f"s{u}-{d}" for u, d in zip(events.user_idx[order], event_at // MICROS_PER_DAY)]
    event_structs = pa.StructArray.from_arrays(
        [
            pa.array(events.item_idx[order], pa.int32()),
            pa.array(event_at, pa.timestamp("us", "UTC")),
            pa.array(["purchase"] * len(order), pa.string()),
            pa.array(events.weight[order], pa.float32()),
            pa.array(np.ones(len(order)), pa.float32()),
            pa.array(day_ids, pa.string()),
            pa.array(day_ids, pa.string()),
        ],
        names=schema.HISTORY_EVENT.names,
    )
    starts = pa.array(np.append(first_positions, len(order)), pa.int32())
    return users, pa.ListArray.from_arrays(starts, event_structs)


def write_training(
    events: Log, folder: str, table: str, n_files: int = 2, length: int = 32
) -> TrainingSet:
    """Write the events before `CUTOFF` as the training table `table`, and return its files.

    The rows are dealt out to `n_files` files. `length` is the largest number of items in a row.
    """
    users, column = history_column(events.only(events.age > 0))
    history = parse_histories(column)
    if table == "training_events":
        row = history.rows
        event_rows = {
            "user_idx": pa.array(users[row], pa.int64()),
            "position": pa.array(np.arange(len(row)) - history.start[row], pa.int32()),
            "item_idx": pa.array(history.item_idx, pa.int32()),
            "event_at": pa.array(history.event_at, pa.int64()),
        }
        return write_files(pa.table(event_rows), folder, table, n_files)
    if table == "training_bags":
        items, weights, lengths = bags(history, micros(CUTOFF), None, length)
        columns = {"weights": pa.array(list(weights), pa.list_(pa.float32()))}
    elif table in ("training_timelines", "training_typed_timelines"):
        row, items, ages, lengths = timelines(history, micros(CUTOFF), length)
        users, columns = users[row], {"ages": pa.array(list(ages), pa.list_(pa.int32()))}
        if table == "training_typed_timelines":
            types = newest_types(history, row, lengths, length)
            columns["types"] = pa.array(list(types), pa.list_(pa.int32()))
    elif table in IMPRESSION_TABLES:
        row, position, items, lengths, *shown = sequences_shown(
            history, shown_with(history), IMPRESSION_TABLES[table], length, 512, 2 * length
        )
        users, columns = users[row], {"position": pa.array(position, pa.int32())}
        for name, values in zip(("shown", "shown_after", "clicked"), shown, strict=True):
            columns[name] = pa.array(list(values), pa.list_(pa.int32()))
    else:
        unit: Unit = "session" if table == "training_sessions" else "history"
        row, position, items, lengths = sequences(history, unit, length, 512)
        users, columns = users[row], {"position": pa.array(position, pa.int32())}
    rows = pa.table(
        {
            "user_idx": pa.array(users, pa.int64()),
            **columns,
            "items": pa.array(list(items), pa.list_(pa.int32())),
            "length": pa.array(lengths, pa.int32()),
        }
    )
    return write_files(rows, folder, table, n_files)


def shown_with(history: Histories, seed: int = 1) -> Histories:
    """Return impressions for the acts of `history`: two per act, shown just before it.

    They are the item of the act, and an item that is drawn with equal probabilities.
    """
    items = np.unique(history.item_idx)
    drawn_items = np.random.default_rng(seed).choice(items, len(history.item_idx))
    return Histories(
        start=2 * history.start,
        item_idx=np.stack([history.item_idx, drawn_items], axis=1).ravel(),
        event_at=np.repeat(history.event_at, 2),
        weight=np.repeat(history.weight, 2),
        session_id=history.session_id.take(np.repeat(np.arange(len(drawn_items)), 2))
        if history.session_id is not None
        else None,
    )


def write_files(rows: pa.Table, folder: str, table: str, n_files: int) -> TrainingSet:
    """Write `rows` as a training set of `n_files` Parquet files into the local folder `folder`."""
    files = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for n in range(n_files):
        rows_of_file = rows.take(pa.array(np.arange(n, rows.num_rows, n_files)))
        pq.write_table(rows_of_file, f"{folder}/{n}.parquet")
        files.append((f"file://{folder}/{n}.parquet", rows_of_file.num_rows))
    return TrainingSet(table, 0, tuple(files))


def items(spark: SparkSession, item_idx: Array) -> DataFrame:
    """Return a catalogue of the distinct items: `item_id` "i<idx>", name, category, price, text."""
    distinct_idx = np.unique(item_idx)
    rows = pa.table(
        {
            "item_idx": pa.array(distinct_idx, pa.int32()),
            "item_id": [f"i{i}" for i in distinct_idx],
            "item_name": [f"item {i}" for i in distinct_idx],
            "category": [[f"c{i % 4}"] for i in distinct_idx],
            "price": pa.array(1.0 + distinct_idx % 7, pa.float64()),
            "text": [f"words of item {i}" for i in distinct_idx],
        }
    )
    return spark.createDataFrame(rows)


def dataset(
    spark: SparkSession,
    events: Log,
    n_partitions: int = 2,
    training: Mapping[str, str] | None = None,
) -> Dataset:
    """Return the data that a model is fitted on: the `events` before `CUTOFF`.

    Later events are left out. `training` maps each training table to the local folder that its
    training set is written to; None = no training sets.
    """
    past_histories = before(histories(spark, events, n_partitions), CUTOFF)
    catalogue = items(spark, events.item_idx[events.age > 0])
    training_sets = {}
    for table, folder in (training or {}).items():
        if table in (training_texts.TABLE, "training_item_bags"):
            settings = Features()  # type: ignore[call-arg]
            training_rows = (
                training_texts.training_texts(catalogue, CUTOFF, settings, 1)
                if table == training_texts.TABLE
                else training_item_bags(past_histories, CUTOFF, settings, 1)
            )
            rows = training_rows.drop("cutoff").toArrow().sort_by("item_idx")
            training_sets[table] = write_files(rows, folder, table, 2)
        else:
            training_sets[table] = write_training(events, folder, table)
    return Dataset(
        cutoff=CUTOFF,
        histories=past_histories,
        items=catalogue,
        user_features=features.user_features(past_histories, CUTOFF).drop("cutoff"),
        item_features=features.item_features(past_histories, catalogue, CUTOFF).drop("cutoff"),
        training=training_sets,
        catalogue=with_media(catalogue),
    )


def with_media(items: DataFrame, media: DataFrame | None = None) -> DataFrame:
    """Return `schema.CONTENT` of a catalogue.

    `media` : `item_idx, media` as from `write_media`; None = the items have no media.
    """
    if media is None:
        no_media = F.lit(None).cast("array<string>")
        return items.withColumn("media", no_media).select(*schema.CONTENT.names)
    return items.join(media, on="item_idx", how="left").select(*schema.CONTENT.names)


def write_media(spark: SparkSession, items: DataFrame, folder: str) -> DataFrame:
    """Write a picture and a sound of each item into a local folder; return `item_idx, media`.

    The picture is a square of one colour on another, the sound a tone. Both are drawn for the item.
    """
    item_idx = items.select("item_idx").toArrow().column("item_idx").to_numpy()
    Path(folder).mkdir(parents=True, exist_ok=True)
    addresses = []
    for item in item_idx.tolist():
        rng = np.random.default_rng(item)
        paths = [f"{folder}/{item}.png", f"{folder}/{item}.wav"]
        Path(paths[0]).write_bytes(picture(*rng.integers(0, 256, (2, 3))))
        Path(paths[1]).write_bytes(tone(rng.uniform(200, 3000)))
        addresses.append(paths)
    rows = pa.table({"item_idx": pa.array(item_idx, pa.int32()), "media": pa.array(addresses)})
    return spark.createDataFrame(rows)


def picture(colour: Array, background: Array, size: int = 48) -> bytes:
    """Return a PNG of a square of one colour, uint8 (3,), in the middle of another."""
    from PIL import Image

    pixels = np.full((size, size, 3), background, np.uint8)
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = colour
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def tone(hertz: float, seconds: float = 0.2, rate: int = 8000) -> bytes:
    """Return a wav file, 16 bits, of a sine wave of half the full scale."""
    times = np.arange(int(seconds * rate)) / rate
    samples = (0.5 * 32767 * np.sin(2 * np.pi * hertz * times)).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def content_vectors(spark: SparkSession, events: Log, size: int = 64) -> DataFrame:
    """Return `item_idx, vector`, as an encoder gives them, of the items with an event before `CUTOFF`.

    The content is planted: an item's vector says who acts on the item. It is the mean of a vector of
    `size` random signs for each of its users, less the mean of all items. Items with the same users
    have similar vectors, and unrelated ones about a right angle.
    """
    past = events.only(events.age > 0)
    pairs = np.unique(np.stack([past.item_idx.astype(np.int64), past.user_idx]), axis=1)
    users, user = np.unique(pairs[1], return_inverse=True)
    signs = np.stack([np.random.default_rng(u).choice([-1.0, 1.0], size) for u in users])
    item_idx, item = np.unique(pairs[0], return_inverse=True)
    sums = np.zeros((len(item_idx), size))
    np.add.at(sums, item, signs[user])
    means = sums / np.bincount(item)[:, None]
    vectors = (means - means.mean(axis=0)).astype(np.float32)
    rows = pa.table(
        {
            "item_idx": pa.array(item_idx, pa.int32()),
            "vector": pa.array(list(vectors), pa.list_(pa.float32())),
        }
    )
    return spark.createDataFrame(rows, schema.VECTORS)


def ask(data: Dataset, mode: str = "novel") -> DataFrame:
    """Return the queries of all users of `data`."""
    return queries(data.histories, mode)


def _fields(events: Log) -> tuple[Array, Array, Array, Array]:
    return events.user_idx, events.item_idx, events.age, events.weight
