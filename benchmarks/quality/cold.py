"""What the benchmarks of items without events share: data for models, and scores of cold items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from recspark import schema
from recspark.data.blocks import Array, QueryBlock, Ragged, local_index, parse_histories
from recspark.data.dataset import Dataset
from recspark.models import registry
from recspark.models.base import FitOptions, FittedModel, Needed, RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.testing import synth
from recspark.testing.case import PlantedEncoder


def dataset(
    spark: SparkSession, log: synth.Log, catalogue: pa.Table, vectors: Mapping[str, Array]
) -> Dataset:
    """Return `log` as data with a catalogue of all items, cold ones too, and their vectors.

    `catalogue` : `schema.CONTENT`. `vectors` : encoder -> float (n_items, size), in its order.
    """
    data = synth.dataset(spark, log)
    item_idx = catalogue.column("item_idx").to_numpy()
    frames = {}
    for name, values in vectors.items():
        lists = pa.array(list(np.asarray(values, np.float32)), pa.list_(pa.float32()))
        rows = pa.table({"item_idx": pa.array(item_idx, pa.int32()), "vector": lists})
        frames[name] = spark.createDataFrame(rows, schema.VECTORS)
    return replace(
        data,
        histories=data.histories.persist(),
        catalogue=spark.createDataFrame(catalogue, schema.CONTENT),
        vectors=frames,
    )


def fit(
    model: str,
    settings: dict[str, Any],
    data: Dataset,
    encoders: Iterable[str],
    others: Mapping[str, FittedModel] | None = None,
    seed: int = 1,
) -> RetrieverModel:
    """Return a model that is built on `encoders` of `data` and on `others`."""
    needed: Needed = {
        **(others or {}),
        **{name: PlantedEncoder(Settings(), data.cutoff) for name in encoders},
    }
    options = FitOptions(progress=lambda text: print(f"  {text}", flush=True))
    train = options.train.model_copy(update={"seed": seed})
    fitted = registry.make(model, settings).fit(data, replace(options, train=train), needed)
    assert isinstance(fitted, RetrieverModel)
    return fitted


def scores(model: RetrieverModel, log: synth.Log, items: Array) -> Array:
    """Return the scores of `items` for every user of `log`, ascending; (n_users, n_items).

    An item that the model lists for no such user has the lowest float.
    """
    users, column = synth.history_column(log)
    nothing_seen = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    block = QueryBlock(users, parse_histories(column), nothing_seen)
    rows, position = np.divmod(np.arange(len(users) * len(items)), len(items))
    assert (local_index(model.items, items) >= 0).any()
    score, has_score = topk.pair_scores(
        block, model.items, model.scorer(), rows, items[position].astype(np.int32)
    )
    lowest = np.finfo(np.float64).min
    return np.where(has_score, score, lowest).reshape(len(users), len(items))
