"""Raw rows as they are: CSV, JSON lines, Parquet or Delta, with the columns that a source names."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, DataFrameReader, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    DataType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from recspark import schema, storage
from recspark.errors import SourceError, java_message, shortened, suggest
from recspark.sources.files import (
    BOM,
    DELTA_LOG,
    HEAD_BYTES,
    Place,
    delta_version,
    head,
    head_lines,
    parquet_footer,
)
from recspark.sources.options import (
    CSV_OPTIONS,
    check_text_options,
    csv_options,
    reader_options,
)

log = logging.getLogger(__name__)

UNREADABLE = "_unreadable"
LINE = "_line"
# Of a file of JSON lines, so many are looked at on the driver.
_LOOKED_AT = 1000
_BLANKS = r"[ \t\r\n\ufeff]"
_BLANK = bytes(range(33))


@dataclass(frozen=True)
class RawTable:
    """Raw rows: the named columns as `r0`, `r1`, … and the text of a row that could not be read.

    Parameters
    ----------
    source : name of the source, for messages
    frame : columns `r0` … in the order of `kinds`, then `_unreadable` string (null = the row is
        fine)
    kinds : raw column -> its type; every column is text in CSV and JSON lines, but for those that
        JSON gives as lists
    is_text : whether the rows come from text, which may be wrongly encoded
    """

    source: str
    frame: DataFrame
    kinds: Mapping[str, DataType]
    is_text: bool

    def column(self, name: str) -> Column:
        """Return the raw column `name`."""
        return F.col(f"r{list(self.kinds).index(name)}")

    def text(self, name: str) -> Column:
        """Return the raw column `name` as one text, whose parts are joined where it is a list."""
        column = self.column(name)
        return F.array_join(column, " ") if isinstance(self.kinds[name], ArrayType) else column

    def unreadable(self) -> Column:
        """Return whether a row had the wrong number of fields, or was no JSON object."""
        return F.col(UNREADABLE).isNotNull()

    def row(self) -> Column:
        """Return the raw row as JSON, nulls left out; not cheap, so only ask for rows that need
        it.
        """
        named = [self.column(name).alias(name) for name in self.kinds]
        return F.to_json(F.struct(*named, F.col(UNREADABLE)))


@dataclass(frozen=True)
class _Part:
    """Files that share their columns, as one frame; `physical` maps raw name to column."""

    frame: DataFrame
    physical: Mapping[str, str]
    first_file: str


def read_raw(
    spark: SparkSession,
    place: Place,
    kind: str,
    named: Sequence[str],
    *,
    options: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
    lists: Mapping[str, str] | None = None,
) -> RawTable | None:
    """Return the columns `named` of every row at `place`; None where no file holds a row.

    Parameters
    ----------
    kind : `csv`, `jsonl`, `parquet` or `delta`
    options : reader options, as Spark's, of those in `options.SUPPORTED`; they win over recspark's
        own
    header : names of the fields of a CSV file that has no header line
    lists : raw columns that may hold lists, and what is between the parts of one that is text

    Files may differ in the order of their columns and in columns that are not named; where they
    differ in the type of a named one, that column is read as text. A line of JSON that is not one
    object (or a list of objects) and nothing else is unreadable, and so is one with an object, or a
    list that is not in `lists`, in a named column. Raises SourceError that lists the missing
    columns, with the nearest name that is there, or names the file or option that cannot be used.
    Cost: lazy; the driver reads one header or footer per file; for JSON lines one job more where
    the first MB of no file shows a named column.
    """
    named = list(dict.fromkeys(named))
    given = reader_options(place.source, kind, options or {})
    if kind != "delta" and delta_version(place) is not None:
        raise SourceError(
            f"source '{place.source}': {place.root} is a Delta table (it has a {DELTA_LOG}), but is "
            f"read as {kind}; say format: delta"
        )
    with named_errors(place, kind):
        if kind in ("csv", "jsonl"):
            check_text_options(spark, place.source, kind, given)
        if kind == "csv":
            parts = _csv_parts(spark, place, given, header, named)
        elif kind == "jsonl":
            parts = _jsonl_parts(spark, place, given, named, lists or {})
        elif kind == "parquet":
            parts = _parquet_parts(spark, place, given)
        else:
            parts = _delta_parts(spark, place, given)
        for part in parts:
            _check_names(place, part, named)
        return _as_table(place, parts, named, kind in ("csv", "jsonl")) if parts else None


@contextmanager
def named_errors(place: Place, kind: str) -> Iterator[None]:
    """Raise a SourceError that names `place` for what Spark raises within the block."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        raise SourceError(
            f"source '{place.source}': {place.root} cannot be read as {kind}: {java_message(error)}"
        ) from None


def read_files(reader: DataFrameReader, place: Place, kind: str, files: Sequence[str]) -> DataFrame:
    """Return `files` of `place` as one frame, folder names as columns.

    Raises SourceError where Spark would read other files than these.
    """
    if not place.is_file:
        reader = reader.option("basePath", place.root)
    frame = reader.format(kind).load([storage.for_spark(uri) for uri in files])
    planned = Counter(_path(unquote(uri)) for uri in frame.inputFiles())
    left_out = sorted(Counter(map(_path, files)) - planned)
    if left_out or planned.total() != len(files):
        raise SourceError(
            f"source '{place.source}': of {len(files)} files Spark reads {planned.total()}, without "
            f"{left_out[:5]}; nothing was written. Rename them: a name may not start with '_' or '.', "
            "or end in '._COPYING_'"
        )
    return frame


def _path(uri: str) -> str:
    return re.sub(r"^\w+:/*", "/", uri)


def _csv_parts(
    spark: SparkSession,
    place: Place,
    given: Mapping[str, str],
    header: Sequence[str] | None,
    named: Sequence[str],
) -> list[_Part]:
    options = {**CSV_OPTIONS, **given}
    has_header = options["header"].lower() == "true"
    files_of: dict[tuple[str, ...], list[str]] = {}
    for uri in place.files:
        fields = csv_header(spark, place.source, uri, options)
        if header is not None and fields:
            fields = list(header)
        elif not has_header:
            fields = [f"_c{i}" for i in range(len(fields))]
        if fields:
            files_of.setdefault(tuple(fields), []).append(uri)
    parts = []
    for names, files in files_of.items():
        occurs = Counter(names)
        for name in named:
            if occurs[name] > 1:
                raise SourceError(
                    f"source '{place.source}': column '{name}' occurs {occurs[name]} times in "
                    f"{files[0]}; keep one of them"
                )
        # By position: Spark takes names for equal that differ in case only.
        columns = [f"c{i}" for i in range(len(names))]
        texts = StructType([StructField(name, StringType()) for name in [*columns, UNREADABLE]])
        reader = spark.read.schema(texts).options(**options)
        reader = reader.options(mode="PERMISSIVE", columnNameOfCorruptRecord=UNREADABLE)
        frame = read_files(reader, place, "csv", files)
        physical = {name: name for name in place.folder_columns} | dict(zip(names, columns))
        parts.append(_Part(frame, physical, files[0]))
    return parts


def csv_header(spark: SparkSession, source: str, uri: str, options: Mapping[str, str]) -> list[str]:
    """Return the fields of the first line of a CSV file that is neither blank nor a comment; [] for
    a file without content.

    Spark's own parser reads them, so every option counts for the header as for the rows. Raises
    SourceError where the first MB has no such line. Cost: reads at most 1 MB; no job.
    """
    content = head(uri)
    if not content.removeprefix(BOM):
        return []
    jvm: Any = spark.sparkContext._jvm
    try:
        settings = csv_options(spark, options)
        charset = settings.charset()
        parser = jvm.com.univocity.parsers.csv.CsvParser(settings.asParserSettings())
        if settings.multiLine():
            parser.beginParsing(jvm.java.io.ByteArrayInputStream(content), charset)
            fields = parser.parseNext()
        else:
            line = _first_line(spark, content, settings, options.get("lineSep"))
            fields = None if line is None else parser.parseLine(line)
    except (PySparkException, Py4JJavaError) as error:
        raise SourceError(
            f"source '{source}': the header of {uri} cannot be read: {java_message(error)}"
        ) from None
    if fields is None:
        raise SourceError(
            f"source '{source}': {uri} has no header: every line of its first MB is blank or a "
            "comment, or the first one is longer; nothing was written. Deliver it again, or an empty "
            "file where that day had no rows"
        )
    return ["" if field is None else field for field in fields]


def _first_line(spark: SparkSession, content: bytes, settings: Any, end: str | None) -> str | None:
    """Return the line that Spark takes for the header; `settings` are the JVM's `CSVOptions`."""
    jvm: Any = spark.sparkContext._jvm
    charset = settings.charset()
    ends = None
    if end:
        encoded = jvm.java.nio.charset.Charset.forName(charset).encode(end)
        ends = bytes(encoded.array())[: encoded.limit()]
    for line in head_lines(content, ends):
        if line.strip(_BLANK):
            text = jvm.java.util.ArrayList()
            text.add(jvm.java.lang.String(line, charset))
            lines = jvm.scala.jdk.javaapi.CollectionConverters.asScala(text.iterator())
            found = jvm.org.apache.spark.sql.catalyst.csv.CSVExprUtils.extractHeader(
                lines, settings
            )
            if not found.isEmpty():
                return str(found.get())
    return None


def _jsonl_parts(
    spark: SparkSession,
    place: Place,
    given: Mapping[str, str],
    named: Sequence[str],
    lists: Mapping[str, str],
) -> list[_Part]:
    files = place.files
    if not files:
        return []
    there = {*place.folder_columns}
    is_whole_text = given.get("multiLine", "false").lower() == "true"
    keys, shapes = _looked_at(spark, files, given, lists)
    for name in named:
        if name not in there and (wrong := shapes.get(name)):
            raise SourceError(
                f"source '{place.source}': column '{name}' is {wrong}, expected "
                f"{'a list of texts' if name in lists else 'a text or a number'}; nothing was written. "
                "Mend the delivery, or name another column"
            )
    there |= keys
    reader = spark.read.schema(f"{LINE} string").options(wholetext=is_whole_text)
    if "lineSep" in given and not is_whole_text:
        reader = reader.options(lineSep=given["lineSep"])
    texts = read_files(reader, place, "text", files)
    charset = given.get("encoding", "UTF-8")
    if charset.upper() not in ("UTF-8", "UTF8"):
        texts = texts.withColumn(LINE, F.decode(F.col(LINE).cast("binary"), charset))
    if is_whole_text and not there.issuperset(named):
        there |= {*read_files(spark.read.options(**given), place, "json", files).columns}
    elif not there.issuperset(named):
        # A column that few rows have may come late: look at every line before saying no.
        keys_of = F.explode(F.json_object_keys(LINE)).alias("key")
        there |= {row["key"] for row in texts.select(keys_of).distinct().collect()}
    # Not one readable object: every row is quarantined, and there is no schema to complain of.
    known = [name for name in named if name in there] if there - place.folder_columns else named
    return [_json_part(place, texts, given, known, lists, {*there, *known}, files[0])]


def _json_part(
    place: Place,
    texts: DataFrame,
    given: Mapping[str, str],
    known: Sequence[str],
    lists: Mapping[str, str],
    there: Iterable[str],
    first_file: str,
) -> _Part:
    """Return one row for each object of `texts`, and for each text that is no object or list of
    objects.

    Spark reads the first value of a text and leaves the rest. So a text is read between brackets:
    `[[{…}],[]]` ends in an empty list only where nothing else was in it.
    """
    inside = [name for name in known if name not in place.folder_columns]
    record = StructType([StructField(name, StringType()) for name in inside])
    line = F.col(LINE)
    # Of each text of several that were put together, its mark is left out.
    text = F.when(F.startswith(line, F.lit("\ufeff")), F.substring(line, 2, 1 << 30)).otherwise(
        line
    )
    is_list = line.rlike(rf"^{_BLANKS}*\[")
    bracketed = F.concat(
        F.when(is_list, "[").otherwise("[["), text, F.when(is_list, "\n,[]]").otherwise("\n],[]]")
    )
    parsed = F.from_json(
        bracketed,
        ArrayType(ArrayType(record)),
        {name: value for name, value in given.items() if name.startswith("allow")},
    )
    folders = [quoted(name) for name in sorted(place.folder_columns)]
    read = texts.where(~line.rlike(rf"^{_BLANKS}*$")).select(
        *folders, LINE, parsed.alias("_parsed"), is_list.alias("_is_list")
    )
    records, end = F.get("_parsed", F.lit(0)), F.get("_parsed", F.lit(1))
    is_fine = (
        (F.size("_parsed") == 2)
        & (F.size(end) == 0)
        & (F.col("_is_list") | (F.size(records) == 1))
        & F.is_valid_utf8(LINE)
    )
    nothing = F.array(F.lit(None).cast(record))
    rows = read.select(*folders, LINE, F.explode(F.when(is_fine, records).otherwise(nothing)))
    wrong, columns = F.col("col").isNull(), []
    for i, name in enumerate(inside):
        value = F.col("col").getField(name)
        is_nested = _opens(value, name)
        if name in lists:
            items = F.from_json(value, schema.STRINGS)
            wrong |= is_nested & (
                items.isNull() | F.exists(items, lambda item: F.startswith(item, F.lit("{")))
            )
            value = F.when(is_nested, items).otherwise(split_text(value, lists[name]))
        else:
            wrong |= is_nested
        columns.append(value.alias(f"c{i}"))
    frame = rows.select(
        *folders, *columns, F.when(F.coalesce(wrong, F.lit(False)), F.col(LINE)).alias(UNREADABLE)
    )
    physical = {name: name for name in there} | {name: f"c{i}" for i, name in enumerate(inside)}
    return _Part(frame, physical, first_file)


def _opens(value: Column, name: str) -> Column:
    """Return whether `value`, the text of column `name`, is a list or an object in the line it is
    of: a text may start with a bracket too.
    """
    key = json.dumps(name, ensure_ascii=False).replace("\\E", "\\E\\\\E\\Q")
    opens = F.startswith(value, F.lit("{")) | F.startswith(value, F.lit("["))
    return F.coalesce(opens & F.col(LINE).rlike(rf"\Q{key}\E\s*:\s*[\[{{]"), F.lit(False))


def _looked_at(
    spark: SparkSession, files: Sequence[str], given: Mapping[str, str], lists: Mapping[str, str]
) -> tuple[set[str], dict[str, str]]:
    """Return the keys in the first lines of each file, and what is wrong with the values of those
    that never hold what a column may: `an object in <file>` or `a list in <file>`.
    """
    keys: set[str] = set()
    fine: set[str] = set()
    wrong: dict[str, str] = {}
    ends = given["lineSep"].encode() if "lineSep" in given else None
    for uri in files:
        content = head(uri)
        texts = head_lines(content, ends)[:_LOOKED_AT]
        if given.get("multiLine", "false").lower() == "true":
            texts = [content] if len(content) < HEAD_BYTES else []
        for text in _decoded(spark, texts, given.get("encoding", "UTF-8")):
            for record in _objects(text):
                keys.update(record)
                for name, value in record.items():
                    is_list = name in lists and isinstance(value, list)
                    if any(isinstance(v, dict | list) for v in (value if is_list else [value])):
                        what = "a list" if isinstance(value, list) else "an object"
                        wrong[name] = f"{what} in {uri}"
                    elif value is not None:
                        fine.add(name)
    return keys, {name: what for name, what in wrong.items() if name not in fine}


def _decoded(spark: SparkSession, texts: Iterable[bytes], charset: str) -> Iterator[str]:
    jvm: Any = spark.sparkContext._jvm
    for text in texts:
        if text.isascii() or charset.upper() in ("UTF-8", "UTF8"):
            yield text.decode("utf-8", errors="replace").removeprefix("\ufeff")
        else:
            yield jvm.java.lang.String(text, charset)


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the object in a JSON text, or those in a list; none where it cannot be read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [
        item for item in (found if isinstance(found, list) else [found]) if isinstance(item, dict)
    ]


def _parquet_parts(spark: SparkSession, place: Place, given: Mapping[str, str]) -> list[_Part]:
    files_of: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for uri in place.files:
        footer, n_rows = parquet_footer(uri)
        if n_rows:
            signature = tuple((field.name, str(field.type)) for field in footer)
            files_of.setdefault(signature, []).append(uri)
    parts = []
    for files in files_of.values():
        frame = read_files(spark.read.options(**given), place, "parquet", files)
        parts.append(_Part(frame, {name: name for name in frame.columns}, files[0]))
    return parts


def _delta_parts(spark: SparkSession, place: Place, given: Mapping[str, str]) -> list[_Part]:
    if not place.entries:
        return []
    # The version that the landing's digest is of, not whatever is newest once rows are read.
    version = delta_version(place)
    if version is None:
        raise SourceError(
            f"source '{place.source}': {place.root} is no Delta table (it has no _delta_log); "
            "is source.format right?"
        )
    options = {"versionAsOf": str(version), **given}
    frame = spark.read.format("delta").options(**options).load(place.root)
    frame.inputFiles()  # reads the log now, where an error of it has a name; Spark keeps it
    return [_Part(frame, {name: name for name in frame.columns}, place.root)]


def _check_names(place: Place, part: _Part, named: Sequence[str]) -> None:
    missing = [name for name in named if name not in part.physical]
    if missing:
        told = " ".join(f"'{name}'.{suggest(name, part.physical)}" for name in missing[:10])
        count = "a column" if len(missing) == 1 else f"{len(missing)} columns"
        raise SourceError(
            f"source '{place.source}': {part.first_file} lacks {count}: {told} Nothing was written; "
            "mend the delivery, or name the new column in the source's settings"
        )
    unused = sorted(set(part.physical) - set(named))
    if unused:
        shown = shortened(unused)
        log.info("source=%s file=%s columns_not_used=%s", place.source, part.first_file, shown)


def _as_table(
    place: Place, parts: Sequence[_Part], named: Sequence[str], is_text: bool
) -> RawTable:
    kinds = [[part.frame.schema[part.physical[name]].dataType for name in named] for part in parts]
    merged = [types[0] if len(set(types)) == 1 else StringType() for types in zip(*kinds)]
    frames = []
    for part, types in zip(parts, kinds):
        columns = []
        for i, (name, kind, wanted) in enumerate(zip(named, types, merged)):
            raw = quoted(part.physical[name])
            columns.append((raw if kind == wanted else _as_text(raw, kind)).alias(f"r{i}"))
        unreadable = F.col(UNREADABLE) if is_text else F.lit(None).cast("string").alias(UNREADABLE)
        frames.append(part.frame.select(*columns, unreadable))
    frame = reduce(DataFrame.union, frames)
    return RawTable(place.source, frame, dict(zip(named, merged)), is_text)


def split_text(text: Column, separator: str) -> Column:
    """Return the parts of `text` between separators, trimmed, without the blank ones."""
    parts = F.split(F.trim(text), r"\s*\Q" + separator + r"\E\s*")
    return F.filter(parts, lambda part: part != "")


def quoted(name: str) -> Column:
    """Return the column `name`, whatever characters it has."""
    return F.col("`" + name.replace("`", "``") + "`")


def _as_text(column: Column, kind: DataType) -> Column:
    """Return `column` as text; an instant says its zone, so that it is not read as local time."""
    if isinstance(kind, TimestampType):
        return F.date_format(column, "yyyy-MM-dd HH:mm:ss.SSSSSS'Z'")
    return column.cast("string")
