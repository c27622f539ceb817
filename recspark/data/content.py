"""What is known of items but for who acted on them: what encoders read."""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.features import items_as_of


def content_as_of(items: DataFrame, cutoff: datetime) -> DataFrame:
    """Return `schema.CONTENT` and `content`, a digest of it: a row for each item described before
    `cutoff`, whether somebody acted on it or not.

    `items` : the table. One shuffle by item, no action.
    """
    described = items_as_of(items, cutoff).select(*schema.CONTENT.names)
    said = F.to_json(F.struct(*[name for name in schema.CONTENT.names if name != "item_idx"]))
    return described.withColumn("content", F.substring(F.sha2(said, 256), 1, 16))
