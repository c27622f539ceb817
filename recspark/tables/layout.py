"""How the rows of one write are laid out: how many files a slice gets, and the order in each."""

from __future__ import annotations

import math

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.tables.specs import TableSpec

TARGET_FILE_BYTES = 128 << 20


def laid_out(
    spec: TableSpec, rows: DataFrame, n_rows: int, n_existing_partitions: int | None = None
) -> DataFrame:
    """Return `rows` spread over partitions, each of which becomes one file per partition value, and
    sorted within each partition.

    A partition value gets at most ceil(estimated bytes of all rows / 128 MB) files. If
    `n_existing_partitions` is given, the rows already have their partitions and are only sorted.
    Example: 6 million rows of 60 bytes (360 MB) give 3 files.
    """
    if n_existing_partitions is None:
        n_files = max(1, math.ceil(n_rows * spec.row_bytes / TARGET_FILE_BYTES))
        partition_by = [F.col(c) for c in spec.partition]
        if n_files > 1:
            file_number = F.pmod(F.xxhash64(*(spec.key or spec.schema.names)), F.lit(n_files))
            partition_by.append(file_number)
        rows = rows.repartition(n_files, *partition_by) if n_files > 1 else rows.repartition(1)
    sort_columns = [c for c in spec.order if c not in spec.partition]
    return rows.sortWithinPartitions(*spec.partition, *sort_columns)
