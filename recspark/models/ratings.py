"""What a fitted model that predicts ratings says of given items, instead of its list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from recspark import schema
from recspark.data.blocks import parse_queries
from recspark.errors import ModelError
from recspark.models.base import FittedModel, RetrieverModel
from recspark.models.scoring import topk


def predicted(model: FittedModel, asked: DataFrame) -> DataFrame:
    """Return `user_idx, item_idx, rating, predicted`: `schema.PREDICTED`, a row per asked item.

    Parameters
    ----------
    model : a retriever that `rates`; ModelError otherwise
    asked : `schema.QUERIES`, and `asked array<struct<item_idx int, rating float>>`: the items of each
        user whose rating is to be predicted; `rating` is handed through

    `predicted` is null where the model does not know the item or the user. Lazy and narrow.
    """
    if not (isinstance(model, RetrieverModel) and model.rates):
        raise ModelError(
            f"{type(model).__name__} predicts no ratings with these settings: its scores only rank"
        )
    shared = asked.sparkSession.sparkContext.broadcast((model.items, model.scorer()))

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scorer = shared.value
        for batch in batches:
            block = parse_queries(batch)
            wanted = batch.column("asked")
            counts = wanted.value_lengths().fill_null(0).to_numpy()
            row, pairs = np.repeat(np.arange(len(block)), counts), wanted.flatten()
            item = pairs.field("item_idx").to_numpy()
            found, known = topk.pair_scores(block, vocabulary, scorer, row, item)
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(block.user_idx[row], pa.int64()),
                    pa.array(item, pa.int32()),
                    pairs.field("rating"),
                    pa.array(found, pa.float32(), mask=~known),
                ],
                names=schema.PREDICTED.names,
            )

    features = [] if model.user_encoding is None else ["features"]
    read = asked.select(*schema.QUERIES.names, *features, "asked")
    return read.mapInArrow(run, schema.PREDICTED)
