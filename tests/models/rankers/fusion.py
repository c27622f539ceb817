"""Planted pairs for the tests of the rankers that read ranks and scores only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from recspark import schema
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, Examples
from recspark.data.examples import source_features
from recspark.data.feature_encoding import FIRST, MISSING, Encoding
from recspark.models.base import FitOptions, Needed, PairBlock, RankerModel
from recspark.models.items.popular import PopularModel, PopularSettings
from recspark.models.registry import MODELS

CUTOFF = datetime(2020, 6, 1, tzinfo=UTC)
ACTIVITY = ("heavy", "light", "regular")
# What a ranker may read besides its sources.
OTHERS = ("user_n_orders", "item_age_days")
Columns = dict[str, Any]


def retriever() -> PopularModel:
    """A retriever: rankers on ranks and scores only look at its name."""
    return PopularModel(PopularSettings(), CUTOFF, np.arange(3, dtype=np.int32), np.ones(3))


def needs(*names: str) -> Needed:
    return {name: retriever() for name in names}


def encoding_of_examples(sources: tuple[str, ...]) -> Encoding:
    numbers = [feature for name in sources for feature in source_features(name)]
    return Encoding((*numbers, *OTHERS), {"user_activity": ACTIVITY})


def columns(n_users: int, order: Mapping[str, Array], label: Array, **more: Any) -> Columns:
    """Return the pairs of `n_users` users with as many items each as an order has columns.

    order : source -> the item's rank by the source from 1, float (n_users, n_items); NaN = not
        listed. A score falls with the rank.
    """
    n_items = label.shape[1]
    found: Columns = {
        "mode": np.full(label.size, "novel"),
        "user_idx": np.repeat(np.arange(n_users), n_items),
        "item_idx": np.tile(np.arange(n_items, dtype=np.int32), n_users),
        "label": label.ravel().astype(np.float32),
        "user_activity": np.full(label.size, "light"),
        "user_n_orders": np.full(label.size, 5.0),
        "item_age_days": np.full(label.size, 100.0),
    }
    for name, rank in order.items():
        found[f"{name}_rank"] = rank.ravel()
        found[f"{name}_score"] = 1 / (1 + rank.ravel())
        found[f"{name}_relative"] = 6 / (1 + rank.ravel())
    return {**found, **more}


def activities(n_users: int = 60, n_items: int = 12, seed: int = 3) -> Columns:
    """Source `a` is right for heavy users (the odd ones), and source `b` for light ones: a user acts
    on the first three items of the source that is right, and the other one has a random order.
    """
    rng = np.random.default_rng(seed)
    ranks = {name: 1 + np.argsort(rng.random((n_users, n_items)), axis=1) for name in "ab"}
    is_heavy = np.arange(n_users)[:, None] % 2 == 1
    label = np.where(is_heavy, ranks["a"], ranks["b"]) <= 3
    activity = np.repeat(np.where(is_heavy, "heavy", "light").ravel(), n_items)
    ranks_as_float = {name: rank.astype(np.float64) for name, rank in ranks.items()}
    return columns(n_users, ranks_as_float, label, user_activity=activity)


def data_of(spark: SparkSession, pairs: Columns, sources: tuple[str, ...]) -> Dataset:
    """Return a data set with these pairs as its examples, all of one cutoff."""
    encoding = encoding_of_examples(sources)
    numbers = np.stack([pairs[name] for name in encoding.numbers], axis=1).astype(np.float32)
    fields = np.array([[codes(ACTIVITY, text)] for text in pairs["user_activity"]], np.int32)
    rows = pa.table(
        {
            "cutoff": pa.array([CUTOFF] * len(numbers), pa.timestamp("us", "UTC")),
            **{name: pa.array(pairs[name]) for name in ("mode", "user_idx", "item_idx", "label")},
            "numbers": pa.array([*numbers], pa.list_(pa.float32())),
            "fields": pa.array([*fields], pa.list_(pa.int32())),
        }
    )
    frame = spark.createDataFrame(rows)
    nothing = spark.createDataFrame([], schema.SCORED)
    data = Dataset(CUTOFF, nothing, nothing, nothing, nothing)
    return replace(data, examples=Examples(frame, encoding))


def codes(vocabulary: tuple[str, ...], text: str) -> int:
    return FIRST + vocabulary.index(text) if text else MISSING


def fitted(name: str, data: Dataset, sources: tuple[str, ...], **settings: Any) -> RankerModel:
    algorithm = MODELS[name].load().from_dict(settings)
    algorithm.check_needs(dict.fromkeys(sources, "retriever"))
    model = algorithm.fit(data, FitOptions(), needs(*sources))
    assert isinstance(model, RankerModel)
    return model


def scores(model: RankerModel, pairs: Columns) -> Array:
    """Return the score of each pair, encoded as the model asks for it."""
    n_pairs = len(pairs["user_idx"])
    numbers = np.empty((n_pairs, len(model.encoding.numbers)), np.float32)
    for n, name in enumerate(model.encoding.numbers):
        numbers[:, n] = pairs[name]
    fields = np.empty((n_pairs, len(model.encoding.fields)), np.int32)
    for n, (name, vocabulary) in enumerate(model.encoding.fields.items()):
        fields[:, n] = [codes(vocabulary, text) for text in pairs[name]]
    return model.pair_scorer().score(
        PairBlock(pairs["user_idx"], pairs["item_idx"], numbers, fields)
    )


def ndcg(score: Array, pairs: Columns, k: int = 3) -> float:
    """Return NDCG@k, the mean over users who all have as many items and k relevant ones."""
    n_users = len(np.unique(pairs["user_idx"]))
    best = np.argsort(-score.reshape(n_users, -1), axis=1, kind="stable")[:, :k]
    relevant = np.take_along_axis(pairs["label"].reshape(n_users, -1), best, axis=1)
    gains = 1 / np.log2(np.arange(k) + 2)
    return float((relevant @ gains / gains.sum()).mean())
