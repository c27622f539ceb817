"""Reads raw columns as event and item columns, and finds the rows whose values cannot be read."""

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
from recspark.sources.raw import RawTable, split_text

UNREADABLE_ROW = "unreadable row"
WRONG_TYPE = "wrong type: {}"
TOO_SMALL_FOR_A_TIME = "wrong type: {} (a number that would lie before {})"
BAD_ENCODING = "bad encoding: {}"
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
TOO_LITTLE, TOO_LARGE = "{} too small", "{} too large"


@dataclass(frozen=True)
class Typed:
    """One raw column, read as a number, a time or an id.

    Parameters
    ----------
    raw : name of the raw column
    value : the value read; null where the raw column is empty or its value could not be read
    is_present : whether the raw column has a value; None where reading cannot fail
    reasons : (condition, reason) for values that are present but could not be read. They come
        before the general reason `wrong type: <column>`
    """

    raw: str
    value: Column
    is_present: Column | None = None
    reasons: Sequence[tuple[Column, str]] = field(default=())


def id_of(table: RawTable, name: str) -> Column:
    """Return the raw column as an id: the value as printed, without blanks at its ends.

    13085.0 of a float is "13085"; the text "13085.0" is so only where setting `whole_number_ids`
    names the column. Blank text, NaN, infinity and the texts of settings `null_ids` and
    `null_values` give null. Raises SourceError for a type that cannot be an id.
    """
    return _read_column(
        table,
        name,
        "an id: text or a number",
        lambda column, data_type: values.identity(column, data_type, name, table.spelling),
    )


def number_of(table: RawTable, name: str) -> Typed:
    """Return the raw column as a double; blank text gives null.

    Text is read in the spelling of the source (`decimal`, `thousands`, `currency`). NaN and
    infinity are read too; ingest refuses them. Raises SourceError for a type that cannot be a
    number.
    """
    numbers, are_present = _read_each_type(
        table,
        name,
        "a number, or text that holds one",
        lambda column, data_type: values.number(column, data_type, name, table.spelling),
    )
    return Typed(name, F.coalesce(*numbers), _any_of(are_present))


def time_of(table: RawTable, name: str, zone: str) -> Typed:
    """Return the raw column as an instant in UTC.

    The raw column may hold timestamps, dates (read as midnight), texts or numbers. These texts and
    numbers are times:

    - ISO text `2020-01-31` or `2020-01-31 10:00[:00[.123456]]`, with T or blanks between date and
      time. After the time may stand `Z`, `UTC`, `+02`, `+0200`, `+02:00`, `Europe/Berlin` or
      `[Europe/Berlin]`, with or without a blank before. Where an offset and a name both stand
      there, the offset decides. Zones without a slash in their name (CET, BST) are refused, because
      programs differ on their meaning;
    - 8, 12 or 14 digits that are a date in the years 1900 to 2199 (20200131, 202001311000);
    - any other number counts since 1970: seconds below 1e11, milliseconds below 1e14, else
      microseconds. A number that would lie before `spelling.earliest` is no time.

    A time without a zone is wall-clock time in `zone`. An hour that the zone leaves out in spring
    is read as the hour after that one, and an hour that comes twice in autumn as the first of the
    two. Raises SourceError for a type that cannot be a time.
    """
    instants, are_present, are_counts = _read_each_type(
        table,
        name,
        "a timestamp, a date, ISO text or seconds since 1970",
        lambda column, data_type: values.moment(column, data_type, name, zone, table.spelling),
    )
    reason = TOO_SMALL_FOR_A_TIME.format(name, table.spelling.earliest)
    return Typed(name, F.coalesce(*instants), _any_of(are_present), [(_any_of(are_counts), reason)])


def list_of(table: RawTable, name: str, separator: str) -> Column:
    """Return the raw column as an array of texts. An array is taken as it is, and text is split at
    `separator`. Raises SourceError for any other type.
    """

    def read(column: Column, data_type: DataType) -> Column | None:
        if isinstance(data_type, ArrayType) and not isinstance(
            data_type.elementType, values.NESTED
        ):
            return column.cast(schema.STRINGS)
        if not isinstance(data_type, StringType):
            return None
        return split_text(column, separator)

    return _read_column(
        table, name, f"an array, or text with '{separator}' between its parts", read
    )


def text_of(table: RawTable, name: str) -> Column:
    """Return the raw column as text without blanks at its ends; blank text gives null."""
    return _read_column(table, name, "text", values.printed)


def flag_of(table: RawTable, name: str) -> Typed:
    """Return the raw column as true or false; blank text gives null.

    True are true, t, yes, y and 1, in lower or upper case; false are false, f, no, n and 0.
    """
    text = F.lower(text_of(table, name))
    value = F.when(text.isin(*_TRUE), True).when(text.isin(*_FALSE), False)
    return Typed(name, value, text.isNotNull())


def attributes_of(columns: Mapping[str, Column]) -> Column:
    """Return the map column attribute -> text. An attribute that a row lacks is null in the map."""
    pairs = [part for name, value in columns.items() for part in (F.lit(name), value)]
    return F.create_map(*pairs).cast(schema.STRING_MAP)


def readability(
    table: RawTable, typed: Mapping[str, Typed], text_columns: Sequence[str]
) -> list[tuple[Column, str]]:
    """Return (condition, reason) for rows that cannot be read, in order of precedence.

    `typed` has the columns that may fail, by their event or item name. The conditions refer to
    these names, so they hold for rows that have the event columns already. `text_columns` are the
    raw columns to check for bytes that are no text in the file's encoding.
    """
    checks = []
    if table.is_text:
        checks.append((table.unreadable(), UNREADABLE_ROW))
        # Spark puts U+FFFD in place of bytes that are no text.
        checks.extend(
            (_is_badly_encoded(table, name), BAD_ENCODING.format(name)) for name in text_columns
        )
    for name, column in typed.items():
        if column.is_present is not None:
            is_unread = F.col(name).isNull() & column.is_present
            checks.extend((is_unread & condition, reason) for condition, reason in column.reasons)
            checks.append((is_unread, WRONG_TYPE.format(column.raw)))
    return checks


def _is_badly_encoded(table: RawTable, name: str) -> Column:
    def has_replacement_character(column: Column, data_type: DataType) -> Column:
        if isinstance(data_type, ArrayType):
            return F.exists(column, lambda text: text.contains("\ufffd"))
        return column.contains("\ufffd")

    return _any_of(
        [has_replacement_character(column, data_type) for column, data_type in table.variants(name)]
    )


def unread_numbers(
    table: RawTable, computed: Iterable[Computed]
) -> list[tuple[Column, str | Column]]:
    """Return (condition, reason) for rows where a raw number could not be read for the SQL of
    `computed`.
    """
    checks: list[tuple[Column, str | Column]] = []
    for column in computed:
        raw_name = table.column(column.unread_name)
        reason = F.concat(F.lit(WRONG_TYPE.format("")), raw_name)
        checks.append((raw_name.isNotNull(), reason))
    return checks


def bounds_of(
    name: str, low: float | None = None, high: float | None = None, size: float | None = None
) -> list[tuple[Column, str]]:
    """Return (condition, reason) for values of the event column `name` below `low`, above `high` or
    farther than `size` from 0.

    NaN and infinity meet none of the conditions. Ingest refuses them with a reason of their own.
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
    """Return the reason of the first condition that holds; null where none does. A condition that
    is null does not hold.
    """
    if not checks:
        return F.lit(None).cast("string")
    (condition, reason), *rest = checks
    return reduce(
        lambda case_expression, check: case_expression.when(*check), rest, F.when(condition, reason)
    )


def raw_text(table: RawTable, name: str) -> Column:
    """Return the raw column as text. Text stays as it is; other types give the same text for equal
    values.
    """

    def read(column: Column, data_type: DataType) -> Column | None:
        return column if isinstance(data_type, StringType) else values.printed(column, data_type)

    return _read_column(table, name, "text or a number", read)


def with_event_id(rows: DataFrame, content: Sequence[Column]) -> DataFrame:
    """Return `rows` with `event_id`: a 128-bit hash of `content`, and a number that counts the rows
    with identical content.

    For example, three identical rows get the ids `3f…-1`, `3f…-2` and `3f…-3`. As the rows are
    identical, it does not matter which of them gets which number. So the same rows give the same
    ids in any order. They do so in any landing too, as long as identical rows are in one landing:
    identical content means identical times, hence the same day. Refused rows, those with a
    `reason`, are counted apart from the others. Cost: one shuffle of the rows.
    """
    # \x00 stands for null and \x1f separates fields, so that ("a", null) and (null, "a") differ.
    fields = [F.coalesce(column.cast("string"), F.lit("\x00")) for column in content]
    refused = F.when(F.col("reason").isNotNull(), F.lit("refused"))  # `concat_ws` skips null
    digest = F.substring(F.sha2(F.concat_ws("\x1f", *fields, refused), 256), 1, 32)
    # Sorting by a 64-bit hash of the digest is twice as fast as sorting by the digest. Two digests
    # may share a hash, so rows are also ordered by digest, and numbered by row number - rank + 1:
    # rank is the row number of the first row with the same digest.
    same_hash = Window.partitionBy("_near").orderBy("_content")
    number_among_identical = F.row_number().over(same_hash) - F.rank().over(same_hash) + 1
    numbered = (
        rows.withColumn("_content", digest)
        .withColumn("_near", F.xxhash64("_content"))
        .withColumn("_n", number_among_identical)
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

    Parameters
    ----------
    columns : event column -> expression over the raw columns
    checks : (condition, reason) over raw and event columns; the first that holds refuses the row
    content : the columns, raw or event, from which `event_id` is made; None where `columns` has an
        `event_id`

    The columns are added in steps, so that Spark computes each one only once. `row` is computed in
    the last select, where all other columns are plain. Spark merges a later select into that one,
    so `row` is computed only for rows that keep `row`. Where ids are made, the raw rows are
    shuffled as a whole.
    """
    event_rows = rows.withColumns(dict(columns))
    rows_with_reason = event_rows.withColumn("reason", first_reason(checks))
    if content is not None:
        rows_with_reason = with_event_id(rows_with_reason, content)
    plain_columns = {name: F.col(name) for name in (*columns, "event_id", "reason")}
    return shaped(rows_with_reason, schema.RAW_EVENTS, {**plain_columns, "row": table.row()})


def shaped(rows: DataFrame, like: StructType, columns: Mapping[str, Column]) -> DataFrame:
    """Return `rows` with exactly the columns of the schema `like`, cast to its types. A column that
    `columns` does not name is null.
    """
    return rows.select(
        *[
            columns.get(field.name, F.lit(None)).cast(field.dataType).alias(field.name)
            for field in like
        ]
    )


def _read_each_type(
    table: RawTable,
    name: str,
    expected: str,
    read: Callable[[Column, DataType], tuple[Column, ...] | None],
) -> tuple[tuple[Column, ...], ...]:
    """Return the results of `read` for each type that the raw column `name` has.

    `read` gives a tuple of columns, or None for a type that it cannot read. The result has first a
    tuple of all first columns, then one of all second columns, and so on. For example, a price that
    is integer in one file and text in another gives ((value of the integer, value of the text),
    (integer is present, text is present)).

    Raises SourceError, which says that `expected` is expected, where `read` gives None.
    """
    results = []
    for column, data_type in table.variants(name):
        columns = read(column, data_type)
        if columns is None:
            raise SourceError(
                f"source '{table.source}': column '{name}' is {data_type.simpleString()}, expected "
                f"{expected}; nothing was written. Mend the delivery, or name another column"
            )
        results.append(columns)
    return tuple(zip(*results))


def _read_column(
    table: RawTable, name: str, expected: str, read: Callable[[Column, DataType], Column | None]
) -> Column:
    def read_as_tuple(column: Column, data_type: DataType) -> tuple[Column] | None:
        value = read(column, data_type)
        return None if value is None else (value,)

    (values_of_types,) = _read_each_type(table, name, expected, read_as_tuple)
    return F.coalesce(*values_of_types)


def _any_of(conditions: Sequence[Column]) -> Column:
    return reduce(Column.__or__, conditions)
