"""Reads raw rows of CSV, JSON lines, Parquet or Delta unchanged, with all columns of the files."""

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
    MapType,
    NullType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from recspark import schema, storage
from recspark.errors import SourceError, java_message, shortened, suggest
from recspark.sources import values
from recspark.sources.computed import Computed, Staged, compute, staged_column
from recspark.sources.files import (
    BOM,
    DELTA_LOG,
    HEAD_BYTES,
    SourceInput,
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
from recspark.sources.spelling import Spelling

log = logging.getLogger(__name__)

UNREADABLE = "_unreadable"  # the frame column with the text of a row that could not be read
LINE = "_line"  # the frame column with one line, or one text, of a JSON file
_MAX_PARSED_LINES = 1000  # how many lines of each JSON lines file the driver parses
_MAX_OTHER_KEYS = 1000  # how many keys of JSON lines become columns that no setting names
_BLANK_PATTERN = r"[ \t\r\n\ufeff]"
_BLANK_BYTES = bytes(range(33))


@dataclass(frozen=True)
class RawTable:
    """The raw rows of one input, with every column of every file.

    The files are united column by column *and* type by type. Where `user` is an integer in one file
    and a float in another, the frame has one column for the integers and one for the floats, and
    each is null in the rows of the other file. So the function that reads `user` as an id gets each
    value in the type in which it was delivered, not a text that Spark made of the value.

    Parameters
    ----------
    source : name of the source, for messages
    frame : the rows, with the columns `r0`, `r1`, … and `_unreadable` (string). The latter has the
        text of a row that could not be read; null = the row is fine
    types : raw column -> (frame column, its type) for each type that the raw column has. In CSV and
        JSON lines every column is text, apart from the lists of JSON. Computed columns are here
        too, under `Computed.name` and `Computed.unread_name`
    named_types : raw columns that the source names -> the first of their types
    computed : the names in `types` that are no raw columns
    is_text : whether the rows come from text files, whose bytes may be wrongly encoded
    spelling : how numbers and ids are spelt
    """

    source: str
    frame: DataFrame
    types: Mapping[str, Sequence[tuple[str, DataType]]]
    named_types: Mapping[str, DataType]
    computed: frozenset[str]
    is_text: bool
    spelling: Spelling

    def variants(self, name: str) -> list[tuple[Column, DataType]]:
        """Return (column, type) for each type that the raw column `name` has."""
        return [(F.col(column), data_type) for column, data_type in self.types[name]]

    def column(self, name: str) -> Column:
        """Return the raw column `name` in its type; as text where the column has several types."""
        variants = self.variants(name)
        if len(variants) == 1:
            return variants[0][0]
        return F.coalesce(*[_as_text(column, data_type) for column, data_type in variants])

    def unreadable(self) -> Column:
        """Return whether a row had the wrong number of fields, or was no JSON object."""
        return F.col(UNREADABLE).isNotNull()

    def row(self) -> Column:
        """Return the raw row as JSON, including the columns that no setting names. Nulls are left
        out. Cost: high, so compute this only for the rows that keep it.
        """
        raw_columns = [
            self.column(name).alias(name) for name in self.types if name not in self.computed
        ]
        return F.to_json(F.struct(*raw_columns, F.col(UNREADABLE)))


@dataclass(frozen=True)
class _FileGroup:
    """The rows of files that share their columns.

    Parameters
    ----------
    frame : the rows
    column_by_name : raw name -> column of `frame`
    first_file : URI of one of the files, for messages
    """

    frame: DataFrame
    column_by_name: Mapping[str, str]
    first_file: str


def read_raw(
    spark: SparkSession,
    source_input: SourceInput,
    file_format: str,
    named_columns: Sequence[str],
    *,
    options: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
    lists: Mapping[str, str] | None = None,
    spelling: Spelling | None = None,
    computed: Sequence[Computed] = (),
) -> RawTable | None:
    """Return every row at `source_input`; None where no file holds a row.

    Parameters
    ----------
    file_format : `csv`, `jsonl`, `parquet` or `delta`
    named_columns : the raw columns that the source's settings name. Every file must have them; of
        JSON lines, at least one file
    options : reader options of Spark, of those in `options.SUPPORTED`; they replace the options
        that recspark sets itself
    header : names of the fields of a CSV file that has no header line
    lists : raw columns of JSON lines that may hold lists -> the separator between the parts where
        the list is written as one text
    spelling : how numbers and ids are spelt; None = as programs spell them
    computed : columns that SQL computes from the raw ones

    Files may differ in the order and type of their columns, and in the columns that no setting
    names. A line of JSON is unreadable unless it holds just one object or one list of objects. It
    is also unreadable where a named column holds an object, or holds a list and is not in `lists`.

    Raises SourceError. The error lists the missing columns, each with the most similar name that
    exists, or it names the file or option that cannot be used. Cost: lazy. The driver reads one
    header or footer per file. For JSON lines there is one job more, where the first MB of no file
    shows some named column. All columns are read, since a refused row is kept with all of them.
    """
    spelling = spelling or Spelling()
    named_columns = list(dict.fromkeys(named_columns))
    source_options = reader_options(source_input.source, file_format, options or {})
    if file_format != "delta" and delta_version(source_input) is not None:
        raise SourceError(
            f"source '{source_input.source}': {source_input.root} is a Delta table (it has a {DELTA_LOG}), but is "
            f"read as {file_format}; say format: delta"
        )
    with named_errors(source_input, file_format):
        if file_format in ("csv", "jsonl"):
            check_text_options(spark, source_input.source, file_format, source_options)
        if file_format == "csv":
            groups = _csv_groups(spark, source_input, source_options, header, named_columns)
        elif file_format == "jsonl":
            groups = _jsonl_groups(spark, source_input, source_options, named_columns, lists or {})
        elif file_format == "parquet":
            groups = _parquet_groups(spark, source_input, source_options)
        else:
            groups = _delta_groups(spark, source_input, source_options)
        for group in groups:
            _check_names(source_input, group, named_columns)
        if not groups:
            return None
        staged_groups = [_staged(group) for group in groups]
        for computed_column in computed:
            staged_groups = [
                compute(source_input.source, group, computed_column, spelling)
                for group in staged_groups
            ]
        return _as_table(
            source_input,
            staged_groups,
            named_columns,
            computed,
            file_format in ("csv", "jsonl"),
            spelling,
        )


@contextmanager
def named_errors(source_input: SourceInput, file_format: str) -> Iterator[None]:
    """Turn an error of Spark within the block into a SourceError that names `source_input`."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        raise SourceError(
            f"source '{source_input.source}': {source_input.root} cannot be read as {file_format}: "
            f"{java_message(error)}"
        ) from None


def read_files(
    reader: DataFrameReader, source_input: SourceInput, file_format: str, files: Sequence[str]
) -> DataFrame:
    """Return the rows of `files`, which belong to `source_input`. A folder `country=UK` gives the column
    `country`.

    Raises SourceError where Spark would not read exactly these files.
    """
    if not source_input.is_file:
        reader = reader.option("basePath", source_input.root)
    frame = reader.format(file_format).load([storage.for_spark(uri) for uri in files])
    planned_files = Counter(_without_scheme(unquote(uri)) for uri in frame.inputFiles())
    missing_files = sorted(Counter(map(_without_scheme, files)) - planned_files)
    if missing_files or planned_files.total() != len(files):
        raise SourceError(
            f"source '{source_input.source}': of {len(files)} files Spark reads "
            f"{planned_files.total()}, without {missing_files[:5]}; nothing was written. Rename "
            "them: a name may not start with '_' or '.', or end in '._COPYING_'"
        )
    return frame


# Spark writes URIs in several ways: file:///a and file:/a. Both give /a here.
def _without_scheme(uri: str) -> str:
    return re.sub(r"^\w+:/*", "/", uri)


def _csv_groups(
    spark: SparkSession,
    source_input: SourceInput,
    source_options: Mapping[str, str],
    header: Sequence[str] | None,
    named_columns: Sequence[str],
) -> list[_FileGroup]:
    options = {**CSV_OPTIONS, **source_options}
    has_header = options["header"].lower() == "true"
    files_by_header: dict[tuple[str, ...], list[str]] = {}
    for uri in source_input.files:
        fields = csv_header(spark, source_input.source, uri, options)
        if header is not None and fields:
            fields = list(header)
        elif not has_header:
            fields = [f"_c{i}" for i in range(len(fields))]
        if fields:
            files_by_header.setdefault(tuple(fields), []).append(uri)
    groups = []
    for names, files in files_by_header.items():
        count_by_name = Counter(names)
        for name in named_columns:
            if count_by_name[name] > 1:
                raise SourceError(
                    f"source '{source_input.source}': column '{name}' occurs {count_by_name[name]} times "
                    f"in {files[0]}; keep one of them"
                )
        # Columns get their names by position, because Spark takes names for equal that differ in
        # upper and lower case only.
        columns = [f"c{i}" for i in range(len(names))]
        text_schema = StructType(
            [StructField(name, StringType()) for name in [*columns, UNREADABLE]]
        )
        reader = spark.read.schema(text_schema).options(**options)
        reader = reader.options(mode="PERMISSIVE", columnNameOfCorruptRecord=UNREADABLE)
        frame = read_files(reader, source_input, "csv", files)
        column_by_name = {name: name for name in source_input.folder_columns} | dict(
            zip(names, columns)
        )
        groups.append(_FileGroup(frame, column_by_name, files[0]))
    return groups


def csv_header(spark: SparkSession, source: str, uri: str, options: Mapping[str, str]) -> list[str]:
    """Return the fields of the header of a CSV file; [] for an empty file.

    The header is the first line that is neither blank nor a comment. Spark's own parser reads the
    line, so every option applies to the header as to the rows. Raises SourceError where the first
    MB of the file has no such line. Cost: reads at most 1 MB; no job.
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


def _first_line(
    spark: SparkSession, content: bytes, settings: Any, line_end: str | None
) -> str | None:
    """Return the line that Spark takes for the header; None where there is none.

    `settings` is Spark's `CSVOptions` (a JVM object). `line_end` is what ends a line; None = the
    line ends that Spark knows.
    """
    jvm: Any = spark.sparkContext._jvm
    charset = settings.charset()
    encoded_line_end = None
    if line_end:
        byte_buffer = jvm.java.nio.charset.Charset.forName(charset).encode(line_end)
        encoded_line_end = bytes(byte_buffer.array())[: byte_buffer.limit()]
    for line in head_lines(content, encoded_line_end):
        if line.strip(_BLANK_BYTES):
            java_lines = jvm.java.util.ArrayList()
            java_lines.add(jvm.java.lang.String(line, charset))
            scala_lines = jvm.scala.jdk.javaapi.CollectionConverters.asScala(java_lines.iterator())
            header = jvm.org.apache.spark.sql.catalyst.csv.CSVExprUtils.extractHeader(
                scala_lines, settings
            )
            if not header.isEmpty():
                return str(header.get())
    return None


def _jsonl_groups(
    spark: SparkSession,
    source_input: SourceInput,
    source_options: Mapping[str, str],
    named_columns: Sequence[str],
    lists: Mapping[str, str],
) -> list[_FileGroup]:
    files = source_input.files
    if not files:
        return []
    present_keys = {*source_input.folder_columns}
    is_multi_line = source_options.get("multiLine", "false").lower() == "true"
    keys, wrong_shapes = _keys_in_first_lines(spark, files, source_options, lists)
    for name in named_columns:
        if name not in present_keys and (wrong_shape := wrong_shapes.get(name)):
            raise SourceError(
                f"source '{source_input.source}': column '{name}' is {wrong_shape}, expected "
                f"{'a list of texts' if name in lists else 'a text or a number'}; nothing was written. "
                "Mend the delivery, or name another column"
            )
    present_keys |= keys
    reader = spark.read.schema(f"{LINE} string").options(wholetext=is_multi_line)
    if "lineSep" in source_options and not is_multi_line:
        reader = reader.options(lineSep=source_options["lineSep"])
    texts = read_files(reader, source_input, "text", files)
    charset = source_options.get("encoding", "UTF-8")
    if charset.upper() not in ("UTF-8", "UTF8"):
        texts = texts.withColumn(LINE, F.decode(F.col(LINE).cast("binary"), charset))
    if is_multi_line and not present_keys.issuperset(named_columns):
        present_keys |= {
            *read_files(spark.read.options(**source_options), source_input, "json", files).columns
        }
    elif not present_keys.issuperset(named_columns):
        # A column that few rows have may occur late. Every line is searched before the column
        # counts as missing.
        keys_of = F.explode(F.json_object_keys(LINE)).alias("key")
        present_keys |= {row["key"] for row in texts.select(keys_of).distinct().collect()}
    # Without any key, no line is a readable object. Then all rows go to quarantine, and no column
    # is reported as missing.
    named_keys = (
        [name for name in named_columns if name in present_keys]
        if present_keys - source_input.folder_columns
        else named_columns
    )
    return [
        _json_group(
            source_input,
            texts,
            source_options,
            named_keys,
            _other_keys(present_keys, named_keys),
            lists,
            files[0],
        )
    ]


def _other_keys(present_keys: Iterable[str], named_keys: Sequence[str]) -> list[str]:
    """Return the keys that no setting names, sorted. They become columns too, since a refused row
    is kept with all its columns.

    Spark takes names for equal that differ in upper and lower case only, so one of them is
    returned. At most `_MAX_OTHER_KEYS` keys are returned.
    """
    taken_names = {name.lower() for name in named_keys}
    other_keys: list[str] = []
    for name in sorted(present_keys):
        if (
            name.lower() not in taken_names
            and name != UNREADABLE
            and len(other_keys) < _MAX_OTHER_KEYS
        ):
            taken_names.add(name.lower())
            other_keys.append(name)
    return other_keys


def _json_group(
    source_input: SourceInput,
    texts: DataFrame,
    source_options: Mapping[str, str],
    named_keys: Sequence[str],
    other_keys: Sequence[str],
    lists: Mapping[str, str],
    first_file: str,
) -> _FileGroup:
    """Return one row per object in `texts`, and one row with `_unreadable` per text that is neither
    an object nor a list of objects.

    The value of a key in `named_keys` has to be a text or a number; for a key in `lists`, a list is
    fine too. Otherwise the row is unreadable. The values of `other_keys` are not checked.

    Spark parses only the first JSON value of a text and ignores the rest. So each text is put into
    brackets before it is parsed. The text `{"a": 1}` becomes `[[{"a": 1}],[]]`. The result is a
    list of two lists, the second of them empty, only where the text held one JSON value and nothing
    else: `{"a": 1}, {"a": 2}` gives two objects in the first list, and `{"a": 1}], [5` gives three
    lists. A text that is itself a list, `[{"a": 1}]`, becomes `[[{"a": 1}],[]]` as well.
    """
    keys = [name for name in (*named_keys, *other_keys) if name not in source_input.folder_columns]
    record = StructType([StructField(name, StringType()) for name in keys])
    line = F.col(LINE)
    # A byte order mark is removed from the start of every text, as a file that was joined from
    # several files has one in the middle.
    text = F.when(F.startswith(line, F.lit("\ufeff")), F.substring(line, 2, 1 << 30)).otherwise(
        line
    )
    is_list = line.rlike(rf"^{_BLANK_PATTERN}*\[")
    bracketed = F.concat(
        F.when(is_list, "[").otherwise("[["), text, F.when(is_list, "\n,[]]").otherwise("\n],[]]")
    )
    parsed = F.from_json(
        bracketed,
        ArrayType(ArrayType(record)),
        {name: value for name, value in source_options.items() if name.startswith("allow")},
    )
    folders = [schema.quoted(name) for name in sorted(source_input.folder_columns)]
    parsed_texts = texts.where(~line.rlike(rf"^{_BLANK_PATTERN}*$")).select(
        *folders, LINE, parsed.alias("_parsed"), is_list.alias("_is_list")
    )
    records, end_marker = F.get("_parsed", F.lit(0)), F.get("_parsed", F.lit(1))
    is_readable = (
        (F.size("_parsed") == 2)
        & (F.size(end_marker) == 0)
        & (F.col("_is_list") | (F.size(records) == 1))
        & F.is_valid_utf8(LINE)
    )
    null_record = F.array(F.lit(None).cast(record))
    rows = parsed_texts.select(
        *folders, LINE, F.explode(F.when(is_readable, records).otherwise(null_record))
    )
    is_unreadable, columns, checked_keys = F.col("col").isNull(), [], {*named_keys}
    for i, name in enumerate(keys):
        value = F.col("col").getField(name)
        is_nested = _is_nested_value(value, name)
        if name in lists and name in checked_keys:
            list_value = F.from_json(value, schema.STRINGS)
            is_unreadable |= is_nested & (
                list_value.isNull()
                | F.exists(list_value, lambda item: F.startswith(item, F.lit("{")))
            )
            value = F.when(is_nested, list_value).otherwise(split_text(value, lists[name]))
        elif name in checked_keys:
            is_unreadable |= is_nested
        columns.append(value.alias(f"c{i}"))
    frame = rows.select(
        *folders,
        *columns,
        F.when(F.coalesce(is_unreadable, F.lit(False)), F.col(LINE)).alias(UNREADABLE),
    )
    column_by_name = {name: name for name in source_input.folder_columns}
    column_by_name |= {name: f"c{i}" for i, name in enumerate(keys)}
    return _FileGroup(frame, column_by_name, first_file)


def _is_nested_value(value: Column, name: str) -> Column:
    """Return whether `value`, the value of key `name` as text, is a list or an object in its line.

    A text value may also start with a bracket, so the line is searched for `"name": [` or
    `"name": {`.
    """
    quoted_key = json.dumps(name, ensure_ascii=False).replace("\\E", "\\E\\\\E\\Q")
    starts_with_bracket = F.startswith(value, F.lit("{")) | F.startswith(value, F.lit("["))
    return F.coalesce(
        starts_with_bracket & F.col(LINE).rlike(rf"\Q{quoted_key}\E\s*:\s*[\[{{]"), F.lit(False)
    )


def _keys_in_first_lines(
    spark: SparkSession,
    files: Sequence[str],
    source_options: Mapping[str, str],
    lists: Mapping[str, str],
) -> tuple[set[str], dict[str, str]]:
    """Return the keys of the objects in the first lines of each file, and the keys whose values
    cannot be a column.

    The latter map a key to `an object in <file>` or `a list in <file>`. A key is among them where
    all its values in those lines are objects, or lists although the key is not in `lists`; null
    values do not count.
    """
    keys: set[str] = set()
    fitting_keys: set[str] = set()
    wrong_shapes: dict[str, str] = {}
    line_end = source_options["lineSep"].encode() if "lineSep" in source_options else None
    for uri in files:
        content = head(uri)
        texts = head_lines(content, line_end)[:_MAX_PARSED_LINES]
        if source_options.get("multiLine", "false").lower() == "true":
            texts = [content] if len(content) < HEAD_BYTES else []
        for text in _decoded(spark, texts, source_options.get("encoding", "UTF-8")):
            for record in _objects(text):
                keys.update(record)
                for name, value in record.items():
                    is_list = name in lists and isinstance(value, list)
                    if any(
                        isinstance(part, dict | list) for part in (value if is_list else [value])
                    ):
                        shape = "a list" if isinstance(value, list) else "an object"
                        wrong_shapes[name] = f"{shape} in {uri}"
                    elif value is not None:
                        fitting_keys.add(name)
    return keys, {name: shape for name, shape in wrong_shapes.items() if name not in fitting_keys}


def _decoded(spark: SparkSession, texts: Iterable[bytes], charset: str) -> Iterator[str]:
    jvm: Any = spark.sparkContext._jvm
    for text in texts:
        if text.isascii() or charset.upper() in ("UTF-8", "UTF8"):
            yield text.decode("utf-8", errors="replace").removeprefix("\ufeff")
        else:
            yield jvm.java.lang.String(text, charset)


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the object of a JSON text, or the objects in its list; [] for a text that cannot be
    parsed.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [
        item
        for item in (parsed if isinstance(parsed, list) else [parsed])
        if isinstance(item, dict)
    ]


def _parquet_groups(
    spark: SparkSession, source_input: SourceInput, source_options: Mapping[str, str]
) -> list[_FileGroup]:
    files_by_signature: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for uri in source_input.files:
        footer, n_rows = parquet_footer(uri)
        if n_rows:
            signature = tuple((field.name, str(field.type)) for field in footer)
            files_by_signature.setdefault(signature, []).append(uri)
    groups = []
    for files in files_by_signature.values():
        frame = read_files(spark.read.options(**source_options), source_input, "parquet", files)
        groups.append(_FileGroup(frame, {name: name for name in frame.columns}, files[0]))
    return groups


def _delta_groups(
    spark: SparkSession, source_input: SourceInput, source_options: Mapping[str, str]
) -> list[_FileGroup]:
    if not source_input.entries:
        return []
    # Read the version from which the digest of the landing was made. A newer one may be committed
    # before the rows are read.
    version = delta_version(source_input)
    if version is None:
        raise SourceError(
            f"source '{source_input.source}': {source_input.root} is no Delta table (it has no _delta_log); "
            "is source.format right?"
        )
    options = {"versionAsOf": str(version), **source_options}
    frame = spark.read.format("delta").options(**options).load(source_input.root)
    # Reads the log now, where `named_errors` gives an error in the log a name. Spark keeps the log.
    frame.inputFiles()
    return [_FileGroup(frame, {name: name for name in frame.columns}, source_input.root)]


def _check_names(
    source_input: SourceInput, group: _FileGroup, named_columns: Sequence[str]
) -> None:
    missing = [name for name in named_columns if name not in group.column_by_name]
    if missing:
        missing_names = " ".join(
            f"'{name}'.{suggest(name, group.column_by_name)}" for name in missing[:10]
        )
        count = "a column" if len(missing) == 1 else f"{len(missing)} columns"
        raise SourceError(
            f"source '{source_input.source}': {group.first_file} lacks {count}: {missing_names} "
            "Nothing was written; mend the delivery, or name the new column in the source's "
            "settings"
        )
    unused_columns = sorted(set(group.column_by_name) - set(named_columns))
    if unused_columns:
        shown_columns = shortened(unused_columns)
        log.info(
            "source=%s file=%s columns_not_used=%s",
            source_input.source,
            group.first_file,
            shown_columns,
        )


def _staged(group: _FileGroup) -> Staged:
    """Return a group with its columns named by position, as raw names may occur twice."""
    name_by_column = {column: name for name, column in group.column_by_name.items()}
    columns = [name for name in group.frame.columns if name != UNREADABLE]
    names = [
        name_by_column.get(column, f"(column {index + 1})") for index, column in enumerate(columns)
    ]
    numbered_columns = [
        schema.quoted(column).alias(staged_column(index)) for index, column in enumerate(columns)
    ]
    unreadable = F.lit(None).cast("string").alias(UNREADABLE)
    if UNREADABLE in group.frame.columns:
        unreadable = F.col(UNREADABLE)
    return Staged(group.frame.select(*numbered_columns, unreadable), names)


def _as_table(
    source_input: SourceInput,
    staged_groups: Sequence[Staged],
    named_columns: Sequence[str],
    computed: Sequence[Computed],
    is_text: bool,
    spelling: Spelling,
) -> RawTable:
    # `frame_columns` has one column per raw column and type: for a `user` that is an integer in one
    # group and text in another, {("user", integer): "r0", ("user", string): "r1"}.
    all_names = dict.fromkeys(name for staged in staged_groups for name in staged.names)
    types_by_group = [staged.data_types for staged in staged_groups]
    types: dict[str, list[DataType]] = {
        name: [] for name in (*named_columns, *all_names) if name in all_names
    }
    for group_types in types_by_group:
        for name, data_type in group_types.items():
            if data_type not in types[name]:
                types[name].append(data_type)
    frame_columns: dict[tuple[str, DataType], str] = {}
    for name, data_types in types.items():
        # A column that is null in every row of a file has no type there.
        types[name] = [
            data_type for data_type in data_types if data_type != NullType()
        ] or data_types
        for data_type in types[name]:
            frame_columns[name, data_type] = f"r{len(frame_columns)}"
    frames = []
    for staged, group_types in zip(staged_groups, types_by_group):
        group_columns = staged.columns
        columns = [
            (
                group_columns[name]
                if group_types.get(name) == data_type
                else F.lit(None).cast(data_type)
            ).alias(frame_column)
            for (name, data_type), frame_column in frame_columns.items()
        ]
        frames.append(staged.frame.select(*columns, F.col(UNREADABLE)))
    return RawTable(
        source_input.source,
        reduce(DataFrame.union, frames),
        {
            name: [(frame_columns[name, data_type], data_type) for data_type in data_types]
            for name, data_types in types.items()
        },
        {name: types[name][0] for name in named_columns},
        frozenset(name for column in computed for name in (column.name, column.unread_name)),
        is_text,
        spelling,
    )


def split_text(text: Column, separator: str) -> Column:
    """Return the parts of `text` between the separators as an array. Parts are trimmed, and blank
    parts are left out.
    """
    parts = F.split(text, r"\Q" + separator + r"\E")
    return F.filter(F.transform(parts, values.trimmed), lambda part: part.isNotNull())


def _as_text(column: Column, data_type: DataType) -> Column:
    """Return `column` as text for a person to read. Instants end with `Z`, since they are in
    UTC.
    """
    if isinstance(data_type, ArrayType | MapType | StructType):
        return F.to_json(column)
    if isinstance(data_type, TimestampType):
        return F.date_format(column, "yyyy-MM-dd HH:mm:ss.SSSSSS'Z'")
    return column.cast("string")
