"""The content of items (name, category, price, text, media), which encoders read."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.features import items_as_of
from recspark.data.media import MISSING, UNREADABLE

# Problems that may pass: an item without a vector for one of these reasons is tried again each
# night. What an item's description itself causes stays until the description changes.
TRIED_AGAIN = (MISSING, UNREADABLE)


def content_as_of(items: DataFrame, cutoff: datetime) -> DataFrame:
    """Return a row per item described before `cutoff`: `schema.CONTENT_AND_ID` and `content`, a
    digest of the description (all columns but `item_idx` and `item_id`).

    Items that nobody acted on have a row too. `items` is the table of that name. One shuffle by
    item, no action.
    """
    described_items = items_as_of(items, cutoff).select(*schema.CONTENT_AND_ID.names)
    as_json = F.to_json(F.struct(*[name for name in schema.CONTENT.names if name != "item_idx"]))
    return described_items.withColumn("content", F.substring(F.sha2(as_json, 256), 1, 16))
