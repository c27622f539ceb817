"""The vectors of items that a night's models have, whatever kind of model it is."""

from __future__ import annotations

from datetime import datetime

import numpy as np

from recspark.data.blocks import Array
from recspark.errors import ConfigError
from recspark.models.base import RetrieverModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import item_vectors, load_model, why_not_fitted
from recspark.pipeline.plan import kind_of_model

# Names of the array of item vectors among the arrays of a model.
_VECTOR_ARRAYS = ("vectors", "factors")


def vectors_of(context: RunContext, model: str, cutoff: datetime) -> tuple[Array, Array]:
    """Return item_idx int32 (m,) and vectors float32 (m, size) of a model as of `cutoff`.

    There are none (m = 0) where there was too little data to fit the model. Raises ConfigError
    where the model has no vectors of items.
    """
    no_vectors = np.zeros(0, np.int32), np.zeros((0, 1), np.float32)
    if why_not_fitted(context, model, cutoff):
        return no_vectors
    if kind_of_model(context.config, model) == "encoder":
        rows = item_vectors(context, model, cutoff).toArrow().combine_chunks()
        if rows.num_rows == 0:
            return no_vectors
        values = rows.column("vector").combine_chunks().flatten().to_numpy()
        return rows.column("item_idx").to_numpy(), values.reshape(rows.num_rows, -1)
    fitted = load_model(context, model, cutoff)
    if isinstance(fitted, RetrieverModel):
        arrays = fitted.arrays()
        for name in _VECTOR_ARRAYS:
            if name in arrays and arrays[name].shape[:1] == fitted.items.shape:
                return fitted.items, np.asarray(arrays[name], np.float32)
    raise ConfigError(
        f"'{model}' has no vectors of items, which a rule or examples.vectors asks for: name an encoder, "
        "or a model such as als, mf or item2vec"
    )
