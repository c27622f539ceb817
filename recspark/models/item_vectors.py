"""The vectors of items by the models that another model is built on, as arrays on the driver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyspark.sql import DataFrame

from recspark.data.blocks import Array, local_index
from recspark.data.dataset import Dataset
from recspark.errors import ModelError
from recspark.models.base import FittedModel, RetrieverModel
from recspark.models.vectors.scoring import unit_rows


@dataclass(frozen=True)
class UnitVectors:
    """The items that one model has a vector for.

    `item_idx` int32 (n,), ascending; `vectors` float32 (n, size), rows of length 1, or of length 0
    where the model gives zeros.
    """

    item_idx: Array
    vectors: Array

    def rows_of(self, items: Array) -> Array:
        """Return the vectors of `items` (m,), float32 (m, size); zeros for an item without one."""
        rows = np.zeros((len(items), self.vectors.shape[1]), np.float32)
        if len(self.item_idx):
            local = local_index(self.item_idx, items)
            rows[local >= 0] = self.vectors[local[local >= 0]]
        return rows


def stored_vectors(rows: DataFrame, encoder: str) -> tuple[Array, Array]:
    """Return item_idx int32 (n,), ascending, and the vectors, float32 (n, size), as they are stored.

    `rows` : `item_idx, vector`, a row per item. One job. The driver holds the vectors of all items.
    Without a row, size is 1. Raises ModelError where vectors have unequal lengths.
    """
    table = rows.toArrow().combine_chunks().sort_by("item_idx")
    item_idx = table.column("item_idx").to_numpy().astype(np.int32)
    if len(item_idx) == 0:
        return item_idx, np.zeros((0, 1), np.float32)
    column = table.column("vector").combine_chunks()
    sizes = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
    if len(sizes) > 1:
        raise ModelError(
            f"encoder '{encoder}' gives vectors of the lengths {sizes.tolist()}; encode again: run "
            "the night with --force"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    return item_idx, np.asarray(values, np.float32).reshape(len(item_idx), -1)


def encoded_items(data: Dataset, encoder: str) -> UnitVectors:
    """Return the items that `encoder` has a vector for, with the vectors scaled to length 1.

    Cost and errors: see `stored_vectors`.
    """
    item_idx, vectors = stored_vectors(data.vectors[encoder], encoder)
    return UnitVectors(item_idx, unit_rows(vectors))


def needed_vectors(asking: str, data: Dataset, name: str, model: FittedModel) -> UnitVectors:
    """Return the vectors, of length 1, of a model of `needs`: an encoder, or a retriever.

    `asking` : the name of the model that is built on it, for the message. Cost: for an encoder that
    of `stored_vectors`. Raises ModelError where a retriever has no vectors of items.
    """
    if name in data.vectors:
        return encoded_items(data, name)
    vectors = model.item_vectors() if isinstance(model, RetrieverModel) else None
    if vectors is None:
        raise ModelError(
            f"{asking}: the needed model '{name}' has no item vectors; name an encoder, or a "
            "retriever with item vectors, such as als or item2vec"
        )
    assert isinstance(model, RetrieverModel)
    return UnitVectors(np.asarray(model.items, np.int32), unit_rows(vectors))
