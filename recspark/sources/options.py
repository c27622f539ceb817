"""Reader options of a source: a fixed list, each counted for a file's header as for its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from recspark.errors import SourceError, java_message, suggest

# RFC 4180 quotes; without `columnPruning` off, a row of too few or too many fields goes unnoticed;
# and one row of more than 20,480 fields (Spark's limit) would fail the night.
CSV_OPTIONS = {
    "header": "true",
    "escape": '"',
    "columnPruning": "false",
    "maxColumns": str(1 << 20),
}
# What a source may say. What is not here may drop files or rows in silence (`ignoreCorruptFiles`,
# `pathGlobFilter`, `mode`), or does nothing where every column is read as text (`dateFormat`).
_OF_TEXT = ("encoding", "lineSep", "multiLine")
SUPPORTED = {
    "csv": (
        *_OF_TEXT, "sep", "quote", "escape", "comment", "header", "nullValue", "emptyValue",
        "ignoreLeadingWhiteSpace", "ignoreTrailingWhiteSpace", "maxColumns", "maxCharsPerColumn",
        "charToEscapeQuoteEscaping", "unescapedQuoteHandling",
    ),
    "jsonl": (
        *_OF_TEXT, "allowComments", "allowUnquotedFieldNames", "allowSingleQuotes",
        "allowNumericLeadingZeros", "allowNonNumericNumbers", "allowUnquotedControlChars",
        "allowBackslashEscapingAnyCharacter",
    ),
    "parquet": ("datetimeRebaseMode", "int96RebaseMode"),
    "delta": ("versionAsOf",),
}  # fmt: skip
_ALSO_CALLED = {"delimiter": "sep", "charset": "encoding"}
_SAME_AS_ASCII = "\n\r,:;|\t\"'{}[]09azAZ"


def reader_options(source: str, kind: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return those of `given` that a reader of `kind` takes, under the names in `SUPPORTED`.

    Spark takes names in any case, and some under two. Events and catalogue of a source share their
    options, so one that only another kind takes is left out. Raises SourceError for a name that no
    kind takes, and for one that is given twice.
    """
    canonical = {name.lower(): name for names in SUPPORTED.values() for name in names}
    canonical |= _ALSO_CALLED
    spelled: dict[str, str] = {}
    options: dict[str, str] = {}
    for name, value in given.items():
        known = canonical.get(name.lower())
        if known is None:
            raise SourceError(
                f"source '{source}': source.options.{name} is not supported."
                f"{suggest(name, {*canonical.values()})} Nothing was written"
            )
        if known in spelled:
            raise SourceError(
                f"source '{source}': source.options.{spelled[known]} and source.options.{name} say "
                "the same thing twice; keep one of them"
            )
        spelled[known] = name
        if known in SUPPORTED[kind]:
            options[known] = value
    return options


def check_text_options(
    spark: SparkSession, source: str, kind: str, options: Mapping[str, str]
) -> None:
    """Raise SourceError where Spark does not know the encoding, or takes a value for no value.

    An encoding must spell ASCII as ASCII (UTF-16 does not), else lines cannot be told apart, but
    for `multiLine`. Cost: some calls of the driver's JVM, no job.
    """
    charset = options.get("encoding", "UTF-8")
    charsets = _jvm(spark).java.nio.charset.Charset
    try:
        known = charsets.forName(charset)
    except (PySparkException, Py4JJavaError):
        raise SourceError(
            f"source '{source}': source.options.encoding = '{charset}' is no encoding that Java "
            "knows; name it as IANA does (UTF-8, windows-1252, Shift_JIS)"
        ) from None
    sample = known.encode(_SAME_AS_ASCII)
    is_ascii = bytes(sample.array())[: sample.limit()] == _SAME_AS_ASCII.encode()
    if not is_ascii and options.get("multiLine", "false").lower() != "true":
        raise SourceError(
            f"source '{source}': source.options.encoding = '{charset}': the end of a line cannot be "
            "found in it; deliver UTF-8, or set source.options.multiLine: true"
        )
    try:
        if kind == "csv":
            csv_options(spark, options).asParserSettings()
        else:
            # recspark decodes a text before Spark looks for JSON in it.
            others = {name: value for name, value in options.items() if name != "encoding"}
            _jvm(spark).org.apache.spark.sql.catalyst.json.JSONOptionsInRead(
                _scala_map(spark, others), "UTC", ""
            )
    except (PySparkException, Py4JJavaError) as error:
        given = ", ".join(f"{name}: {value!r}"[:80] for name, value in options.items())
        raise SourceError(
            f"source '{source}': of source.options {{{given}}} Spark says: {java_message(error)}"
        ) from None


def csv_options(spark: SparkSession, options: Mapping[str, str]) -> Any:
    """Return the JVM's own reading of CSV options; errors are Spark's."""
    return _jvm(spark).org.apache.spark.sql.catalyst.csv.CSVOptions(
        _scala_map(spark, {**CSV_OPTIONS, **options}), True, "UTC"
    )


def _jvm(spark: SparkSession) -> Any:
    return spark.sparkContext._jvm


def _scala_map(spark: SparkSession, options: Mapping[str, str]) -> Any:
    pairs = _jvm(spark).java.util.HashMap()
    for name, value in options.items():
        pairs.put(name, value)
    return _jvm(spark).org.apache.spark.api.python.PythonUtils.toScalaMap(pairs)
