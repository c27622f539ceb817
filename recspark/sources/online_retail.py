"""UCI Online Retail II: lines of invoices of a shop, with its cancellations, corrections and test codes.

A row is refused for the first of these that holds: unreadable row, bad encoding, wrong type (these
two by column), cancelled invoice, not a product, quantity not positive, price not positive; what any
source may lack (no user, no time, …) comes after them (`recspark.data.events`).
"""

from __future__ import annotations

from datetime import date

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StringType

from recspark import schema
from recspark.config import Source
from recspark.sources.files import Place, find_place
from recspark.sources.landing import Night
from recspark.sources.raw import RawTable, read_raw
from recspark.sources.typed import (
    WRONG_TYPE,
    Typed,
    attributes_of,
    first_reason,
    id_of,
    number_of,
    readability,
    shaped,
    text_of,
    time_of,
    with_event_id,
)

CANCELLED = "cancelled invoice"
NOT_A_PRODUCT = "not a product"
QUANTITY = "quantity not positive"
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

    An event is a line of an invoice: `purchase`, value = quantity × price. The catalogue has one row per
    item and day on which it was sold under a name: the day's latest name and price, from the time of
    its last such line. Cost: events one shuffle (identical lines), items one.
    """
    table = read_raw(spark, places[0], source.format, COLUMNS, options=source.options)
    if table is None:
        return None, None
    lines = _Lines(table, source.timezone)
    rows = night.rows(table.frame, lines.sold_at.value)
    return _events(rows, lines), _items(rows, lines)


class _Lines:
    """The columns of one line, typed, and what is wrong with it."""

    def __init__(self, table: RawTable, zone: str) -> None:
        self.table = table
        self.sold_at = time_of(table, "InvoiceDate", zone)
        self.quantity = number_of(table, "Quantity")
        self.price = number_of(table, "Price")
        self.item_id = id_of(table, "StockCode")
        customer = id_of(table, "Customer ID")
        if isinstance(table.kinds["Customer ID"], StringType):
            customer = F.regexp_replace(F.trim(customer), r"^(\d+)[.]0+$", "$1")
        is_number = customer.rlike(r"^\d+$")
        user_id = Typed(F.when(is_number, customer), customer.isNotNull() & ~is_number)
        self.user_id = user_id.value
        cancelled = F.upper(table.column("Invoice").cast("string")).startswith("C")
        self.refusals = [
            *readability(
                table,
                {
                    "Quantity": self.quantity,
                    "InvoiceDate": self.sold_at,
                    "Price": self.price,
                    "Customer ID": user_id,
                },
                ("Invoice", "StockCode", "Description"),
            ),
            (cancelled, CANCELLED),
            (~self.item_id.rlike(r"^[0-9]{5}"), NOT_A_PRODUCT),
            (~(F.coalesce(self.quantity.value, F.lit(0.0)) > 0), QUANTITY),
            (~(F.coalesce(self.price.value, F.lit(0.0)) > 0), PRICE),
        ]


def _events(rows: DataFrame, lines: _Lines) -> DataFrame:
    table = lines.table
    numbered = with_event_id(rows, [table.column(name) for name in COLUMNS] + [table.unreadable()])
    return shaped(
        numbered,
        schema.RAW_EVENTS,
        {
            "event_id": F.col("event_id"),
            "user_id": lines.user_id,
            "order_id": id_of(table, "Invoice"),
            "item_id": lines.item_id,
            "event_type": F.lit("purchase"),
            "event_at": lines.sold_at.value,
            "value": lines.quantity.value * lines.price.value,
            "quantity": lines.quantity.value,
            "attributes": attributes_of({"country": text_of(table, "Country")}),
            "reason": first_reason(lines.refusals),
            "row": table.row(),
        },
    )


def _items(rows: DataFrame, lines: _Lines) -> DataFrame:
    name, sold_at = text_of(lines.table, "Description"), lines.sold_at.value
    sales = rows.where(
        first_reason(lines.refusals).isNull() & lines.user_id.isNotNull() & name.isNotNull()
    ).select(
        lines.item_id.alias("item_id"),
        sold_at.cast("date").alias("sold_on"),
        F.struct(sold_at.alias("at"), name.alias("name"), lines.price.value.alias("price")).alias(
            "line"
        ),
    )
    # Of lines at the same time the greater name, then the greater price: any fixed choice will do.
    latest = sales.groupBy("item_id", "sold_on").agg(F.max("line").alias("line"))
    return shaped(
        latest,
        schema.RAW_ITEMS,
        {
            "item_id": F.col("item_id"),
            "item_name": F.col("line.name"),
            "price": F.col("line.price"),
            "text": F.col("line.name"),
            "valid_from": F.col("line.at"),
        },
    )
