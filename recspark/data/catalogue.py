"""Raw catalogue rows to clean rows, quarantine and duplicates: the verdicts that events get."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.events import (
    CLEAN,
    NO_ITEM,
    NO_TIME,
    TWICE,
    check_schema,
    is_blank,
    is_finite,
    known_rows,
    row_id,
    with_verdict,
)

NO_YEAR = "time beyond the year 9999"
NOT_FINITE = "price not finite"
NEGATIVE = "price negative"
BAD_ENCODING = "bad encoding: {}"
KEY = ("item_id", "valid_from")
DESCRIBED = ("item_name", "category", "price", "text", "media")


def check_items(raw: DataFrame, refused: DataFrame | None = None) -> DataFrame:
    """Return `raw` with `event_date` (of `valid_from`), `row_id` and `verdict`.

    Parameters
    ----------
    raw : `schema.RAW_ITEMS`
    refused : row_id of the catalogue rows that other nights refused; None = there are none

    A row has one verdict: what is wrong with its price alone refuses its name too, as with events;
    what the item was before stays valid. A refused row keeps the source's `reason`, else gets the
    first of: no item, no time, time beyond the year 9999 (no other reader could show it), bad
    encoding (U+FFFD in a text), price not finite, price negative. Of equal (item_id, valid_from) the
    greatest row stays, the others are duplicates; so is a row that another night refused for the
    same reason, where it says the same of the item (`row_id`: whatever its time). A time to come is
    fine: the row holds from then on. Raises SchemaError. Cost: lazy; one shuffle of the catalogue,
    and one of the ids in `refused`.
    """
    check_schema(raw, schema.RAW_ITEMS, "RAW_ITEMS")
    reason = F.coalesce("reason", _reason())
    is_fine = F.col("reason").isNull()
    at = F.unix_micros("valid_from").cast("string")
    rows = (
        raw.withColumn("reason", reason)
        .withColumn("row", F.when(~is_fine, F.col("row")))
        .withColumn("row_id", F.when(~is_fine, row_id("item_id", DESCRIBED)))
        .withColumn("event_date", F.to_date("valid_from"))
        .withColumn("_key", F.coalesce("row_id", F.concat_ws("\x1f", "item_id", at)))
    )
    rows = known_rows(rows, None, refused)
    greatest_first = [F.desc_nulls_last(name) for name in DESCRIBED]
    same = Window.partitionBy("_key").orderBy(~is_fine, *greatest_first)
    rows = rows.withColumn("_n", F.row_number().over(same))
    return with_verdict(rows, [(is_fine & (F.col("_n") > 1), TWICE)]).select(
        *schema.RAW_ITEMS.names, "event_date", "row_id", "verdict"
    )


def clean_items(checked: DataFrame) -> DataFrame:
    """Return the clean rows of `check_items`: `item_id`, what describes it, `valid_from`."""
    return checked.where(F.col("verdict") == CLEAN).select(*KEY, *DESCRIBED)


def _reason() -> Column:
    broken = [(F.col(name).contains("\ufffd"), name) for name in ("item_id", "item_name", "text")]
    broken += [
        (F.exists(name, lambda part: part.contains("\ufffd")), name)
        for name in ("category", "media")
    ]
    checks = [
        (is_blank("item_id"), NO_ITEM),
        (F.col("valid_from").isNull(), NO_TIME),
        (F.year("valid_from") > 9999, NO_YEAR),
        *[(condition, BAD_ENCODING.format(name)) for condition, name in broken],
        (~is_finite("price"), NOT_FINITE),
        (F.col("price") < 0, NEGATIVE),
    ]
    return F.coalesce(*[F.when(condition, F.lit(why)) for condition, why in checks])
