"""UCI Online Retail II: lines of invoices of a shop, with its cancellations, corrections and test
codes.

A row is refused for the first of these that holds: unreadable row, bad encoding, wrong type (these
two by column), cancelled invoice, not a product, quantity not positive, price not positive; what
any source may lack (no user, no time, …) comes after them (`recspark.data.events`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Source
from recspark.data.events import QUANTITY
from recspark.sources.files import Place, find_place
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


def places(source: Source, run_date: date) -> list[Place]:
    """Return where the input of `run_date` lies; raises MissingLandingError."""
    return [find_place(source, source.path, run_date)]


def read(
    spark: SparkSession, source: Source, places: list[Place], night: Night
) -> tuple[DataFrame | None, DataFrame | None]:
    """Return events and catalogue of `night`; None where no file holds a row.

    An event is a line of an invoice: `purchase`, value = quantity × price. The catalogue has one
    row per item and day on which it was sold under a name: the day's latest name and price, from
    the time of its last such line. Cost: events one shuffle (identical lines), items one.
    """
    table = read_raw(
        spark,
        places[0],
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
    """Return the event columns, and (condition, reason) in the order of precedence."""
    zone = source.timezone
    customer = id_of(table, "Customer ID")
    typed = {
        "quantity": number_of(table, "Quantity"),
        "event_at": time_of(table, "InvoiceDate", zone),
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
    """Return what makes a line: equal values of any type and format give the same text, that of the
    types in which the data set was published.
    """
    spelt = {name: raw_text(table, name) for name in COLUMNS}
    sold_at, quantity = F.col("event_at"), F.col("quantity")
    if source.timezone != "UTC":
        sold_at = F.from_utc_timestamp(sold_at, source.timezone)
    read = {
        "Quantity": F.when(quantity == F.rint(quantity), quantity.try_cast("bigint")),
        "InvoiceDate": sold_at,
        "Price": F.col("price"),
        "Customer ID": number_of(table, "Customer ID").value,
    }
    texts = {name: F.coalesce(value.cast("string"), spelt[name]) for name, value in read.items()}
    return [*(spelt | texts).values(), F.col(UNREADABLE)]


def _items(
    table: RawTable,
    rows: DataFrame,
    columns: Mapping[str, Column],
    checks: Sequence[tuple[Column, str]],
) -> DataFrame:
    needed = ("item_id", "event_at", "user_id", "order_id", "quantity", "price", "value")
    typed = rows.withColumns({name: columns[name] for name in needed})
    typed = typed.withColumn("name", text_of(table, "Description"))
    is_sale = first_reason(checks).isNull() & F.col("user_id").isNotNull()
    line = F.when(is_sale & F.col("name").isNotNull(), F.struct("event_at", "name", "price"))
    # Filtered after the aggregate: before it, Spark would compute every column twice.
    # Of lines at the same time the greater name, then the greater price: any fixed choice will do.
    latest = (
        typed.groupBy("item_id", F.to_date("event_at").alias("day"))
        .agg(F.max(line).alias("line"))
        .where("line IS NOT NULL")
    )
    return shaped(
        latest,
        schema.RAW_ITEMS,
        {
            "item_id": F.col("item_id"),
            "item_name": F.col("line.name"),
            "price": F.col("line.price"),
            "text": F.col("line.name"),
            "valid_from": F.col("line.event_at"),
        },
    )
