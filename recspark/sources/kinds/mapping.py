"""Source kind `mapping`: any CSV, JSON lines, Parquet or Delta. The settings in
`conf/sources/<name>.yaml` say which raw column is which event or item column.
"""

from __future__ import annotations

from collections.abc import Container
from datetime import date

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Source
from recspark.config.source import ID_COLUMNS, NUMBER_COLUMNS
from recspark.sources.computed import Computed
from recspark.sources.files import SourceInput, find_input
from recspark.sources.landing import Night
from recspark.sources.raw import UNREADABLE, RawTable, read_raw
from recspark.sources.spelling import Spelling, spelling_of
from recspark.sources.typed import (
    Typed,
    as_raw_events,
    attributes_of,
    bounds_of,
    first_reason,
    flag_of,
    id_of,
    list_of,
    number_of,
    readability,
    shaped,
    text_of,
    time_of,
    unread_numbers,
)

CATALOGUE_IS_OF_EVENTS = False


def inputs(source: Source, run_date: date) -> list[SourceInput]:
    """Return the input of the events of `run_date`, then the input of the catalogue if the settings
    name one. Raises MissingLandingError.
    """
    found_inputs = [find_input(source, source.path, run_date)]
    if source.items_path is not None:
        found_inputs.append(find_input(source, source.items_path, run_date))
    return found_inputs


def read(
    spark: SparkSession, source: Source, inputs: list[SourceInput], night: Night
) -> tuple[DataFrame | None, DataFrame | None]:
    """Return the events and the catalogue of `night`; None for an input whose files hold no row.

    Where no `event_id` is mapped, it is made of the event's columns and a number that counts
    identical events. So the same rows get the same ids in any file format. All rows of both inputs
    are returned; those that cannot be read have a `reason`. Cost: no shuffle for the events, or one
    where ids are made; none for the items.
    """
    table = read_raw(
        spark,
        inputs[0],
        source.format,
        [*source.columns.values(), *source.attributes.values()],
        options=source.options,
        spelling=_events_spelling(source),
        computed=[*_expressions(source).values(), *_conditions(source)],
    )
    events = None if table is None else _events(source, table, night)
    if len(inputs) == 1:
        return events, None
    catalogue = read_raw(
        spark,
        inputs[1],
        source.items_format or source.format,
        list(source.items_columns.values()),
        options=source.options,
        lists={
            raw_column: source.list_separator
            for name, raw_column in source.items_columns.items()
            if name in ("category", "media")
        },
        spelling=spelling_of(source, source.items_columns),
    )
    return events, None if catalogue is None else _items(source, catalogue, night)


def _events(source: Source, table: RawTable, night: Night) -> DataFrame:
    expressions = _expressions(source)
    columns: dict[str, Column] = {}
    typed: dict[str, Typed] = {}
    for name, raw_column in (
        source.columns
        | {event_column: computed.name for event_column, computed in expressions.items()}
    ).items():
        if name in ID_COLUMNS:
            columns[name] = id_of(table, raw_column)
            continue
        typed[name] = (
            number_of(table, raw_column)
            if name in NUMBER_COLUMNS
            else time_of(table, raw_column, source.timezone)
        )
        columns[name] = typed[name].value
    columns |= {name: F.lit(text) for name, text in source.constants.items()}
    attributes = {
        name: text_of(table, raw_column) for name, raw_column in source.attributes.items()
    }
    id_content = None
    if "event_id" not in columns:
        id_content = [F.col(name) for name in sorted(columns)]
        id_content += [attributes[name] for name in sorted(attributes)]
        id_content.append(F.col(UNREADABLE))
    checks = [
        *readability(table, typed, list(table.named_types)),
        *unread_numbers(table, expressions.values()),
        *[
            (~F.coalesce(table.column(computed.name), F.lit(False)), reason)
            for computed, reason in zip(_conditions(source), source.where.values())
        ],
        *_bound_checks(source, columns),
    ]
    rows = night.rows(table.frame, columns["event_at"])
    columns["attributes"] = attributes_of(attributes)
    return as_raw_events(table, rows, columns, checks, id_content)


# Event column -> the SQL of setting `source.expressions` that computes the column.
def _expressions(source: Source) -> dict[str, Computed]:
    return {
        name: Computed(f"source.expressions.{name}", sql)
        for name, sql in source.expressions.items()
    }


# The SQL conditions of setting `source.where`; a row for which one does not hold is refused.
def _conditions(source: Source) -> list[Computed]:
    return [Computed("source.where", sql, is_condition=True) for sql in source.where]


def _events_spelling(source: Source) -> Spelling:
    computed_names = {name: computed.name for name, computed in _expressions(source).items()}
    return spelling_of(source, source.columns | computed_names)


# The checks of `value` and `quantity` against the bounds that the settings give.
def _bound_checks(source: Source, columns: Container[str]) -> list[tuple[Column, str]]:
    bounds = dict(source.bounds)
    if source.min_value is not None:
        bounds["value"] = (source.min_value, None)
    checks = [check for name, limits in bounds.items() for check in bounds_of(name, *limits)]
    for name in NUMBER_COLUMNS:
        if name in columns:
            checks += bounds_of(name, size=source.max_value)
    return checks


def _items(source: Source, table: RawTable, night: Night) -> DataFrame:
    columns: dict[str, Column] = {}
    typed: dict[str, Typed] = {}
    for name, raw_column in source.items_columns.items():
        if name == "item_id":
            columns[name] = id_of(table, raw_column)
        elif name == "price":
            typed[name] = number_of(table, raw_column)
        elif name == "available":
            typed[name] = flag_of(table, raw_column)
        elif name in ("valid_from", "available_from", "available_until"):
            typed[name] = time_of(table, raw_column, source.timezone)
        elif name in ("category", "media"):
            columns[name] = list_of(table, raw_column, source.list_separator)
        else:
            columns[name] = text_of(table, raw_column)
    columns |= {name: column.value for name, column in typed.items()}
    rows = table.frame
    if "valid_from" in columns:
        rows = night.rows(rows, columns["valid_from"])
    else:
        # The first catalogue is taken as valid from 1970 on, a later one from its own day on.
        valid_from = "1970-01-01" if night.initial else night.run_date.isoformat()
        columns["valid_from"] = F.lit(valid_from).cast("timestamp")
    if source.items_complete or not columns.keys().isdisjoint(schema.AVAILABILITY):
        # An unreadable flag stays null, so that the row is refused.
        flag = typed.get("available")
        is_blank = F.lit(True) if flag is None or flag.is_present is None else ~flag.is_present
        columns["available"] = F.coalesce(
            columns.get("available", F.lit(None)), F.when(is_blank, F.lit(True))
        )
    columns["text"] = columns.get("text", columns.get("item_name", F.lit(None)))
    # In steps, as in `as_raw_events`: Spark then computes each column once, and `row` only for the
    # rows that keep it.
    rows_with_reason = rows.withColumns(columns).withColumn(
        "reason", first_reason(readability(table, typed, list(table.named_types)))
    )
    plain_columns = {name: F.col(name) for name in (*columns, "reason")}
    return shaped(rows_with_reason, schema.RAW_ITEMS, {**plain_columns, "row": table.row()})
