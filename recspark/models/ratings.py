"""Predicted ratings: what a fitted model predicts for given pairs of user and item."""

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


def predicted(model: FittedModel, queries: DataFrame) -> DataFrame:
    """Return the rating that `model` predicts for each item of the column `asked`.

    The result is `schema.PREDICTED` (`user_idx, item_idx, rating, predicted`), a row per item asked
    about. `predicted` is null where the model does not know the item or the user. Lazy and narrow.

    Parameters
    ----------
    model : a retriever that `rates`, else ModelError is raised
    queries : `schema.QUERIES`, and `asked array<struct<item_idx int, rating float>>`: the items of
        each user whose rating is to be predicted. `rating` is copied to the result. If the model
        reads user features, also the column `features` (see `FittedModel.user_encoding`)
    """
    if not (isinstance(model, RetrieverModel) and model.rates):
        raise ModelError(
            f"{type(model).__name__} predicts no ratings with these settings: its scores only rank"
        )
    shared = queries.sparkSession.sparkContext.broadcast((model.items, model.scorer()))

    def predict(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, scorer = shared.value
        for batch in batches:
            block = parse_queries(batch)
            items_of_query = batch.column("asked")
            items_per_query = items_of_query.value_lengths().fill_null(0).to_numpy()
            row, pairs = np.repeat(np.arange(len(block)), items_per_query), items_of_query.flatten()
            item_idx = pairs.field("item_idx").to_numpy()
            ratings, is_known = topk.pair_scores(block, vocabulary, scorer, row, item_idx)
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(block.user_idx[row], pa.int64()),
                    pa.array(item_idx, pa.int32()),
                    pairs.field("rating"),
                    pa.array(ratings, pa.float32(), mask=~is_known),
                ],
                names=schema.PREDICTED.names,
            )

    features = [] if model.user_encoding is None else ["features"]
    model_inputs = queries.select(*schema.QUERIES.names, *features, "asked")
    return model_inputs.mapInArrow(predict, schema.PREDICTED)
