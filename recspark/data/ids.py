"""Append-only dictionaries: outside string to dense integer, assigned once and for ever."""

from __future__ import annotations

import logging
from datetime import date

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark.errors import IdRangeError

log = logging.getLogger(__name__)

MAX_INT = 2**31 - 1
_FLOAT = r"^[+-]?\d+[.]0+$"
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
    fit an int. Warns where one number has two spellings, 13085 and 13085.0, and either is new. Cost:
    one shuffle of the new names; one more job counts them by bucket, and the driver holds 256
    counts. The warning costs nothing until a name of either side ends in `.0`, and then one more
    join of the new names with the known ones.
    """
    fresh = (
        names.where(F.col(id_column).isNotNull())
        .select(id_column)
        .distinct()
        .join(known.select(id_column), on=id_column, how="left_anti")
        .withColumn("bucket", F.pmod(F.xxhash64(id_column), F.lit(_BUCKETS)).cast("int"))
    )
    looks_float = F.count_if(F.col(id_column).rlike(_FLOAT)).alias("floats")
    rows = fresh.groupBy("bucket").agg(F.count(F.lit(1)).alias("n"), looks_float).collect()
    counts = {row["bucket"]: row["n"] for row in rows}
    top, n_known_floats = known.agg(F.max(idx_column), looks_float).collect()[0]
    if counts and (n_known_floats or any(row["floats"] for row in rows)):
        _warn_of_two_spellings(fresh, known, id_column)
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


def _warn_of_two_spellings(fresh: DataFrame, known: DataFrame, id_column: str) -> None:
    """Log how many numbers are spelt as an integer and as a float, and are new in one spelling."""
    number = F.regexp_replace(id_column, "[.]0+$", "").alias("number")
    is_number = F.col(id_column).rlike(r"^[+-]?\d+([.]0+)?$")
    spelt = [
        names.where(is_number).select(number, id_column, F.lit(is_new).alias("is_new"))
        for names, is_new in ((fresh, True), (known, False))
    ]
    twice = (
        spelt[0]
        .union(spelt[1])
        .groupBy("number")
        .agg(F.count(F.lit(1)).alias("n"), F.max("is_new").alias("is_new"))
        .where("n > 1 AND is_new")
    )
    n, example = twice.agg(F.count(F.lit(1)), F.min("number")).collect()[0]
    if n:
        log.warning(
            "%s: %s numbers have two spellings, such as '%s' and '%s.0', and are two %ss each; if "
            "they are one, set source.whole_number_ids=[%s] and make the tables anew",
            *(id_column, f"{n:,}", example, example, id_column.removesuffix("_id"), id_column),
        )
