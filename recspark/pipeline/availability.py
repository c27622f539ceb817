"""Which items may be listed tonight: those with an event, or a description, before the cutoff that
are available.
"""

from __future__ import annotations

from datetime import datetime

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
    """Return `item_idx` of the items with an event that may be listed tonight.

    `unavailable` : as `unavailable_items` returns them.
    """
    return _without(context, _items_with_events(context, context.cutoffs.tonight), unavailable)


def cold_items(context: RunContext, cutoff: datetime, unavailable: DataFrame | None) -> DataFrame:
    """Return `item_idx` of the items that were described before `cutoff`, but that nobody acted on.

    A model that knows their content may list them. `unavailable` : items to leave out, as
    `unavailable_items` returns them; None = none. Lazy: a shuffle by item of the table `items`.
    `item_features` must have the cutoff.
    """
    described = features.items_as_of(context.read("items"), cutoff).select("item_idx")
    cold = described.join(_items_with_events(context, cutoff), on="item_idx", how="left_anti")
    return _without(context, cold, unavailable)


def _items_with_events(context: RunContext, cutoff: datetime) -> DataFrame:
    is_of_cutoff = F.col("cutoff") == F.lit(cutoff)
    return context.read("item_features").where(is_of_cutoff).select("item_idx")


def _without(context: RunContext, items: DataFrame, left_out: DataFrame | None) -> DataFrame:
    if left_out is None:
        return items
    return items.join(context.item_sized(left_out), on="item_idx", how="left_anti")


def allowed_of(items: Array, unavailable: DataFrame | None) -> Array | None:
    """Return those of `items`, int32 (n_items,), that are available; None where all are.

    `unavailable` : as `unavailable_items` returns them. One job; the driver holds their item_idx.
    """
    if unavailable is None:
        return None
    left_out = unavailable.toArrow().column("item_idx").to_numpy()
    return np.asarray(items[~np.isin(items, left_out)])
