"""Raw columns to event columns: a value where the raw one can be read, and whether it could not be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, StringType, StructType

from recspark import schema
from recspark.errors import SourceError
from recspark.sources import values
from recspark.sources.computed import Computed
from recspark.sources.raw import RawTable

UNREADABLE_ROW = "unreadable row"
WRONG_TYPE = "wrong type: {}"
TOO_SMALL_FOR_A_TIME = "wrong type: {} (a number that would lie before {})"
BAD_ENCODING = "bad encoding: {}"
TOO_LITTLE, TOO_LARGE = "{} too small", "{} too large"


@dataclass(frozen=True)
class Typed:
    """One raw column read as a type.

    Parameters
    ----------
    raw : name of the raw column
    value : what was read; null where nothing was given or it could not be read
    is_given : whether something was given; None where reading cannot fail
    reasons : (condition, reason) of what is given and not read, before the general reason
    """

    raw: str
    value: Column
    is_given: Column | None = None
    reasons: Sequence[tuple[Column, str]] = field(default=())


def id_of(table: RawTable, name: str) -> Column:
    """Return the raw column as an id: as it is printed, without blanks at its ends.

    13085.0 of a float is "13085"; of a text only where `whole_number_ids` says so. Null: what is
    blank, NaN or infinite, and the texts of `null_ids` and `null_values`.
    """
    return _each(
        table,
        name,
        "an id: text or a number",
        lambda column, kind: values.identity(column, kind, name, table.spelling),
    )


def number_of(table: RawTable, name: str) -> Typed:
    """Return the raw column as a double; blank text = null. NaN and infinity pass: ingest refuses
    them.

    Text is spelt as the source says (`decimal`, `thousands`, `currency`).
    """
    value, given = _all(
        table,
        name,
        "a number, or text that holds one",
        lambda column, kind: values.number(column, kind, name, table.spelling),
    )
    return Typed(name, F.coalesce(*value), _any(given))


def time_of(table: RawTable, name: str, zone: str) -> Typed:
    """Return the raw column as an instant, UTC.

    Takes timestamps, dates (midnight), and as text or number:

    - ISO text `2020-01-31`, `2020-01-31 10:00[:00[.123456]]` (T or blanks between), then nothing,
      `Z`, `UTC`, `+02`, `+0200`, `+02:00`, `Europe/Berlin` or `[Europe/Berlin]`, with or without a
      blank before; of an offset and a name the offset decides. Zones without a slash in their name
      (CET, BST) are refused, because programs differ on them;
    - 8, 12 or 14 digits that are a date of the years 1900 to 2199 (20200131, 202001311000);
    - any other number since 1970: seconds below 1e11, milliseconds below 1e14, else microseconds;
      one before `spelling.earliest` is no time.

    What carries no zone is wall-clock time in `zone`: an hour that is left out in spring is read as
    the one after it, an hour that comes twice in autumn as the first.
    """
    value, given, early = _all(
        table,
        name,
        "a timestamp, a date, ISO text or seconds since 1970",
        lambda column, kind: values.moment(column, kind, name, zone, table.spelling),
    )
    reason = TOO_SMALL_FOR_A_TIME.format(name, table.spelling.earliest)
    return Typed(name, F.coalesce(*value), _any(given), [(_any(early), reason)])


def list_of(table: RawTable, name: str, separator: str) -> Column:
    """Return the raw column as an array of texts: an array as it is, text split at `separator`."""

    def read(column: Column, kind: DataType) -> Column | None:
        if isinstance(kind, ArrayType) and not isinstance(kind.elementType, values.NESTED):
            return column.cast(schema.STRINGS)
        if not isinstance(kind, StringType):
            return None
        parts = F.split(column, r"\Q" + separator + r"\E")
        return F.filter(F.transform(parts, values.trimmed), lambda part: part.isNotNull())

    return _each(table, name, f"an array, or text with '{separator}' between its parts", read)


def text_of(table: RawTable, name: str) -> Column:
    """Return the raw column as text without blanks at its ends; blank = null."""
    return _each(table, name, "text", values.printed)


def attributes_of(columns: Mapping[str, Column]) -> Column:
    """Return a map attribute -> text; what a row lacks is null."""
    pairs = [part for name, value in columns.items() for part in (F.lit(name), value)]
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
            (table.column(name).contains("\ufffd"), BAD_ENCODING.format(name)) for name in named
        )
    for name, column in typed.items():
        if column.is_given is not None:
            is_wrong = F.col(name).isNull() & column.is_given
            checks.extend((is_wrong & condition, reason) for condition, reason in column.reasons)
            checks.append((is_wrong, WRONG_TYPE.format(column.raw)))
    return checks


def unread_numbers(
    table: RawTable, computed: Iterable[Computed]
) -> list[tuple[Column, str | Column]]:
    """Return (condition, reason) for rows where a number could not be read that SQL computes with."""
    checks: list[tuple[Column, str | Column]] = []
    for column in computed:
        name = table.column(column.wrong)
        reason = F.concat(F.lit(WRONG_TYPE.format("")), name)
        checks.append((name.isNotNull(), reason))
    return checks


def bounds_of(
    name: str, low: float | None = None, high: float | None = None, size: float | None = None
) -> list[tuple[Column, str]]:
    """Return (condition, reason) for the event column `name` below `low`, above `high` or farther
    than `size` from 0. NaN and infinity are for ingest, which has a reason of their own.
    """
    number, checks = F.col(name), []
    is_finite = F.abs(number) < float("inf")
    if low is not None:
        checks.append((is_finite & (number < low), TOO_LITTLE.format(name)))
    if high is not None:
        checks.append((is_finite & (number > high), TOO_LARGE.format(name)))
    if size is not None:
        checks.append((is_finite & (F.abs(number) > size), TOO_LARGE.format(name)))
    return checks


def first_reason(checks: Sequence[tuple[Column, str | Column]]) -> Column:
    """Return the reason of the first condition that holds; null where none does (null = does
    not).
    """
    if not checks:
        return F.lit(None).cast("string")
    (condition, reason), *rest = checks
    return reduce(lambda found, check: found.when(*check), rest, F.when(condition, reason))


def raw_text(table: RawTable, name: str) -> Column:
    """Return the raw column as text that is the same for equal values of any type; text as it is."""

    def read(column: Column, kind: DataType) -> Column | None:
        return column if isinstance(kind, StringType) else values.printed(column, kind)

    return _each(table, name, "text or a number", read)


def with_event_id(rows: DataFrame, content: Sequence[Column]) -> DataFrame:
    """Return `rows` with `event_id`: a 128-bit hash of `content`, and which of the identical rows
    it is.

    Rows of equal content differ in the number only, so it does not matter which gets which: the
    same rows give the same ids in any order, and in any landing as long as equal rows land together
    (equal content has equal times, hence the same day). A refused row, one with a `reason`, counts
    on its own. Cost: one shuffle of the rows.
    """
    # \x00 stands for null, \x1f ends a field: ("a", null) and (null, "a") differ.
    parts = [F.coalesce(column.cast("string"), F.lit("\x00")) for column in content]
    refused = F.when(F.col("reason").isNotNull(), F.lit("refused"))  # null adds nothing
    digest = F.substring(F.sha2(F.concat_ws("\x1f", *parts, refused), 256), 1, 32)
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
    checks: Sequence[tuple[Column, str | Column]],
    content: Sequence[Column] | None = None,
) -> DataFrame:
    """Return `rows` of `table` as `schema.RAW_EVENTS`.

    `columns` gives event columns from raw ones; `checks` and `content`, of which `event_id` is made
    where it is no column, may name both. In steps, so that Spark computes each column once, and
    `row` only for those who keep it: a select on top of the last one, where all else is a plain
    column, is merged with it. Where ids are made, the whole raw row takes part in their shuffle.
    """
    typed = rows.withColumns(dict(columns))
    judged = typed.withColumn("reason", first_reason(checks))
    if content is not None:
        judged = with_event_id(judged, content)
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


def _all(
    table: RawTable,
    name: str,
    wanted: str,
    read: Callable[[Column, DataType], tuple[Column, ...] | None],
) -> tuple[tuple[Column, ...], ...]:
    """Return what `read` gives for each type of a column, turned: all first parts, all second, …"""
    found = []
    for column, kind in table.variants(name):
        parts = read(column, kind)
        if parts is None:
            raise SourceError(
                f"source '{table.source}': column '{name}' is {kind.simpleString()}, expected "
                f"{wanted}; nothing was written. Mend the delivery, or name another column"
            )
        found.append(parts)
    return tuple(zip(*found))


def _each(
    table: RawTable, name: str, wanted: str, read: Callable[[Column, DataType], Column | None]
) -> Column:
    def read_one(column: Column, kind: DataType) -> tuple[Column] | None:
        value = read(column, kind)
        return None if value is None else (value,)

    (found,) = _all(table, name, wanted, read_one)
    return F.coalesce(*found)


def _any(conditions: Sequence[Column]) -> Column:
    return reduce(Column.__or__, conditions)
