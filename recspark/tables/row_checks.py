"""The rows of one write: checked against their table's spec, and compared with those that are there."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark.errors import KeyViolationError, SchemaError
from recspark.tables.specs import TableSpec

Literal = str | int | date | datetime
_SALT = 1  # makes a second hash of a key, which is equal by chance only where the first one is
Slice = Mapping[str, Literal | Sequence[Literal]]


def checked(spec: TableSpec, frame: DataFrame) -> DataFrame:
    """Return `frame` with the columns of `spec`, in the order of `spec`.

    Raises SchemaError for a missing or unknown column and for a wrong type. Without this check
    Delta would fill a missing column with null.
    """
    actual_types = {f.name: f.dataType for f in frame.schema.fields}
    expected_types = {f.name: f.dataType for f in spec.schema.fields}
    missing = [name for name in expected_types if name not in actual_types]
    extra = [name for name in actual_types if name not in expected_types]
    wrong_types = [
        f"{name} is {actual_types[name].simpleString()}, expected {expected_type.simpleString()}"
        for name, expected_type in expected_types.items()
        if name in actual_types
        and actual_types[name].simpleString() != expected_type.simpleString()
    ]
    if missing or extra or wrong_types:
        raise SchemaError(
            f"table '{spec.name}': missing columns {missing}, unknown columns {extra}, wrong types {wrong_types}"
        )
    return frame.select(*expected_types)


def count_checked(spec: TableSpec, rows: DataFrame, where: Slice) -> int:
    """Return the number of rows.

    Cost: one job; see `key_totals` for what it shuffles. A further job where a row is wrong.

    Raises SchemaError if a row is outside the slice `where`, KeyViolationError if a key or
    partition column is null or a key occurs twice.
    """
    totals = key_totals(spec, rows, where).collect()[0]
    if totals["is_wrong"]:
        _raise_wrong_rows(spec, rows, where)
    if totals["n_repeated"]:
        n_occurrences = F.count(F.lit(1)).alias("n")
        repeated_keys = rows.groupBy(*spec.key).agg(n_occurrences).where("n > 1").limit(3).collect()
        shown = "; ".join(
            str({c: r[c] for c in spec.key}) + f" {r['n']} times" for r in repeated_keys
        )
        if repeated_keys:
            raise KeyViolationError(f"table '{spec.name}': a key occurs more than once: {shown}")
    return int(totals["n_rows"] or 0)


def key_totals(spec: TableSpec, rows: DataFrame, where: Slice) -> DataFrame:
    """Return one row: `n_rows`; `is_wrong`, whether a row lies outside the slice `where` or lacks a
    key or partition column; `n_repeated`, how many hashes of a key have several rows.

    Equal keys have equal hashes, so a hash with one row is a unique key. Two different keys may
    share a hash, so repeated keys are then looked up by their values, which shuffles all rows. The
    hash has 128 bits: of 10^10 rows, two share one by chance with a probability below 10^-18. With
    64 bits it would be 0.93.

    Cost: one shuffle, of 16 bytes of hash, a count and a truth value per row, however wide the rows
    and their keys are; none where the table has no key.
    """
    is_null = [F.col(c).isNull() for c in _required_columns(spec)]
    is_wrong = reduce(operator.or_, is_null, _is_outside(where))
    n_rows, any_wrong = F.count(F.lit(1)).alias("n_rows"), F.bool_or(is_wrong).alias("is_wrong")
    if not spec.key:
        return rows.agg(n_rows, any_wrong, F.lit(0).alias("n_repeated"))
    return (
        rows.groupBy(F.xxhash64(*spec.key), F.xxhash64(F.lit(_SALT), *spec.key))
        .agg(n_rows, any_wrong)
        .agg(
            F.sum("n_rows").alias("n_rows"),
            F.bool_or("is_wrong").alias("is_wrong"),
            F.count_if(F.col("n_rows") > 1).alias("n_repeated"),
        )
    )


def _raise_wrong_rows(spec: TableSpec, rows: DataFrame, where: Slice) -> None:
    required_columns = _required_columns(spec)
    null_counts = [F.count_if(F.col(c).isNull()).alias(f"null {c}") for c in required_columns]
    n_outside = F.count_if(_is_outside(where)).alias("outside")
    row = rows.agg(n_outside, *null_counts).collect()[0].asDict()
    if row["outside"]:
        raise SchemaError(
            f"table '{spec.name}': {row['outside']} rows lie outside the slice {slice_condition(where)}"
        )
    for column in required_columns:
        if row[f"null {column}"]:
            raise KeyViolationError(
                f"table '{spec.name}': {row[f'null {column}']} rows have no {column}"
            )


def _required_columns(spec: TableSpec) -> list[str]:
    return list(dict.fromkeys((*spec.key, *spec.partition)))


def _is_outside(where: Slice) -> Column:
    """Return whether a row lies outside a slice; False where a column of the slice is null."""
    is_inside = F.expr(slice_condition(where)) if where else F.lit(True)
    return F.coalesce(~is_inside, F.lit(False))


def check_dictionary(
    spec: TableSpec, existing_rows: DataFrame, new_rows: DataFrame, n_rows: int
) -> None:
    """Raise KeyViolationError if two rows of `existing_rows` and `new_rows` have the same value in
    the column `spec.unique`.

    `n_rows` is the number of rows of both frames together. The values should be the integers below
    `n_rows`, each once. They are if the sum of their hashes equals the sum of the hashes of these
    integers; only if the sums differ are the values counted one by one. Cost: one job without a
    shuffle of rows.
    """
    assert spec.unique is not None
    id_number = F.col(spec.unique).cast("bigint")
    all_ids = existing_rows.select(id_number.alias("id")).unionByName(
        new_rows.select(id_number.alias("id"))
    )
    id_hash = F.xxhash64("id").cast("decimal(20,0)")
    expected_ids = existing_rows.sparkSession.range(n_rows)
    # Hashes of the actual ids count positive, those of the expected ids negative.
    signed_hashes = all_ids.select(id_hash.alias("h")).unionByName(
        expected_ids.select((-id_hash).alias("h"))
    )
    if not signed_hashes.agg(F.sum("h")).collect()[0][0]:
        return
    repeated = all_ids.groupBy("id").agg(F.count(F.lit(1)).alias("n")).where("n > 1")
    repeated_ids = [f"{r[0]} ({r['n']} times)" for r in repeated.orderBy("id").limit(3).collect()]
    if repeated_ids:
        raise KeyViolationError(
            f"table '{spec.name}': {spec.unique} {', '.join(repeated_ids)} stands for more than one "
            f"{spec.key[0]}; nothing was written. Run the stage again; where the table holds it "
            "already, RESTORE the table to the version before"
        )


def checksum(rows: DataFrame) -> tuple[int, int, int]:
    """Return (number of rows, sum of one hash of each row, sum of another hash of each row).

    The result does not depend on the order of the rows. It is equal for equal multisets of rows.
    """
    # A map cannot be hashed, but the sorted array of its entries can.
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
    """Return the SQL condition, with literal values, that selects the slice `where`."""
    if not where:
        return "true"
    conditions = []
    for column, value in where.items():
        values = (
            list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        )
        literals = ", ".join(_literal(v) for v in values)
        conditions.append(
            f"{column} IN ({literals})" if len(values) != 1 else f"{column} = {literals}"
        )
    return " AND ".join(conditions)


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
