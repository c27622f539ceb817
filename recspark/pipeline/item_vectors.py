"""The vectors of items that a night's models have, whatever kind of model it is."""

from __future__ import annotations

from datetime import datetime

import numpy as np

from recspark.data.blocks import Array
from recspark.errors import ConfigError
from recspark.models.base import RetrieverModel
from recspark.models.item_vectors import stored_vectors
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import item_vectors, load_model, why_not_fitted
from recspark.pipeline.plan import kind_of_model


def vectors_of(context: RunContext, model: str, cutoff: datetime) -> tuple[Array, Array]:
    """Return item_idx int32 (m,) and vectors float32 (m, size) of a model as of `cutoff`.

    There are none (m = 0) where there was too little data to fit the model. Raises ConfigError
    where the model has no vectors of items.
    """
    if why_not_fitted(context, model, cutoff):
        return np.zeros(0, np.int32), np.zeros((0, 1), np.float32)
    if kind_of_model(context.config, model) == "encoder":
        return stored_vectors(item_vectors(context, model, cutoff), model)
    fitted = load_model(context, model, cutoff)
    vectors = fitted.item_vectors() if isinstance(fitted, RetrieverModel) else None
    if not isinstance(fitted, RetrieverModel) or vectors is None:
        raise ConfigError(
            f"'{model}' has no vectors of items, which a rule or examples.vectors asks for: name an "
            "encoder, or a model such as als, mf or item2vec"
        )
    return fitted.items, np.asarray(vectors, np.float32)
