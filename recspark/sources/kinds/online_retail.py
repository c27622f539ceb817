"""Source kind `online_retail`: UCI Online Retail II, the invoice lines of a shop. They include
cancellations, corrections and test codes.

A row is refused with the first of these reasons that applies: unreadable row, bad encoding of a
column, wrong type of a column, cancelled invoice, not a product, quantity not positive, price not
positive. The reasons that hold for every source (no user, no time, …) come after these
(`recspark.data.event_checks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Source
from recspark.data.event_checks import QUANTITY
from recspark.sources.files import SourceInput, find_input
from recspark.sources.landing import Night
from recspark.sources.raw import UNREADABLE, RawTable, read_raw
from recspark.sources.spelling import spelling_of
from recspark.sources.typed import (
    Typed,
    as_raw_events,
    attributes_of,
    bounds_of,
    first_reason,
    id_of,
    number_of,
    raw_text,
    readability,
    shaped,
    text_of,
    time_of,
)

CANCELLED = "cancelled invoice"
NOT_A_PRODUCT = "not a product"
PRICE = "price not positive"
COLUMNS = (
    "Invoice", "StockCode", "Description", "Quantity", "InvoiceDate", "Price", "Customer ID", "Country",
)  # fmt: skip

CATALOGUE_IS_OF_EVENTS = True


def inputs(source: Source, run_date: date) -> list[SourceInput]:
    """Return the one input of `run_date`. Raises MissingLandingError."""
    return [find_input(source, source.path, run_date)]


def read(
    spark: SparkSession, source: Source, inputs: list[SourceInput], night: Night
) -> tuple[DataFrame | None, DataFrame | None]:
    """Return the events and the catalogue of `night`; None for both where no file holds a row.

    An event is one line of an invoice. Its type is `purchase`, and its value is quantity × price.
    The catalogue has one row per item and day on which the item was sold with a description. The
    row has the description and price of the day's last such line, and is valid from the time of
    that line. The lines get their verdict as events. Cost: one shuffle for the events (to number
    identical lines), one for the items.
    """
    table = read_raw(
        spark,
        inputs[0],
        source.format,
        COLUMNS,
        options=source.options,
        spelling=replace(spelling_of(source, {}), whole_numbers=frozenset({"Customer ID"})),
    )
    if table is None:
        return None, None
    columns, checks = _columns(source, table)
    rows = night.rows(table.frame, columns["event_at"])
    events = as_raw_events(table, rows, columns, checks, _content(source, table))
    return events, _items(table, rows, columns, checks)


def _columns(source: Source, table: RawTable) -> tuple[dict[str, Column], list[tuple[Column, str]]]:
    """Return the event columns by name, and (condition, reason) for refused rows. The first
    condition that holds gives the reason.
    """
    timezone = source.timezone
    customer = id_of(table, "Customer ID")
    typed = {
        "quantity": number_of(table, "Quantity"),
        "event_at": time_of(table, "InvoiceDate", timezone),
        "price": number_of(table, "Price"),
        "user_id": Typed(
            "Customer ID", F.when(customer.rlike(r"^\d+$"), customer), customer.isNotNull()
        ),
    }
    columns = {name: column.value for name, column in typed.items()} | {
        "order_id": id_of(table, "Invoice"),
        "item_id": id_of(table, "StockCode"),
        "event_type": F.lit("purchase"),
        "value": typed["quantity"].value * typed["price"].value,
        "attributes": attributes_of({"country": text_of(table, "Country")}),
    }
    checks = [
        *readability(table, typed, ("Invoice", "StockCode", "Description", "Country")),
        (F.upper("order_id").startswith("C"), CANCELLED),
        (~F.col("item_id").rlike("^[0-9]{5}"), NOT_A_PRODUCT),
        (~(F.coalesce("quantity", F.lit(0.0)) > 0), QUANTITY),
        (~(F.coalesce("price", F.lit(0.0)) > 0), PRICE),
        *bounds_of("value", size=source.max_value),
    ]
    return columns, checks


def _content(source: Source, table: RawTable) -> list[Column]:
    """Return the texts that identify an invoice line, from which its `event_id` is made.

    A value gives the same text whatever type and file format it is delivered in: the text of the
    type in which the data set was published. A value that cannot be read gives its raw text.
    """
    raw_texts = {name: raw_text(table, name) for name in COLUMNS}
    sold_at, quantity = F.col("event_at"), F.col("quantity")
    if source.timezone != "UTC":
        sold_at = F.from_utc_timestamp(sold_at, source.timezone)
    typed_values = {
        "Quantity": F.when(quantity == F.rint(quantity), quantity.try_cast("bigint")),
        "InvoiceDate": sold_at,
        "Price": F.col("price"),
        "Customer ID": number_of(table, "Customer ID").value,
    }
    typed_texts = {
        name: F.coalesce(value.cast("string"), raw_texts[name])
        for name, value in typed_values.items()
    }
    return [*(raw_texts | typed_texts).values(), F.col(UNREADABLE)]


def _items(
    table: RawTable,
    rows: DataFrame,
    columns: Mapping[str, Column],
    checks: Sequence[tuple[Column, str]],
) -> DataFrame:
    needed_columns = ("item_id", "event_at", "user_id", "order_id", "quantity", "price", "value")
    lines = rows.withColumns({name: columns[name] for name in needed_columns})
    lines = lines.withColumn("name", text_of(table, "Description"))
    has_ids = F.col("user_id").isNotNull() & F.col("item_id").isNotNull()
    is_sale = first_reason(checks).isNull() & has_ids & F.col("event_at").isNotNull()
    line = F.when(is_sale & F.col("name").isNotNull(), F.struct("event_at", "name", "price"))
    # `line` is null for lines that do not count. They are filtered out after the aggregate, because
    # with a filter before it Spark would compute every column twice. Of lines at the same time, the
    # maximum takes the greater name, then the greater price; any fixed choice would do.
    last_lines = (
        lines.groupBy("item_id", F.to_date("event_at").alias("day"))
        .agg(F.max(line).alias("line"))
        .where("line IS NOT NULL")
    )
    return shaped(
        last_lines,
        schema.RAW_ITEMS,
        {
            "item_id": F.col("item_id"),
            "item_name": F.col("line.name"),
            "price": F.col("line.price"),
            "text": F.col("line.name"),
            "valid_from": F.col("line.event_at"),
        },
    )
