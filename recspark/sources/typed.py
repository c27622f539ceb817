"""Raw columns to event columns: a value where the raw one can be read, and whether it could not be.

Spark 4 casts strictly: a plain cast of one bad row fails the night. Everything here is `try_cast`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DateType,
    FractionalType,
    MapType,
    NullType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from recspark import schema
from recspark.errors import SourceError
from recspark.sources.raw import RawTable, split_text

UNREADABLE_ROW = "unreadable row"
WRONG_TYPE = "wrong type: {}"
BAD_ENCODING = "bad encoding: {}"

_ZONED = r":\d{2}(:\d{2}([.]\d{1,9})?)?\s*(Z|UTC|GMT|[+-]\d{1,2}(:?\d{2})?)\s*$"
_NESTED = (ArrayType, MapType, StructType, BinaryType)


@dataclass(frozen=True)
class Typed:
    """One raw column read as a type.

    Parameters
    ----------
    raw : name of the raw column
    value : what was read; null where nothing was given or it could not be read
    is_given : whether something was given; None where reading cannot fail
    """

    raw: str
    value: Column
    is_given: Column | None = None


def id_of(table: RawTable, name: str) -> Column:
    """Return the raw column as an id, as it is printed; blank = null, and 13085.0 of a float is
    "13085".
    """
    column, kind = table.column(name), table.kinds[name]
    if isinstance(kind, _NESTED):
        raise _wrong_column(table, name, "an id: text or a number")
    if isinstance(kind, StringType):
        return F.when(F.trim(column) != "", column)
    if isinstance(kind, FractionalType):
        number = column.cast("double")
        whole = (number == F.rint(number)) & (F.abs(number) < 2.0**53)
        text = F.when(whole, number.cast("bigint").cast("string")).otherwise(column.cast("string"))
        return F.when(~F.isnan(number), text)
    return column.cast("string")


def number_of(table: RawTable, name: str) -> Typed:
    """Return the raw column as a double; blank text = null. NaN and infinity pass: ingest refuses
    them.
    """
    column, kind = table.column(name), table.kinds[name]
    if isinstance(kind, NumericType | NullType):
        return Typed(name, column.cast("double"))
    if not isinstance(kind, StringType):
        raise _wrong_column(table, name, "a number, or text that holds one")
    return Typed(name, column.try_cast("double"), F.trim(column) != "")


def time_of(table: RawTable, name: str, zone: str) -> Typed:
    """Return the raw column as an instant, UTC.

    Takes timestamps, dates (midnight), ISO text (2020-01-31, 2020-01-31 10:00[:00[.123]], with Z or
    +02:00) and numbers since 1970: seconds below 1e11, milliseconds below 1e14, else microseconds.
    What carries no zone is wall-clock time in `zone`.
    """
    column, kind = table.column(name), table.kinds[name]
    if isinstance(kind, TimestampType | NullType):
        return Typed(name, column.cast("timestamp"))
    if isinstance(kind, TimestampNTZType | DateType):
        return Typed(name, _to_utc(column.cast("timestamp"), zone))
    if isinstance(kind, NumericType):
        return Typed(name, _since_epoch(column.cast("double")), column.isNotNull())
    if not isinstance(kind, StringType):
        raise _wrong_column(table, name, "a timestamp, a date, ISO text or seconds since 1970")
    text = F.trim(column)
    # Spark also takes '2020' and 'T10:00' (today!) for times.
    is_iso = (F.substring(text, 5, 1) == "-") & (F.length(text) >= 8)
    moment = text.try_cast("timestamp")
    if zone != "UTC":
        moment = F.when(text.rlike(_ZONED), moment).otherwise(_to_utc(moment, zone))
    value = F.when(is_iso, moment).otherwise(_since_epoch(text.try_cast("double")))
    return Typed(name, value, text != "")


def list_of(table: RawTable, name: str, separator: str) -> Column:
    """Return the raw column as an array of texts: an array as it is, text split at `separator`."""
    column, kind = table.column(name), table.kinds[name]
    if isinstance(kind, ArrayType) and not isinstance(kind.elementType, _NESTED):
        return column.cast(schema.STRINGS)
    if not isinstance(kind, StringType):
        raise _wrong_column(table, name, f"an array, or text with '{separator}' between its parts")
    return split_text(column, separator)


def text_of(table: RawTable, name: str) -> Column:
    """Return the raw column as trimmed text; blank = null."""
    if isinstance(table.kinds[name], _NESTED):
        raise _wrong_column(table, name, "text")
    trimmed = F.trim(table.column(name).cast("string"))
    return F.when(trimmed != "", trimmed)


def attributes_of(values: Mapping[str, Column]) -> Column:
    """Return a map attribute -> text; what a row lacks is null."""
    pairs = [part for name, value in values.items() for part in (F.lit(name), value)]
    return F.create_map(*pairs).cast(schema.STRING_MAP)


def readability(
    table: RawTable, typed: Mapping[str, Typed], named: Sequence[str]
) -> list[tuple[Column, str]]:
    """Return (condition, reason) for rows that cannot be read.

    `typed` goes by event column, which the conditions refer to; `named` are the raw columns of
    text.
    """
    checks = []
    if table.is_text:
        checks.append((table.unreadable(), UNREADABLE_ROW))
        # Spark puts U+FFFD in place of bytes that are no text.
        checks.extend(
            (table.text(name).contains("\ufffd"), BAD_ENCODING.format(name)) for name in named
        )
    for name, column in typed.items():
        if column.is_given is not None:
            checks.append((F.col(name).isNull() & column.is_given, WRONG_TYPE.format(column.raw)))
    return checks


def first_reason(checks: Sequence[tuple[Column, str]]) -> Column:
    """Return the reason of the first condition that holds; null where none does (null = does
    not).
    """
    if not checks:
        return F.lit(None).cast("string")
    (condition, reason), *rest = checks
    return reduce(lambda found, check: found.when(*check), rest, F.when(condition, reason))


def with_event_id(rows: DataFrame, content: Sequence[Column]) -> DataFrame:
    """Return `rows` with `event_id`: a 128-bit hash of `content`, and which of the identical rows
    it is.

    Rows of equal content differ in the number only, so it does not matter which gets which: the
    same rows give the same ids in any order, and in any landing as long as equal rows land together
    (equal content has equal times, hence the same day). Cost: one shuffle of the rows.
    """
    # \x00 stands for null, \x1f ends a field: ("a", null) and (null, "a") differ.
    parts = [F.coalesce(column.cast("string"), F.lit("\x00")) for column in content]
    digest = F.substring(F.sha2(F.concat_ws("\x1f", *parts), 256), 1, 32)
    # A long sorts twice as fast as the text; where two contents share one, the text tells them
    # apart.
    near = Window.partitionBy("_near").orderBy("_content")
    alike = F.row_number().over(near) - F.rank().over(near) + 1
    numbered = (
        rows.withColumn("_content", digest)
        .withColumn("_near", F.xxhash64("_content"))
        .withColumn("_n", alike)
    )
    event_id = F.concat_ws("-", "_content", F.col("_n").cast("string"))
    return numbered.withColumn("event_id", event_id).drop("_content", "_near", "_n")


def as_raw_events(
    table: RawTable,
    rows: DataFrame,
    columns: Mapping[str, Column],
    checks: Sequence[tuple[Column, str]],
) -> DataFrame:
    """Return `rows` of `table` as `schema.RAW_EVENTS`.

    `columns` gives event columns from raw ones; `checks` may name both. In three steps, so that
    Spark computes each column once, and `row` only for those who keep it: a select on top of the
    last one, where all else is a plain column, is merged with it.
    """
    typed = rows.withColumns(dict(columns))
    judged = typed.withColumn("reason", first_reason(checks))
    plain = {name: F.col(name) for name in (*columns, "event_id", "reason")}
    return shaped(judged, schema.RAW_EVENTS, {**plain, "row": table.row()})


def shaped(rows: DataFrame, like: StructType, columns: Mapping[str, Column]) -> DataFrame:
    """Return `rows` with the columns of the schema `like`; one that `columns` does not name is
    null.
    """
    return rows.select(
        *[
            columns.get(field.name, F.lit(None)).cast(field.dataType).alias(field.name)
            for field in like
        ]
    )


def _to_utc(local: Column, zone: str) -> Column:
    return local if zone == "UTC" else F.to_utc_timestamp(local, zone)


def _since_epoch(number: Column) -> Column:
    size = F.abs(number)
    micros = F.when(size < 1e11, number * 1e6).when(size < 1e14, number * 1e3).otherwise(number)
    return F.timestamp_micros(micros.try_cast("bigint"))


def _wrong_column(table: RawTable, name: str, wanted: str) -> SourceError:
    return SourceError(
        f"source '{table.source}': column '{name}' is {table.kinds[name].simpleString()}, "
        f"expected {wanted}; nothing was written. Mend the delivery, or name another column"
    )
