"""Raw rows as they are: CSV, JSON lines, Parquet or Delta, with the columns that a source names."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, DataFrameReader, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StringType, StructField, StructType, TimestampType

from recspark.errors import SourceError, suggest
from recspark.sources.files import Place, csv_header, head_lines, parquet_footer

log = logging.getLogger(__name__)

UNREADABLE = "_unreadable"
# RFC 4180 quotes; without `columnPruning` off, a row of too few or too many fields goes unnoticed;
# and one row of more than 20,480 fields (Spark's limit) would fail the night.
CSV_OPTIONS = {
    "header": "true",
    "escape": '"',
    "columnPruning": "false",
    "maxColumns": str(1 << 20),
}


@dataclass(frozen=True)
class RawTable:
    """Raw rows: the named columns as `r0`, `r1`, … and the text of a row that could not be read.

    Parameters
    ----------
    source : name of the source, for messages
    frame : columns `r0` … in the order of `kinds`, then `_unreadable` string (null = the row is
        fine)
    kinds : raw column -> its type; every column is text in CSV and JSON lines
    is_text : whether the rows come from text, which may be wrongly encoded
    """

    source: str
    frame: DataFrame
    kinds: Mapping[str, DataType]
    is_text: bool

    def column(self, name: str) -> Column:
        """Return the raw column `name`."""
        return F.col(f"r{list(self.kinds).index(name)}")

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
) -> RawTable | None:
    """Return the columns `named` of every row at `place`; None where no file holds a row.

    Parameters
    ----------
    kind : `csv`, `jsonl`, `parquet` or `delta`
    options : reader options, as Spark's; they win over recspark's own
    header : names of the fields of a CSV file that has no header line

    Files may differ in the order of their columns and in columns that are not named; where they
    differ in the type of a named one, that column is read as text. Raises SourceError that lists
    the missing columns, with the nearest name that is there. Cost: lazy; the driver reads one
    header or footer per file; for JSON lines one job more where the first MB of no file shows a
    named column.
    """
    given = dict(options or {})
    named = list(dict.fromkeys(named))
    try:
        if kind == "csv":
            parts = _csv_parts(spark, place, given, header, named)
        elif kind == "jsonl":
            parts = _jsonl_parts(spark, place, given, named)
        elif kind == "parquet":
            parts = _parquet_parts(spark, place, given)
        else:
            parts = _delta_parts(spark, place, given)
        for part in parts:
            _check_names(place, part, named)
        return _as_table(place, parts, named, kind in ("csv", "jsonl")) if parts else None
    except AnalysisException as error:
        raise SourceError(
            f"source '{place.source}': {place.root} cannot be read as {kind}: "
            f"{str(error).splitlines()[0]}"
        ) from None


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
        fields = csv_header(uri, options)
        if header is not None:
            fields = list(header)
        elif not has_header:
            fields = [f"_c{i}" for i in range(len(fields))]
        if fields:
            files_of.setdefault(tuple(fields), []).append(uri)
    parts = []
    for fields_, files in files_of.items():
        for name in named:
            if fields_.count(name) > 1:
                raise SourceError(
                    f"source '{place.source}': column '{name}' occurs {fields_.count(name)} times in "
                    f"{files[0]}; keep one of them"
                )
        # By position: Spark takes names for equal that differ in case only.
        columns = [f"c{i}" for i in range(len(fields_))]
        frame = _reader(spark, place, options, columns).csv(files)
        physical = {name: name for name in place.folder_columns} | dict(zip(fields_, columns))
        parts.append(_Part(frame, physical, files[0]))
    return parts


def _jsonl_parts(
    spark: SparkSession, place: Place, given: Mapping[str, str], named: Sequence[str]
) -> list[_Part]:
    files = place.files
    if not files:
        return []
    there: set[str] = set()
    if given.get("multiLine", "false").lower() == "true":
        there.update(spark.read.options(**given).json(files).columns)
    else:
        for uri in files:
            there.update(_json_keys(head_lines(uri, given.get("encoding", "UTF-8"))))
        if not {*there, *place.folder_columns}.issuperset(named):
            # A column that few rows have may come late: look at every line before saying no.
            keys = F.explode(F.json_object_keys("value")).alias("key")
            late = spark.read.text(files).select(keys).distinct().collect()
            there.update(row["key"] for row in late)
    there.update(place.folder_columns)
    # Not one readable object: every row is quarantined, and there is no schema to complain of.
    known = there or set(named)
    frame = _reader(spark, place, given, [name for name in named if name in known]).json(files)
    return [_Part(frame, {name: name for name in known}, files[0])]


def _parquet_parts(spark: SparkSession, place: Place, given: Mapping[str, str]) -> list[_Part]:
    files_of: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for uri in place.files:
        footer, n_rows = parquet_footer(uri)
        if n_rows:
            signature = tuple((field.name, str(field.type)) for field in footer)
            files_of.setdefault(signature, []).append(uri)
    parts = []
    for files in files_of.values():
        reader = spark.read.options(**given)
        frame = (reader if place.is_file else reader.option("basePath", place.root)).parquet(*files)
        parts.append(_Part(frame, {name: name for name in frame.columns}, files[0]))
    return parts


def _delta_parts(spark: SparkSession, place: Place, given: Mapping[str, str]) -> list[_Part]:
    if not place.entries:
        return []
    commits = [name for name, _, _ in place.entries if name.startswith("_delta_log/")]
    if not commits:
        raise SourceError(
            f"source '{place.source}': {place.root} is no Delta table (it has no _delta_log); "
            "is source.format right?"
        )
    # The version that the landing's digest is of, not whatever is newest once rows are read.
    version = max(int(name.removeprefix("_delta_log/").removesuffix(".json")) for name in commits)
    options = {"versionAsOf": str(version), **given}
    frame = spark.read.format("delta").options(**options).load(place.root)
    return [_Part(frame, {name: name for name in frame.columns}, place.root)]


def _reader(
    spark: SparkSession, place: Place, options: Mapping[str, str], columns: Sequence[str]
) -> DataFrameReader:
    schema = StructType([StructField(name, StringType()) for name in [*columns, UNREADABLE]])
    reader = spark.read.schema(schema).options(**options)
    reader = reader.options(mode="PERMISSIVE", columnNameOfCorruptRecord=UNREADABLE)
    return reader if place.is_file else reader.option("basePath", place.root)


def _check_names(place: Place, part: _Part, named: Sequence[str]) -> None:
    missing = [name for name in named if name not in part.physical]
    if missing:
        told = " ".join(f"'{name}'.{suggest(name, part.physical)}" for name in missing)
        count = "a column" if len(missing) == 1 else f"{len(missing)} columns"
        raise SourceError(
            f"source '{place.source}': {part.first_file} lacks {count}: {told} Nothing was written; "
            "mend the delivery, or name the new column in the source's settings"
        )
    unused = sorted(set(part.physical) - set(named))
    if unused:
        log.info("source=%s file=%s columns_not_used=%s", place.source, part.first_file, unused)


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


def quoted(name: str) -> Column:
    """Return the column `name`, whatever characters it has."""
    return F.col("`" + name.replace("`", "``") + "`")


def _as_text(column: Column, kind: DataType) -> Column:
    """Return `column` as text; an instant says its zone, so that it is not read as local time."""
    if isinstance(kind, TimestampType):
        return F.date_format(column, "yyyy-MM-dd HH:mm:ss.SSSSSS'Z'")
    return column.cast("string")


def _json_keys(lines: Sequence[str]) -> set[str]:
    keys: set[str] = set()
    for line in lines[:1000]:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        for item in found if isinstance(found, list) else [found]:
            keys.update(item if isinstance(item, dict) else ())
    return keys
