"""Append-only dictionaries: outside string to dense integer, assigned once and for ever."""

from __future__ import annotations

from datetime import date

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.errors import IdRangeError

MAX_INT = 2**31 - 1
_ROW_BITS = 33  # monotonically_increasing_id() = partition << 33 | row


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

    New names get the integers after the largest known one, in ascending order of the name, whatever
    the partitioning. Raises IdRangeError where they do not fit an int. Cost: one range shuffle of
    the new names, kept while they are counted per partition; the driver holds one count a
    partition.
    """
    fresh = (
        names.where(F.col(id_column).isNotNull())
        .select(id_column)
        .distinct()
        .join(known.select(id_column), on=id_column, how="left_anti")
    )
    part, row = F.spark_partition_id(), F.monotonically_increasing_id()
    placed = (
        fresh.repartitionByRange(F.col(id_column))
        .sortWithinPartitions(id_column)
        .select(
            id_column, part.alias("part"), row.bitwiseAND(F.lit((1 << _ROW_BITS) - 1)).alias("row")
        )
        .persist(StorageLevel.MEMORY_AND_DISK)
    )
    counts = {r["part"]: r["count"] for r in placed.groupBy("part").count().collect()}
    top = known.agg(F.max(idx_column)).collect()[0][0]
    next_idx = 0 if top is None else int(top) + 1
    offsets, total = {}, next_idx
    for partition in sorted(counts):
        offsets[partition] = total
        total += counts[partition]
    is_int = idx_column == "item_idx"
    if is_int and total - 1 > MAX_INT:
        raise IdRangeError(f"{idx_column}: {total} items do not fit an int (at most {MAX_INT + 1})")
    offset = F.lit(0)
    if offsets:
        offset = F.element_at(
            F.create_map(*[F.lit(x) for pair in offsets.items() for x in pair]), F.col("part")
        )
    idx = (F.col("row") + offset).cast("int" if is_int else "bigint")
    return placed.select(id_column, idx.alias(idx_column), F.lit(run_date).alias("run_date"))
