"""The rows of one write: checked against their table's spec, laid out in files, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.errors import KeyViolationError, SchemaError
from recspark.tables.specs import TableSpec

TARGET_FILE_BYTES = 128 << 20

Literal = str | int | date | datetime
Slice = Mapping[str, Literal | Sequence[Literal]]


def checked(spec: TableSpec, frame: DataFrame) -> DataFrame:
    """Return `frame` with the columns of `spec`, in order; Delta would fill a missing one with
    null.
    """
    have = {f.name: f.dataType for f in frame.schema.fields}
    want = {f.name: f.dataType for f in spec.schema.fields}
    missing = [name for name in want if name not in have]
    extra = [name for name in have if name not in want]
    wrong = [
        f"{name} is {have[name].simpleString()}, expected {kind.simpleString()}"
        for name, kind in want.items()
        if name in have and have[name].simpleString() != kind.simpleString()
    ]
    if missing or extra or wrong:
        raise SchemaError(
            f"table '{spec.name}': missing columns {missing}, unknown columns {extra}, wrong types {wrong}"
        )
    return frame.select(*want)


def count_checked(spec: TableSpec, rows: DataFrame, where: Slice) -> int:
    """Return the number of rows; raise where a key is null or twice, or a row is outside the
    slice.
    """
    inside = F.expr(slice_condition(where)) if where else F.lit(True)
    named = list(dict.fromkeys((*spec.key, *spec.partition)))
    nulls = [F.count_if(F.col(c).isNull()).alias(f"null {c}") for c in named]
    counts = [F.count(F.lit(1)).alias("rows"), F.count_if(~inside).alias("outside"), *nulls]
    found = rows.agg(*counts)
    if spec.key:  # one job: counted per hashed key, then summed; equal keys have equal hashes
        found = (
            rows.groupBy(F.xxhash64(*spec.key))
            .agg(*counts)
            .agg(
                *[F.sum(c).alias(c) for c in ("rows", "outside", *[f"null {c}" for c in named])],
                F.count_if(F.col("rows") > 1).alias("twice"),
            )
        )
    row = found.collect()[0].asDict()
    if row["outside"]:
        raise SchemaError(
            f"table '{spec.name}': {row['outside']} rows lie outside the slice {slice_condition(where)}"
        )
    for column in named:
        if row[f"null {column}"]:
            raise KeyViolationError(
                f"table '{spec.name}': {row[f'null {column}']} rows have no {column}"
            )
    if row.get("twice"):
        n = F.count(F.lit(1)).alias("n")
        twice = rows.groupBy(*spec.key).agg(n).where("n > 1").limit(3).collect()
        shown = "; ".join(str({c: r[c] for c in spec.key}) + f" {r['n']} times" for r in twice)
        if twice:
            raise KeyViolationError(f"table '{spec.name}': a key occurs more than once: {shown}")
    return int(row["rows"] or 0)


def check_dictionary(spec: TableSpec, known: DataFrame, rows: DataFrame, n: int) -> None:
    """Raise KeyViolationError where two of the `n` rows of `known` and `rows` together share a
    `unique` value.

    Integers given without gaps are each there once if their hashes have the sum of those of 0 … n - 1;
    only where they have not are they counted one by one. Cost: one job without a shuffle of rows.
    """
    assert spec.unique is not None
    number = F.col(spec.unique).cast("bigint")
    given = known.select(number.alias("id")).unionByName(rows.select(number.alias("id")))
    hashed = F.xxhash64("id").cast("decimal(20,0)")
    wanted = known.sparkSession.range(n)
    signed = given.select(hashed.alias("h")).unionByName(wanted.select((-hashed).alias("h")))
    if not signed.agg(F.sum("h")).collect()[0][0]:
        return
    counts = given.groupBy("id").agg(F.count(F.lit(1)).alias("n")).where("n > 1")
    twice = [f"{r[0]} ({r['n']} times)" for r in counts.orderBy("id").limit(3).collect()]
    if twice:
        raise KeyViolationError(
            f"table '{spec.name}': {spec.unique} {', '.join(twice)} stands for more than one "
            f"{spec.key[0]}; nothing was written. Run the stage again; where the table holds it "
            "already, RESTORE the table to the version before"
        )


def laid_out(spec: TableSpec, rows: DataFrame, n_rows: int, given: int | None = None) -> DataFrame:
    """Return `rows` spread so that each partition value gets ceil(bytes / 128 MB) files, sorted
    inside.

    With a `given` number of files the rows are spread already, and only sorted.
    """
    if given is None:
        n_files = max(1, math.ceil(n_rows * spec.row_bytes / TARGET_FILE_BYTES))
        spread = [F.col(c) for c in spec.partition]
        if n_files > 1:
            hashed = F.pmod(F.xxhash64(*(spec.key or spec.schema.names)), F.lit(n_files))
            spread.append(hashed)
        rows = rows.repartition(n_files, *spread) if n_files > 1 else rows.repartition(1)
    order = [c for c in spec.order if c not in spec.partition]
    return rows.sortWithinPartitions(*spec.partition, *order)


def checksum(rows: DataFrame) -> tuple[int, int, int]:
    """Return (rows, two order-free sums of row hashes); equal for equal multisets of rows."""
    # Maps cannot be hashed; sorted entries can.
    columns = [
        F.array_sort(F.map_entries(f.name)) if f.dataType.typeName() == "map" else F.col(f.name)
        for f in rows.schema.fields
    ]
    row = rows.agg(
        F.count(F.lit(1)).alias("n"),
        F.sum(F.xxhash64(*columns).cast("decimal(38,0)")).alias("a"),
        F.sum(F.hash(*columns).cast("decimal(38,0)")).alias("b"),
    ).collect()[0]
    return int(row["n"]), int(row["a"] or 0), int(row["b"] or 0)


def slice_condition(where: Slice) -> str:
    """Return the SQL condition that names a slice, with literal values."""
    if not where:
        return "true"
    parts = []
    for column, value in where.items():
        values = (
            list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        )
        literals = ", ".join(_literal(v) for v in values)
        parts.append(f"{column} IN ({literals})" if len(values) != 1 else f"{column} = {literals}")
    return " AND ".join(parts)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        raise TypeError("no boolean slices")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, datetime):
        utc = value.astimezone(UTC) if value.tzinfo else value
        return f"TIMESTAMP '{utc:%Y-%m-%d %H:%M:%S}'"
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
