"""Reads one raw column of one Spark type as an id, a number or an instant.

Each public function takes a column and its type. The result is null in a row whose value cannot be
read. The function returns None where no value of the type could be read (a struct as a number).

Spark 4 casts strictly: a plain cast of one bad row would make the night fail. So text is cast with
`try_cast` only.
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

# A number as programs spell it: 12, -12.5, .5, 1.25E7.
_PLAIN_NUMBER = r"^[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?$"
_NOT_FINITE = r"(?i)^(?:nan|[+-]?inf(?:inity)?)$"
# The form of nearly every time as text. Spark's own cast reads this form.
_COMMON_TIME = r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,6})?Z?$"
# ISO text begins with a date and a time of day (`_LOCAL_TIME`). A suffix (`_ZONE_SUFFIX`) may
# follow: an offset from UTC, the name of a time zone, or both. Names without a slash are refused,
# apart from UTC and GMT: Java takes BST for the time of Dhaka.
_LOCAL_TIME = (
    r"^(\d{4}-\d{1,2}-\d{1,2}(?:(?:[Tt]|\s+)\d{1,2}(?::\d{1,2}(?::\d{1,2}(?:[.,]\d{0,6})?)?)?)?)\d*"
)
_UTC_OFFSET = r"[+-](?:(?:0\d|1[0-8])(?:[0-5]\d){0,2}|(?:0?\d|1[0-8])(?::[0-5]\d){0,2})"
_ZONE_NAME = r"(?:[A-Z][A-Za-z_]+(?:/[A-Za-z0-9_+-]+)+|UTC|GMT)"
_ZONE_SUFFIX = (
    rf"^\s*(?:(Z|z|(?:UTC|GMT)?{_UTC_OFFSET}|UTC|GMT)(?:\s*\[{_ZONE_NAME}\])?"
    rf"|\[({_ZONE_NAME})\]|(?<=\s)({_ZONE_NAME}))$"
)
_WALL_CLOCK_FORMAT = "yyyy-MM-dd HH:mm:ss.SSSSSS"


def trimmed(text: Column) -> Column:
    """Return `text` without the characters of `BLANKS` at its ends; null where nothing remains."""
    return F.nullif(F.btrim(text, F.lit(BLANKS)), F.lit(""))


def printed(column: Column, data_type: DataType) -> Column | None:
    """Return the value as text, the same text for equal values of any type.

    13085.0 of a float or decimal is "13085". NaN and infinity are null, and so is blank text. Text
    is trimmed but otherwise unchanged. Lists, maps, structs and binary values give None.
    """
    if isinstance(data_type, NESTED):
        return None
    if isinstance(data_type, StringType):
        return trimmed(column)
    text = column.cast("string")
    if isinstance(data_type, DecimalType):
        return F.regexp_replace(text, r"[.]?0+$", "") if data_type.scale else text
    if isinstance(data_type, FractionalType):
        number = column.cast("double")
        magnitude = F.abs(number)
        whole_number = F.when(number == F.rint(number), number)
        return (
            F.when(F.isnan(number) | (magnitude == float("inf")), None)
            .when(
                whole_number.isNotNull() & (magnitude < 2.0**63),
                whole_number.cast("bigint").cast("string"),
            )
            .otherwise(text)
        )
    return text


def identity(column: Column, data_type: DataType, name: str, spelling: Spelling) -> Column | None:
    """Return the value of the raw column `name` as an id; null where the value means "no id".

    These mean "no id": blank text, and the texts in `spelling.null_ids` (for text columns) and in
    `spelling.null_values`.
    """
    if not isinstance(data_type, StringType):
        text = printed(column, data_type)
        return text if text is None else F.when(~_is_null_value(text, name, spelling), text)
    text = F.btrim(column, F.lit(BLANKS))
    if name in spelling.whole_numbers:
        text = _without_fraction(text)
    is_null_id = F.lower(text).isin("", *sorted({null.lower() for null in spelling.null_ids}))
    return F.when(~(is_null_id | _is_null_value(text, name, spelling)), text)


def _without_fraction(text: Column) -> Column:
    """Return `text`; where `text` is a whole number in the form of a float, return the digits of
    the number: 13085.0 becomes 13085, and 1.2345678E7 becomes 12345678.
    """
    decimal_value = text.try_cast("decimal(38,6)")
    is_whole_exponent_form = text.rlike(r"^\d(?:[.]\d+)?[eE][+]?\d+$") & (
        decimal_value == F.floor(decimal_value)
    )
    return F.when(is_whole_exponent_form, F.floor(decimal_value).cast("string")).otherwise(
        F.regexp_replace(text, r"^([+-]?\d+)[.]0+$", "$1")
    )


def number(
    column: Column, data_type: DataType, name: str, spelling: Spelling
) -> tuple[Column, Column] | None:
    """Return (the number as a double, whether the raw value is present).

    A value that is present but gives a null number could not be read. NaN and infinity are read, as
    text too. A 4-byte float 9.95 gives the double 9.95, not the double next to the float.
    """
    if isinstance(data_type, NullType):
        return column.cast("double"), F.lit(False)
    if isinstance(data_type, NumericType):
        value = column.cast("string") if isinstance(data_type, FloatType) else column
        value, text, is_present = (
            value.cast("double"),
            printed(column, data_type),
            column.isNotNull(),
        )
    elif isinstance(data_type, StringType):
        text = F.btrim(column, F.lit(BLANKS))
        value, is_present = _number_of_text(text, spelling), text != ""
    else:
        return None
    if name not in spelling.null_values:
        return value, is_present
    assert text is not None
    null_numbers = [n for n in map(_parsed_number, spelling.null_values[name]) if n is not None]
    is_null = _is_null_value(text, name, spelling) | F.coalesce(
        value.isin(null_numbers), F.lit(False)
    )
    return F.when(~is_null, value), is_present & ~is_null


def moment(
    column: Column, data_type: DataType, name: str, zone: str, spelling: Spelling
) -> tuple[Column, Column, Column] | None:
    """Return (the instant, whether the raw value is present, whether the value is a count since
    1970).

    A value that is present but gives a null instant could not be read. If that value is a count,
    the reason is that the instant would lie before `spelling.earliest`. A value without a zone is
    wall-clock time in `zone`. An hour that the zone leaves out in spring is read as the hour after
    that one, and an hour that comes twice in autumn as the first of the two.
    """
    always_false = F.lit(False)
    if isinstance(data_type, NullType):
        return column.cast("timestamp"), always_false, always_false
    if isinstance(data_type, NumericType):
        text, number_value = printed(column, data_type), column.cast("double")
        value, is_count = _instant_of_number(number_value, zone, spelling), _is_count(number_value)
        is_present = column.isNotNull()
    elif isinstance(data_type, StringType):
        text = F.btrim(column, F.lit(BLANKS))
        common_time = column.try_cast("timestamp")
        common_instant = F.when(column.endswith("Z"), common_time).otherwise(
            _to_utc(common_time, zone)
        )
        value = F.when(column.rlike(_COMMON_TIME), common_instant).when(
            column.isNotNull(),
            _computed_once(text, lambda text: _instant_of_text(text, zone, spelling)),
        )
        is_count = text.rlike(_PLAIN_NUMBER) & _is_count(text.try_cast("double"))
        is_present = text != ""
    elif isinstance(data_type, TimestampType | TimestampNTZType | DateType):
        text = column.cast("string")
        value = column.cast("timestamp")
        if not isinstance(data_type, TimestampType):
            value = _to_utc(value, zone)
        is_present, is_count = column.isNotNull(), always_false
    else:
        return None
    if name in spelling.null_values:
        assert text is not None
        is_null = _is_null_value(text, name, spelling)
        return F.when(~is_null, value), is_present & ~is_null, is_count
    return value, is_present, is_count


def _computed_once(value: Column, use: Callable[[Column], Column]) -> Column:
    """Return `use(value)`. Spark computes `value` once per row, even where `use` refers to `value`
    several times.
    """
    return F.transform(F.array(value), use)[0]


def _is_null_value(text: Column, name: str, spelling: Spelling) -> Column:
    texts = spelling.null_values.get(name, ())
    return F.coalesce(text.isin(*texts), F.lit(False)) if texts else F.lit(False)


def _number_of_text(text: Column, spelling: Spelling) -> Column:
    if spelling.is_plain:
        plain_text, is_number = text, text.rlike(_PLAIN_NUMBER)
    else:
        is_number = text.rlike(rf"^{spelling.number_pattern()}$")
        bare_text = F.regexp_replace(text, spelling.decoration_pattern(), "")
        plain_text = (
            bare_text if spelling.decimal == "." else F.translate(bare_text, spelling.decimal, ".")
        )
    # Checked by pattern, because Spark's cast also takes "1d" and "5f" for numbers.
    return F.when(is_number | text.rlike(_NOT_FINITE), plain_text.try_cast("double"))


def _parsed_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _instant_of_text(text: Column, zone: str, spelling: Spelling) -> Column:
    return F.when(F.substring(text, 5, 1) == "-", _instant_of_iso_text(text, zone)).when(
        text.rlike(_PLAIN_NUMBER),
        _computed_once(
            text.try_cast("double"), lambda number: _instant_of_number(number, zone, spelling)
        ),
    )


def _instant_of_iso_text(text: Column, zone: str) -> Column:
    """Return the instant of an ISO text; null where the text has another form.

    The text is split once into the local time and the suffix after it. The same suffix decides
    whether the text names a zone, and is read as the zone. For example, "2020-01-31T10:00+02" gives
    the local time 2020-01-31 10:00 and the suffix "+02".
    """
    local_text = F.regexp_replace(F.regexp_extract(text, _LOCAL_TIME, 1), r"[Tt]|\s+", " ")
    wall = F.translate(local_text, ",", ".").try_cast("timestamp")
    return _computed_once(
        F.struct(wall.alias("wall"), F.regexp_replace(text, _LOCAL_TIME, "").alias("suffix")),
        lambda parts: _instant_in_zone(parts["wall"], parts["suffix"], zone),
    )


def _instant_in_zone(wall: Column, suffix: Column, zone: str) -> Column:
    """Return the instant of the wall-clock time `wall` with the text `suffix` after it; null where
    the suffix is neither offset nor zone. With an empty suffix, `wall` is a time in `zone`.
    """
    zone_text = F.regexp_replace(F.regexp_replace(suffix, _ZONE_SUFFIX, "$1$2$3"), "^z$", "Z")
    # Spark reads every form of an offset and of a zone name, but only after a complete time of day.
    full_text = F.concat_ws(" ", F.date_format(wall, _WALL_CLOCK_FORMAT), zone_text)
    return F.when(suffix == "", _to_utc(wall, zone)).when(
        wall.isNotNull() & suffix.rlike(_ZONE_SUFFIX), full_text.try_cast("timestamp")
    )


def _instant_of_number(number: Column, zone: str, spelling: Spelling) -> Column:
    """Return the instant of a number: a date of 8, 12 or 14 digits, or a count since 1970.

    A count below 1e11 is of seconds, below 1e14 of milliseconds, else of microseconds. A count
    before `spelling.earliest` gives null. For example, 20200131 is the start of that day in `zone`,
    and 1580428800 is 2020-01-31 00:00 UTC.
    """
    date_digits = F.rpad(number.try_cast("bigint").cast("string"), 14, "0")
    date_text = F.regexp_replace(
        date_digits, r"^(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)$", "$1-$2-$3 $4:$5:$6"
    )
    magnitude = F.abs(number)
    micros = (
        F.when(magnitude < 1e11, number * 1e6)
        .when(magnitude < 1e14, number * 1e3)
        .otherwise(number)
    )
    earliest = datetime.combine(spelling.earliest, time(), UTC)
    earliest_micros = int(earliest.timestamp()) * 1_000_000
    counted_instant = F.timestamp_micros(
        F.nullif(
            F.greatest(F.rint(micros).try_cast("bigint"), F.lit(earliest_micros - 1)),
            F.lit(earliest_micros - 1),
        )
    )
    return F.when(_is_date(number), _to_utc(date_text.try_cast("timestamp"), zone)).otherwise(
        counted_instant
    )


def _is_date(number: Column) -> Column:
    """Return whether a number has 8, 12 or 14 digits that may be a date in the years 1900 to
    2199.
    """
    return (number == F.rint(number)) & (
        number.between(19000101, 21991231)
        | number.between(190001010000, 219912312359)
        | number.between(19000101000000, 21991231235959)
    )


def _is_count(number: Column) -> Column:
    """Return whether a number is a count since 1970 that is a time or lies too early for one. False
    for a date, for null and for a number of 1e18 or more, which cannot lie too early.
    """
    return F.coalesce(~_is_date(number) & (F.abs(number) < 1e18), F.lit(False))


def _to_utc(local: Column, zone: str) -> Column:
    return local if zone == "UTC" else F.to_utc_timestamp(local, zone)
