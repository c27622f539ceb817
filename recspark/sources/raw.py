"""Raw rows as they are: CSV, JSON lines, Parquet or Delta, with every column that they have."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.errors import AnalysisException
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

from recspark.errors import SourceError, suggest
from recspark.sources.computed import Computed, Staged, compute, position
from recspark.sources.files import Place, csv_header, head_lines, parquet_footer
from recspark.sources.spelling import Spelling

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
    """Raw rows: every column that a file has, in each type that it has there.

    Files are united column by column *and* type by type: where `user` is an integer in one file and
    a float in another, there is a frame column for each, null in the rows of the other. So a value
    reaches whoever knows what it means as it was delivered, never as Spark's text of it.

    Parameters
    ----------
    source : name of the source, for messages
    frame : columns `r0` … and `_unreadable` string, the text of a row that could not be read (null
        = the row is fine)
    types : raw column -> (frame column, its type) for each type; every column is text in CSV and
        JSON lines. What SQL computes is a column here, too, by its text
    kinds : raw columns that the source names -> the first of their types
    computed : those of `types` that are no raw columns
    is_text : whether the rows come from text, which may be wrongly encoded
    spelling : how numbers and ids are spelt
    """

    source: str
    frame: DataFrame
    types: Mapping[str, Sequence[tuple[str, DataType]]]
    kinds: Mapping[str, DataType]
    computed: frozenset[str]
    is_text: bool
    spelling: Spelling

    def variants(self, name: str) -> list[tuple[Column, DataType]]:
        """Return (column, type) for each type that the raw column `name` has."""
        return [(F.col(column), kind) for column, kind in self.types[name]]

    def column(self, name: str) -> Column:
        """Return the raw column `name` as it is; as text where it has several types."""
        variants = self.variants(name)
        if len(variants) == 1:
            return variants[0][0]
        return F.coalesce(*[_as_text(column, kind) for column, kind in variants])

    def unreadable(self) -> Column:
        """Return whether a row had the wrong number of fields, or was no JSON object."""
        return F.col(UNREADABLE).isNotNull()

    def row(self) -> Column:
        """Return the raw row as JSON, with the columns that nobody names; nulls are left out. Not
        cheap, so only ask for rows that need it.
        """
        named = [self.column(name).alias(name) for name in self.types if name not in self.computed]
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
    spelling: Spelling | None = None,
    computed: Sequence[Computed] = (),
) -> RawTable | None:
    """Return every row at `place`; None where no file holds one.

    Parameters
    ----------
    kind : `csv`, `jsonl`, `parquet` or `delta`
    options : reader options, as Spark's; they win over recspark's own
    header : names of the fields of a CSV file that has no header line
    spelling : how numbers and ids are spelt; None = as programs do
    computed : columns that SQL makes of the raw ones

    Files may differ in the order and type of their columns, and in columns that are not named.
    Raises SourceError that lists the missing columns, with the nearest name that is there. Cost:
    lazy; the driver reads one header or footer per file; for JSON lines one job more where the
    first MB of no file shows a named column. All columns are read, since a row that is refused is
    kept whole.
    """
    spelling = spelling or Spelling()
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
        if not parts:
            return None
        staged = [_staged(part) for part in parts]
        for column in computed:
            staged = [compute(place.source, part, column, spelling) for part in staged]
        return _as_table(place, staged, named, computed, kind in ("csv", "jsonl"), spelling)
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
    # Spark takes names for equal that differ in case only: of such, those that are named.
    first = {name.lower(): name for name in [*sorted(known - set(named)), *named] if name in known}
    columns = [name for name in sorted(known) if first[name.lower()] == name and name != UNREADABLE]
    frame = _reader(spark, place, given, columns).json(files)
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


def _staged(part: _Part) -> Staged:
    """Return a part with its columns by position, as no name is safe to use twice."""
    taken = {column: name for name, column in part.physical.items()}
    columns = [name for name in part.frame.columns if name != UNREADABLE]
    names = [taken.get(column, f"(column {i + 1})") for i, column in enumerate(columns)]
    positions = [quoted(column).alias(position(i)) for i, column in enumerate(columns)]
    unreadable = F.lit(None).cast("string").alias(UNREADABLE)
    if UNREADABLE in part.frame.columns:
        unreadable = F.col(UNREADABLE)
    return Staged(part.frame.select(*positions, unreadable), names)


def _as_table(
    place: Place,
    parts: Sequence[Staged],
    named: Sequence[str],
    computed: Sequence[Computed],
    is_text: bool,
    spelling: Spelling,
) -> RawTable:
    there = dict.fromkeys(name for part in parts for name in part.names)
    kinds_of = [part.kinds for part in parts]
    types: dict[str, list[DataType]] = {name: [] for name in (*named, *there) if name in there}
    for part_kinds in kinds_of:
        for name, kind in part_kinds.items():
            if kind not in types[name]:
                types[name].append(kind)
    slots: dict[tuple[str, DataType], str] = {}
    for name, kinds in types.items():
        # A column of nulls has no type of its own.
        types[name] = [kind for kind in kinds if kind != NullType()] or kinds
        for kind in types[name]:
            slots[name, kind] = f"r{len(slots)}"
    frames = []
    for part, part_kinds in zip(parts, kinds_of):
        own = part.columns
        columns = [
            (own[name] if part_kinds.get(name) == kind else F.lit(None).cast(kind)).alias(slot)
            for (name, kind), slot in slots.items()
        ]
        frames.append(part.frame.select(*columns, F.col(UNREADABLE)))
    return RawTable(
        place.source,
        reduce(DataFrame.union, frames),
        {name: [(slots[name, kind], kind) for kind in kinds] for name, kinds in types.items()},
        {name: types[name][0] for name in named},
        frozenset(name for column in computed for name in (column.name, column.wrong)),
        is_text,
        spelling,
    )


def quoted(name: str) -> Column:
    """Return the column `name`, whatever characters it has."""
    return F.col("`" + name.replace("`", "``") + "`")


def _as_text(column: Column, kind: DataType) -> Column:
    """Return `column` as text for a person to read; an instant says its zone."""
    if isinstance(kind, ArrayType | MapType | StructType):
        return F.to_json(column)
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
