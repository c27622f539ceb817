"""One raw column of one type to what it means: an id, a number or an instant.

Every function takes a column and its Spark type and gives null for what it cannot read; a type that
cannot mean it at all gives None. Spark 4 casts strictly: a plain cast of one bad row fails the
night, so text is cast by `try_cast` only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    DateType,
    DecimalType,
    FloatType,
    FractionalType,
    MapType,
    NullType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from recspark.sources.spelling import BLANKS, Spelling

NESTED = (ArrayType, MapType, StructType, BinaryType)

_PLAIN_NUMBER = r"^[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?$"
_NOT_FINITE = r"(?i)^(?:nan|[+-]?inf(?:inity)?)$"
# What nearly every time looks like; Spark reads it as it is.
_COMMON = r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,6})?Z?$"
# Date and time of day at the start of a text, and what may come after them: the distance from UTC,
# the name of a zone. Names without a slash are refused: Java takes BST for the time of Dhaka.
_LOCAL = (
    r"^(\d{4}-\d{1,2}-\d{1,2}(?:(?:[Tt]|\s+)\d{1,2}(?::\d{1,2}(?::\d{1,2}(?:[.,]\d{0,6})?)?)?)?)\d*"
)
_OFFSET = r"[+-](?:(?:0\d|1[0-8])(?:[0-5]\d){0,2}|(?:0?\d|1[0-8])(?::[0-5]\d){0,2})"
_REGION = r"(?:[A-Z][A-Za-z_]+(?:/[A-Za-z0-9_+-]+)+|UTC|GMT)"
_SUFFIX = (
    rf"^\s*(?:(Z|z|(?:UTC|GMT)?{_OFFSET}|UTC|GMT)(?:\s*\[{_REGION}\])?"
    rf"|\[({_REGION})\]|(?<=\s)({_REGION}))$"
)
_WALL = "yyyy-MM-dd HH:mm:ss.SSSSSS"


def trimmed(text: Column) -> Column:
    """Return `text` without blanks at its ends, all of Unicode's and those without width; null
    where nothing is left.
    """
    return F.nullif(F.btrim(text, F.lit(BLANKS)), F.lit(""))


def printed(column: Column, kind: DataType) -> Column | None:
    """Return a value as the text that stands for it in any type: 13085.0 of a float or decimal is
    "13085", and what is no number is null.
    """
    if isinstance(kind, NESTED):
        return None
    if isinstance(kind, StringType):
        return trimmed(column)
    text = column.cast("string")
    if isinstance(kind, DecimalType):
        return F.regexp_replace(text, r"[.]?0+$", "") if kind.scale else text
    if isinstance(kind, FractionalType):
        number = column.cast("double")
        size = F.abs(number)
        whole = F.when(number == F.rint(number), number)
        return (
            F.when(F.isnan(number) | (size == float("inf")), None)
            .when(whole.isNotNull() & (size < 2.0**63), whole.cast("bigint").cast("string"))
            .otherwise(text)
        )
    return text


def identity(column: Column, kind: DataType, name: str, spelling: Spelling) -> Column | None:
    """Return a value of the raw column `name` as an id; null where it stands for none."""
    if not isinstance(kind, StringType):
        text = printed(column, kind)
        return text if text is None else F.when(~_means_nothing(text, name, spelling), text)
    text = F.btrim(column, F.lit(BLANKS))
    if name in spelling.whole_numbers:
        text = _whole(text)
    nothing = F.lower(text).isin("", *sorted({null.lower() for null in spelling.null_ids}))
    return F.when(~(nothing | _means_nothing(text, name, spelling)), text)


def _whole(text: Column) -> Column:
    """Return the text of a whole number that was a float once, 13085.0 or 1.2345678E7, without it."""
    exact = text.try_cast("decimal(38,6)")
    is_exact = text.rlike(r"^\d(?:[.]\d+)?[eE][+]?\d+$") & (exact == F.floor(exact))
    return F.when(is_exact, F.floor(exact).cast("string")).otherwise(
        F.regexp_replace(text, r"^([+-]?\d+)[.]0+$", "$1")
    )


def number(
    column: Column, kind: DataType, name: str, spelling: Spelling
) -> tuple[Column, Column] | None:
    """Return (double, whether something was given).

    NaN and infinity pass, as text too. The float 9.95 of four bytes means 9.95, not the double next
    to it.
    """
    if isinstance(kind, NullType):
        return column.cast("double"), F.lit(False)
    if isinstance(kind, NumericType):
        value = column.cast("string") if isinstance(kind, FloatType) else column
        value, text, given = value.cast("double"), printed(column, kind), column.isNotNull()
    elif isinstance(kind, StringType):
        text = F.btrim(column, F.lit(BLANKS))
        value, given = _number_of_text(text, spelling), text != ""
    else:
        return None
    if name not in spelling.null_values:
        return value, given
    assert text is not None
    numbers = [n for n in map(_as_number, spelling.null_values[name]) if n is not None]
    nothing = _means_nothing(text, name, spelling) | F.coalesce(value.isin(numbers), F.lit(False))
    return F.when(~nothing, value), given & ~nothing


def moment(
    column: Column, kind: DataType, name: str, zone: str, spelling: Spelling
) -> tuple[Column, Column, Column] | None:
    """Return (instant, whether something was given, whether it is a number too small for a time).

    What carries no zone is wall-clock time in `zone`. An hour that a zone leaves out in spring is
    read as the hour after it, one that comes twice in autumn as its first.
    """
    never = F.lit(False)
    if isinstance(kind, NullType):
        return column.cast("timestamp"), never, never
    if isinstance(kind, NumericType):
        text, count = printed(column, kind), column.cast("double")
        value, early = _of_number(count, zone, spelling), _is_count(count)
        given = column.isNotNull()
    elif isinstance(kind, StringType):
        text = F.btrim(column, F.lit(BLANKS))
        common = column.try_cast("timestamp")
        at = F.when(column.endswith("Z"), common).otherwise(_to_utc(common, zone))
        value = F.when(column.rlike(_COMMON), at).when(
            column.isNotNull(), _once(text, lambda text: _of_any_text(text, zone, spelling))
        )
        early = text.rlike(_PLAIN_NUMBER) & _is_count(text.try_cast("double"))
        given = text != ""
    elif isinstance(kind, TimestampType | TimestampNTZType | DateType):
        text = column.cast("string")
        value = column.cast("timestamp")
        if not isinstance(kind, TimestampType):
            value = _to_utc(value, zone)
        given, early = column.isNotNull(), never
    else:
        return None
    if name in spelling.null_values:
        assert text is not None
        nothing = _means_nothing(text, name, spelling)
        return F.when(~nothing, value), given & ~nothing, early
    return value, given, early


def _once(value: Column, use: Callable[[Column], Column]) -> Column:
    """Return `use(value)`, where `value` is computed once however often it is used."""
    return F.transform(F.array(value), use)[0]


def _means_nothing(text: Column, name: str, spelling: Spelling) -> Column:
    texts = spelling.null_values.get(name, ())
    return F.coalesce(text.isin(*texts), F.lit(False)) if texts else F.lit(False)


def _number_of_text(text: Column, spelling: Spelling) -> Column:
    if spelling.is_plain:
        plain, is_number = text, text.rlike(_PLAIN_NUMBER)
    else:
        is_number = text.rlike(rf"^{spelling.number_pattern()}$")
        bare = F.regexp_replace(text, spelling.decoration_pattern(), "")
        plain = bare if spelling.decimal == "." else F.translate(bare, spelling.decimal, ".")
    # Spark also takes "1d" and "5f" for numbers.
    return F.when(is_number | text.rlike(_NOT_FINITE), plain.try_cast("double"))


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _of_any_text(text: Column, zone: str, spelling: Spelling) -> Column:
    return F.when(F.substring(text, 5, 1) == "-", _of_iso(text, zone)).when(
        text.rlike(_PLAIN_NUMBER),
        _once(text.try_cast("double"), lambda number: _of_number(number, zone, spelling)),
    )


def _of_iso(text: Column, zone: str) -> Column:
    """Return the instant of an ISO text: what decides that it says a zone is what reads the zone."""
    clock = F.regexp_replace(F.regexp_extract(text, _LOCAL, 1), r"[Tt]|\s+", " ")
    wall = F.translate(clock, ",", ".").try_cast("timestamp")
    return _once(
        F.struct(wall.alias("wall"), F.regexp_replace(text, _LOCAL, "").alias("suffix")),
        lambda read: _in_zone(read["wall"], read["suffix"], zone),
    )


def _in_zone(wall: Column, suffix: Column, zone: str) -> Column:
    """Return the instant of a wall-clock time with what comes after it in a text."""
    said = F.regexp_replace(F.regexp_replace(suffix, _SUFFIX, "$1$2$3"), "^z$", "Z")
    # Spark reads every form of a distance and of a name, after a time of day with all its parts.
    full = F.concat_ws(" ", F.date_format(wall, _WALL), said)
    return F.when(suffix == "", _to_utc(wall, zone)).when(
        wall.isNotNull() & suffix.rlike(_SUFFIX), full.try_cast("timestamp")
    )


def _of_number(number: Column, zone: str, spelling: Spelling) -> Column:
    """Return the instant of a date of 8, 12 or 14 digits, or of a count since 1970; null where it
    would lie before `spelling.earliest`.
    """
    digits = F.rpad(number.try_cast("bigint").cast("string"), 14, "0")
    day = F.regexp_replace(digits, r"^(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)$", "$1-$2-$3 $4:$5:$6")
    size = F.abs(number)
    micros = F.when(size < 1e11, number * 1e6).when(size < 1e14, number * 1e3).otherwise(number)
    earliest = datetime.combine(spelling.earliest, time(), UTC)
    least = int(earliest.timestamp()) * 1_000_000
    since = F.timestamp_micros(
        F.nullif(F.greatest(F.rint(micros).try_cast("bigint"), F.lit(least - 1)), F.lit(least - 1))
    )
    return F.when(_is_date(number), _to_utc(day.try_cast("timestamp"), zone)).otherwise(since)


def _is_date(number: Column) -> Column:
    """Return whether a number has the digits of a date of the years 1900 to 2199."""
    return (number == F.rint(number)) & (
        number.between(19000101, 21991231)
        | number.between(190001010000, 219912312359)
        | number.between(19000101000000, 21991231235959)
    )


def _is_count(number: Column) -> Column:
    """Return whether a number counts since 1970, so that it is a time or lies too early."""
    return F.coalesce(~_is_date(number) & (F.abs(number) < 1e18), F.lit(False))


def _to_utc(local: Column, zone: str) -> Column:
    return local if zone == "UTC" else F.to_utc_timestamp(local, zone)
