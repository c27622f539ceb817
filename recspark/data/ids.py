"""Append-only dictionaries: outside string to dense integer, assigned once and for ever."""

from __future__ import annotations

from datetime import date

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark.errors import IdRangeError

MAX_INT = 2**31 - 1
_BUCKETS = 256  # names are numbered bucket by bucket, so that no window holds all of them


def new_ids(
    names: DataFrame, known: DataFrame, id_column: str, idx_column: str, run_date: date
) -> DataFrame:
    """Return dictionary rows for the names that `known` lacks: `id, idx, run_date`.

    Parameters
    ----------
    names : one string column `id_column`; nulls and duplicates are ignored
    known : the dictionary so far: `id_column`, `idx_column`
    id_column, idx_column : their names; `item_idx` is int, any other bigint
    run_date : the night that first saw them

    New names get the integers after the largest known one, by bucket (a hash of the name) and in
    ascending order of the name within. The number of a name is a function of the set of new names
    alone, so it stays the same where Spark computes a partition again or plans the query anew: an
    assignment by partition and row does not, because Spark may drop a persisted frame when another
    thread writes a table (two items got one integer). Raises IdRangeError where the integers do not
    fit an int. Cost: one shuffle of the new names; one more job counts them by bucket, and the
    driver holds 256 counts.
    """
    fresh = (
        names.where(F.col(id_column).isNotNull())
        .select(id_column)
        .distinct()
        .join(known.select(id_column), on=id_column, how="left_anti")
        .withColumn("bucket", F.pmod(F.xxhash64(id_column), F.lit(_BUCKETS)).cast("int"))
    )
    counts = {r["bucket"]: r["count"] for r in fresh.groupBy("bucket").count().collect()}
    top = known.agg(F.max(idx_column)).collect()[0][0]
    total = 0 if top is None else int(top) + 1
    firsts = []
    for bucket in range(_BUCKETS):
        firsts.append(total)
        total += counts.get(bucket, 0)
    is_int = idx_column == "item_idx"
    if is_int and total - 1 > MAX_INT:
        raise IdRangeError(f"{idx_column}: {total} items do not fit an int (at most {MAX_INT + 1})")
    first = F.expr(f"array({', '.join(f'{n}L' for n in firsts)})")[F.col("bucket")]
    row = F.row_number().over(Window.partitionBy("bucket").orderBy(id_column))
    idx = (first + row - 1).cast("int" if is_int else "bigint")
    return fresh.select(id_column, idx.alias(idx_column), F.lit(run_date).alias("run_date"))
