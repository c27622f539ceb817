"""Append-only dictionaries from outside strings (ids) to dense integers (idx).

The integer of a string is assigned once and never changes.
"""

from __future__ import annotations

import logging
from datetime import date

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark.errors import IdRangeError

log = logging.getLogger(__name__)

MAX_INT = 2**31 - 1
_FLOAT = r"^[+-]?\d+[.]0+$"  # a whole number spelt as a float, such as 13085.0
_BUCKETS = 256  # names are numbered bucket by bucket, so that no window holds all names


def new_ids(
    names: DataFrame, known: DataFrame, id_column: str, idx_column: str, run_date: date
) -> DataFrame:
    """Return dictionary rows for the names that `known` lacks: `id_column, idx_column, run_date`.

    Parameters
    ----------
    names : one string column `id_column`; nulls and duplicates are ignored
    known : the dictionary so far: `id_column`, `idx_column`
    id_column, idx_column : names of the two columns; `item_idx` is int, any other is bigint
    run_date : the night that first saw the new names

    New names get the integers after the largest known one: bucket by bucket (the bucket is a hash
    of the name), and within a bucket in ascending order of the name. The integer of a name depends
    on the set of new names alone. So it stays the same where Spark computes a partition again or
    plans the query anew. An integer that is assigned by partition and row does not stay the same,
    because Spark may drop a persisted frame when another thread writes a table: two items once got
    one integer in this way.

    Raises IdRangeError where the integers of items do not fit an int. Warns where one number has
    two spellings, such as 13085 and 13085.0, and at least one of the two is new.

    Cost: one shuffle of the new names. One more job counts the new names per bucket, and the driver
    holds 256 counts. The warning costs nothing until a new or a known name ends in `.0`; then it
    costs one more join of the new names with the known ones.
    """
    new_names = (
        names.where(F.col(id_column).isNotNull())
        .select(id_column)
        .distinct()
        .join(known.select(id_column), on=id_column, how="left_anti")
        .withColumn("bucket", F.pmod(F.xxhash64(id_column), F.lit(_BUCKETS)).cast("int"))
    )
    n_floats = F.count_if(F.col(id_column).rlike(_FLOAT)).alias("floats")
    buckets = new_names.groupBy("bucket").agg(F.count(F.lit(1)).alias("n"), n_floats).collect()
    n_names_of_bucket = {row["bucket"]: row["n"] for row in buckets}
    largest_idx, n_known_floats = known.agg(F.max(idx_column), n_floats).collect()[0]
    if n_names_of_bucket and (n_known_floats or any(row["floats"] for row in buckets)):
        _warn_of_two_spellings(new_names, known, id_column)
    next_idx = 0 if largest_idx is None else int(largest_idx) + 1
    first_idx_of_bucket = []
    for bucket in range(_BUCKETS):
        first_idx_of_bucket.append(next_idx)
        next_idx += n_names_of_bucket.get(bucket, 0)
    is_int = idx_column == "item_idx"
    if is_int and next_idx - 1 > MAX_INT:
        raise IdRangeError(
            f"{idx_column}: {next_idx} items do not fit an int (at most {MAX_INT + 1})"
        )
    first_idx = F.expr(f"array({', '.join(f'{n}L' for n in first_idx_of_bucket)})")[F.col("bucket")]
    row_number = F.row_number().over(Window.partitionBy("bucket").orderBy(id_column))  # from 1
    idx = (first_idx + row_number - 1).cast("int" if is_int else "bigint")
    return new_names.select(id_column, idx.alias(idx_column), F.lit(run_date).alias("run_date"))


def _warn_of_two_spellings(new_names: DataFrame, known: DataFrame, id_column: str) -> None:
    """Log how many numbers are spelt both as an integer and as a float, with a new spelling."""
    number = F.regexp_replace(id_column, "[.]0+$", "").alias("number")
    is_number = F.col(id_column).rlike(r"^[+-]?\d+([.]0+)?$")
    spellings = [
        names.where(is_number).select(number, id_column, F.lit(is_new).alias("is_new"))
        for names, is_new in ((new_names, True), (known, False))
    ]
    spelt_twice = (
        spellings[0]
        .union(spellings[1])
        .groupBy("number")
        .agg(F.count(F.lit(1)).alias("n"), F.max("is_new").alias("is_new"))
        .where("n > 1 AND is_new")
    )
    n, example = spelt_twice.agg(F.count(F.lit(1)), F.min("number")).collect()[0]
    if n:
        log.warning(
            "%s: %s numbers have two spellings, such as '%s' and '%s.0', and are two %ss each; if "
            "they are one, set source.whole_number_ids=[%s] and make the tables anew",
            *(id_column, f"{n:,}", example, example, id_column.removesuffix("_id"), id_column),
        )
