"""Checks of raw catalogue rows: each row is clean, quarantined or a duplicate, as with events."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.event_checks import (
    CLEAN,
    NO_ITEM,
    NO_TIME,
    TWICE,
    check_schema,
    is_blank,
    is_finite,
    join_earlier_verdicts,
    row_id,
    with_verdict,
)

NO_YEAR = "time beyond the year 9999"
NOT_FINITE = "price not finite"
NEGATIVE = "price negative"
BAD_ENCODING = "bad encoding: {}"
KEY = ("item_id", "valid_from")
AVAILABILITY = tuple(schema.AVAILABILITY)
DESCRIBED = ("item_name", "category", "price", "text", "media")  # the columns that describe an item


def check_items(raw: DataFrame, refused: DataFrame | None = None) -> DataFrame:
    """Return `raw` with `event_date` (of `valid_from`), `row_id` and `verdict`.

    Parameters
    ----------
    raw : `schema.RAW_ITEMS`
    refused : row_id of the catalogue rows that other nights refused; None = there are none

    A row has one verdict, as with events: a row whose price alone is wrong is refused with its
    name. The item's earlier description then stays valid.

    A refused row keeps the `reason` that the source gave. Otherwise the row gets the first reason
    that holds of: no item, no time, time beyond the year 9999 (no reader but Spark could show it),
    bad encoding (U+FFFD in a text), price not finite, price negative. A `valid_from` in the future
    is no fault: the row is valid from then on.

    Of several rows with the same (item_id, valid_from) the greatest stays and the others are
    duplicates. A row is also a duplicate where another night refused a row with the same `row_id`:
    the same description of the same item, for the same reason, whatever the time.

    Raises SchemaError where `raw` lacks a column or has one of another type. Cost: lazy; one
    shuffle of the catalogue, and one of the ids in `refused`.
    """
    check_schema(raw, schema.RAW_ITEMS, "RAW_ITEMS")
    reason = F.coalesce("reason", _reason())
    is_fine = F.col("reason").isNull()
    valid_from_micros = F.unix_micros("valid_from").cast("string")
    # Repeats are found by `_key`: the `row_id` of a refused row, else the item and its time.
    rows = (
        raw.withColumn("reason", reason)
        .withColumn("row", F.when(~is_fine, F.col("row")))
        .withColumn("row_id", F.when(~is_fine, row_id("item_id", DESCRIBED)))
        .withColumn("event_date", F.to_date("valid_from"))
        .withColumn("_key", F.coalesce("row_id", F.concat_ws("\x1f", "item_id", valid_from_micros)))
    )
    rows = join_earlier_verdicts(rows, None, refused)
    greatest_first = [F.desc_nulls_last(name) for name in (*DESCRIBED, *AVAILABILITY)]
    rows_of_key = Window.partitionBy("_key").orderBy(~is_fine, *greatest_first)
    rows = rows.withColumn("_n", F.row_number().over(rows_of_key))
    return with_verdict(rows, [(is_fine & (F.col("_n") > 1), TWICE)]).select(
        *schema.RAW_ITEMS.names, "event_date", "row_id", "verdict"
    )


def clean_items(checked: DataFrame) -> DataFrame:
    """Return the clean rows of `check_items`, with the columns `KEY`, `DESCRIBED` and
    `AVAILABILITY`.
    """
    return checked.where(F.col("verdict") == CLEAN).select(*KEY, *DESCRIBED, *AVAILABILITY)


def _reason() -> Column:
    # The first reason to refuse the row; null where there is none. U+FFFD stands where a decoder
    # found bytes that are no text.
    badly_encoded = [
        (F.col(name).contains("\ufffd"), name) for name in ("item_id", "item_name", "text")
    ]
    badly_encoded += [
        (F.exists(name, lambda text: text.contains("\ufffd")), name)
        for name in ("category", "media")
    ]
    checks = [
        (is_blank("item_id"), NO_ITEM),
        (F.col("valid_from").isNull(), NO_TIME),
        (F.year("valid_from") > 9999, NO_YEAR),
        *[(condition, BAD_ENCODING.format(name)) for condition, name in badly_encoded],
        (~is_finite("price"), NOT_FINITE),
        (F.col("price") < 0, NEGATIVE),
    ]
    return F.coalesce(*[F.when(condition, F.lit(reason)) for condition, reason in checks])
