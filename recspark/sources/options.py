"""Reader options that a source may set (`source.options`): which ones exist, and their checks.

An option applies to the header of a file in the same way as to its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from recspark.errors import SourceError, java_message, suggest

# Options that recspark always sets for CSV. `escape` gives quotes as in RFC 4180. With
# `columnPruning` on, Spark would not notice a row with too few or too many fields. With Spark's own
# limit for `maxColumns`, one row of more than 20,480 fields would make the night fail.
CSV_OPTIONS = {
    "header": "true",
    "escape": '"',
    "columnPruning": "false",
    "maxColumns": str(1 << 20),
}
# The options that a source may set, by file format. Other options of Spark may drop files or rows
# in silence (`ignoreCorruptFiles`, `pathGlobFilter`, `mode`), or have no effect since every column
# is read as text (`dateFormat`).
_TEXT_OPTIONS = ("encoding", "lineSep", "multiLine")
SUPPORTED = {
    "csv": (
        *_TEXT_OPTIONS, "sep", "quote", "escape", "comment", "header", "nullValue", "emptyValue",
        "ignoreLeadingWhiteSpace", "ignoreTrailingWhiteSpace", "maxColumns", "maxCharsPerColumn",
        "charToEscapeQuoteEscaping", "unescapedQuoteHandling",
    ),
    "jsonl": (
        *_TEXT_OPTIONS, "allowComments", "allowUnquotedFieldNames", "allowSingleQuotes",
        "allowNumericLeadingZeros", "allowNonNumericNumbers", "allowUnquotedControlChars",
        "allowBackslashEscapingAnyCharacter",
    ),
    "parquet": ("datetimeRebaseMode", "int96RebaseMode"),
    "delta": ("versionAsOf",),
}  # fmt: skip
# Second name of an option, in lower case -> the name in `SUPPORTED`.
_SECOND_NAMES = {"delimiter": "sep", "charset": "encoding"}
# Characters that an encoding must spell with the same bytes as ASCII.
_ASCII_SAMPLE = "\n\r,:;|\t\"'{}[]09azAZ"


def reader_options(
    source: str, file_format: str, source_options: Mapping[str, str]
) -> dict[str, str]:
    """Return the options that apply to files of `file_format`, under their names in `SUPPORTED`.

    Spark accepts an option's name in upper or lower case, and some options under a second name. The
    events and the catalogue of a source share `source_options`; an option that is only for another
    format is left out. Raises SourceError for a name that no format has, and for an option that is
    set twice.
    """
    name_by_lower_case = {name.lower(): name for names in SUPPORTED.values() for name in names}
    name_by_lower_case |= _SECOND_NAMES
    spelling_by_option: dict[str, str] = {}
    options: dict[str, str] = {}
    for name, value in source_options.items():
        option = name_by_lower_case.get(name.lower())
        if option is None:
            raise SourceError(
                f"source '{source}': source.options.{name} is not supported."
                f"{suggest(name, {*name_by_lower_case.values()})} Nothing was written"
            )
        if option in spelling_by_option:
            raise SourceError(
                f"source '{source}': source.options.{spelling_by_option[option]} and "
                f"source.options.{name} say the same thing twice; keep one of them"
            )
        spelling_by_option[option] = name
        if option in SUPPORTED[file_format]:
            options[option] = value
    return options


def check_text_options(
    spark: SparkSession, source: str, file_format: str, options: Mapping[str, str]
) -> None:
    """Raise SourceError where Spark does not know the encoding, or rejects the value of an option.

    The encoding must spell ASCII characters with the bytes of ASCII (UTF-16 does not), because
    otherwise the ends of lines cannot be found. With `multiLine`, any encoding is fine. Cost: some
    calls of the driver's JVM, no job.
    """
    charset = options.get("encoding", "UTF-8")
    charsets = _jvm(spark).java.nio.charset.Charset
    try:
        java_charset = charsets.forName(charset)
    except (PySparkException, Py4JJavaError):
        raise SourceError(
            f"source '{source}': source.options.encoding = '{charset}' is no encoding that Java "
            "knows; name it as IANA does (UTF-8, windows-1252, Shift_JIS)"
        ) from None
    encoded_sample = java_charset.encode(_ASCII_SAMPLE)
    is_like_ascii = (
        bytes(encoded_sample.array())[: encoded_sample.limit()] == _ASCII_SAMPLE.encode()
    )
    if not is_like_ascii and options.get("multiLine", "false").lower() != "true":
        raise SourceError(
            f"source '{source}': source.options.encoding = '{charset}': the end of a line cannot be "
            "found in it; deliver UTF-8, or set source.options.multiLine: true"
        )
    try:
        if file_format == "csv":
            csv_options(spark, options).asParserSettings()
        else:
            # recspark itself decodes the text before Spark parses it as JSON.
            json_options = {name: value for name, value in options.items() if name != "encoding"}
            _jvm(spark).org.apache.spark.sql.catalyst.json.JSONOptionsInRead(
                _scala_map(spark, json_options), "UTC", ""
            )
    except (PySparkException, Py4JJavaError) as error:
        shown_options = ", ".join(f"{name}: {value!r}"[:80] for name, value in options.items())
        raise SourceError(
            f"source '{source}': of source.options {{{shown_options}}} Spark says: "
            f"{java_message(error)}"
        ) from None


def csv_options(spark: SparkSession, options: Mapping[str, str]) -> Any:
    """Return Spark's `CSVOptions` (a JVM object) for `options` on top of `CSV_OPTIONS`.

    An option with a bad value raises an error of Spark.
    """
    return _jvm(spark).org.apache.spark.sql.catalyst.csv.CSVOptions(
        _scala_map(spark, {**CSV_OPTIONS, **options}), True, "UTC"
    )


def _jvm(spark: SparkSession) -> Any:
    return spark.sparkContext._jvm


def _scala_map(spark: SparkSession, options: Mapping[str, str]) -> Any:
    java_map = _jvm(spark).java.util.HashMap()
    for name, value in options.items():
        java_map.put(name, value)
    return _jvm(spark).org.apache.spark.api.python.PythonUtils.toScalaMap(java_map)
