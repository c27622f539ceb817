"""Which items may be listed tonight: those with an event before the cutoff that are available."""

from __future__ import annotations

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.data import features
from recspark.data.blocks import Array
from recspark.pipeline.context import RunContext


def unavailable_items(context: RunContext) -> DataFrame | None:
    """Return `item_idx` of the items that may not be listed as of tonight's cutoff.

    None where no source ever said that an item is not available; then lists cost no more than
    before. One small job, which looks for a row that says so.
    """
    items = context.read("items")
    if not features.says_availability(items):
        return None
    catalogue = features.items_as_of(items, context.cutoffs.tonight)
    return catalogue.where(~F.col("available")).select("item_idx")


def listable_items(context: RunContext, unavailable: DataFrame | None) -> DataFrame:
    """Return `item_idx` of the items that may be listed tonight.

    `unavailable` : as `unavailable_items` returns them.
    """
    listable = (
        context.read("item_features")
        .where(F.col("cutoff") == F.lit(context.cutoffs.tonight))
        .select("item_idx")
    )
    if unavailable is None:
        return listable
    return listable.join(context.item_sized(unavailable), on="item_idx", how="left_anti")


def allowed_of(items: Array, unavailable: DataFrame | None) -> Array | None:
    """Return those of `items`, int32 (n_items,), that are available; None where all are.

    `unavailable` : as `unavailable_items` returns them. One job; the driver holds their item_idx.
    """
    if unavailable is None:
        return None
    left_out = unavailable.toArrow().column("item_idx").to_numpy()
    return np.asarray(items[~np.isin(items, left_out)])
