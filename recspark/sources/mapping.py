"""Any CSV, JSON lines, Parquet or Delta, through the column mapping of
`conf/sources/<name>.yaml`.
"""

from __future__ import annotations

from collections.abc import Container
from datetime import date

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Source
from recspark.sources.computed import Computed
from recspark.sources.files import Place, find_place
from recspark.sources.landing import Night
from recspark.sources.raw import UNREADABLE, RawTable, read_raw
from recspark.sources.spelling import Spelling, spelling_of
from recspark.sources.typed import (
    Typed,
    as_raw_events,
    attributes_of,
    bounds_of,
    id_of,
    list_of,
    number_of,
    readability,
    shaped,
    text_of,
    time_of,
    unread_numbers,
)

IDS = ("event_id", "user_id", "session_key", "order_id", "item_id", "event_type")
NUMBERS = ("value", "quantity")


def places(source: Source, run_date: date) -> list[Place]:
    """Return where events and catalogue of `run_date` lie; raises MissingLandingError."""
    found = [find_place(source, source.path, run_date)]
    if source.items_path is not None:
        found.append(find_place(source, source.items_path, run_date))
    return found


def read(
    spark: SparkSession, source: Source, places: list[Place], night: Night
) -> tuple[DataFrame | None, DataFrame | None]:
    """Return events and catalogue of `night`; None where no file holds a row.

    Without a mapped `event_id`, it is made of the event's own columns and the number among
    identical events, so the same rows have the same ids in any format. Catalogue rows without an
    item id are left out; of several for one item and time the greatest stays. Cost: events no
    shuffle, or one where ids are made; items one.
    """
    table = read_raw(
        spark,
        places[0],
        source.format,
        [*source.columns.values(), *source.attributes.values()],
        options=source.options,
        spelling=_events_spelling(source),
        computed=[*_expressions(source).values(), *_conditions(source)],
    )
    events = None if table is None else _events(source, table, night)
    if len(places) == 1:
        return events, None
    catalogue = read_raw(
        spark,
        places[1],
        source.items_format or source.format,
        list(source.items_columns.values()),
        options=source.options,
        spelling=spelling_of(source, source.items_columns),
    )
    return events, None if catalogue is None else _items(source, catalogue, night)


def _events(source: Source, table: RawTable, night: Night) -> DataFrame:
    expressions = _expressions(source)
    columns: dict[str, Column] = {}
    typed: dict[str, Typed] = {}
    for name, raw in (source.columns | {n: made.name for n, made in expressions.items()}).items():
        if name in IDS:
            columns[name] = id_of(table, raw)
            continue
        typed[name] = (
            number_of(table, raw) if name in NUMBERS else time_of(table, raw, source.timezone)
        )
        columns[name] = typed[name].value
    columns |= {name: F.lit(text) for name, text in source.constants.items()}
    attributes = {name: text_of(table, raw) for name, raw in source.attributes.items()}
    content = None
    if "event_id" not in columns:
        content = [F.col(name) for name in sorted(columns)]
        content += [attributes[name] for name in sorted(attributes)]
        content.append(F.col(UNREADABLE))
    checks = [
        *readability(table, typed, list(table.kinds)),
        *unread_numbers(table, expressions.values()),
        *[
            (~F.coalesce(table.column(made.name), F.lit(False)), reason)
            for made, reason in zip(_conditions(source), source.where.values())
        ],
        *_bounds(source, columns),
    ]
    rows = night.rows(table.frame, columns["event_at"])
    columns["attributes"] = attributes_of(attributes)
    return as_raw_events(table, rows, columns, checks, content)


def _expressions(source: Source) -> dict[str, Computed]:
    return {
        name: Computed(f"source.expressions.{name}", sql)
        for name, sql in source.expressions.items()
    }


def _conditions(source: Source) -> list[Computed]:
    return [Computed("source.where", sql, is_condition=True) for sql in source.where]


def _events_spelling(source: Source) -> Spelling:
    made = {name: computed.name for name, computed in _expressions(source).items()}
    return spelling_of(source, source.columns | made)


def _bounds(source: Source, columns: Container[str]) -> list[tuple[Column, str]]:
    bounds = dict(source.bounds)
    if source.min_value is not None:
        bounds["value"] = (source.min_value, None)
    checks = [check for name, limits in bounds.items() for check in bounds_of(name, *limits)]
    for name in NUMBERS:
        if name in columns:
            checks += bounds_of(name, size=source.max_value)
    return checks


def _items(source: Source, table: RawTable, night: Night) -> DataFrame:
    columns: dict[str, Column] = {}
    for name, raw in source.items_columns.items():
        if name == "item_id":
            columns[name] = id_of(table, raw)
        elif name == "price":
            columns[name] = number_of(table, raw).value
        elif name == "valid_from":
            columns[name] = time_of(table, raw, source.timezone).value
        elif name in ("category", "media"):
            columns[name] = list_of(table, raw, source.list_separator)
        else:
            columns[name] = text_of(table, raw)
    readable = table.frame.where(~table.unreadable())
    if "valid_from" in columns:
        readable = night.catalogue(readable, columns["valid_from"])
    else:
        # What the first catalogue says is taken to hold since ever; a later one, from its day on.
        since = "1970-01-01" if night.initial else night.run_date.isoformat()
        columns["valid_from"] = F.lit(since).cast("timestamp")
    columns["text"] = columns.get("text", columns.get("item_name", F.lit(None)))
    items = shaped(readable, schema.RAW_ITEMS, columns).where(
        "item_id IS NOT NULL AND valid_from IS NOT NULL"
    )
    described = [name for name in schema.RAW_ITEMS.names if name not in ("item_id", "valid_from")]
    greatest = F.max(F.struct(*described)).alias("described")
    return shaped(
        items.groupBy("item_id", "valid_from").agg(greatest),
        schema.RAW_ITEMS,
        {
            "item_id": F.col("item_id"),
            "valid_from": F.col("valid_from"),
            **{name: F.col(f"described.{name}") for name in described},
        },
    )
