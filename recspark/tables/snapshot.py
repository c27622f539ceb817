"""The data files of one version of a table, and the rows that changed between two versions."""

from __future__ import annotations

from pyspark.errors.exceptions.captured import AnalysisException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.errors import ConfigError, VersionNotFoundError
from recspark.session import FILE_SKIPPING
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS


def active_files(
    catalog: TableCatalog, table: str, version: int, condition: str | None = None
) -> list[str]:
    """Return the sorted URIs of the files that `table` consists of at `version`; only those of the
    slice `condition` if it is given.

    Never read the folder instead: it also holds files of other versions. Raises ConfigError if the
    session keeps Delta from skipping files, because the result would then include the files of
    other slices. Cost: no job; the driver holds the name of each file.
    """
    if condition and catalog.spark.conf.get(FILE_SKIPPING, "true") == "false":
        raise ConfigError(
            f"{FILE_SKIPPING} = false: Delta then names the files of all slices of table '{table}', and a "
            "model would learn from those of another cutoff; leave the setting out"
        )
    rows = catalog.read(table, version)
    return sorted((rows.where(condition) if condition else rows).inputFiles())


def changed_rows(catalog: TableCatalog, table: str, old: int | None, new: int) -> DataFrame:
    """Return the rows that only one of the versions `old` and `new` of `table` has, with the
    boolean `is_added`.

    `is_added` is true for rows that only `new` has; `old` None means a table without rows. A
    changed row comes twice: removed with its old content, added with its new one. A row that merely
    moved to another file is left out. Only the files that one version has and the other has not are
    read, so the cost follows the size of the change. Raises VersionNotFoundError if a removed file
    was vacuumed. Cost: no action; one shuffle, and that only if files were removed.
    """
    new_files = set(active_files(catalog, table, new))
    old_files = set(active_files(catalog, table, old)) if old is not None else set()
    added = _read_files(catalog, table, sorted(new_files - old_files)).withColumn(
        "is_added", F.lit(True)
    )
    if not old_files - new_files:
        return added
    removed = _read_files(catalog, table, sorted(old_files - new_files)).withColumn(
        "is_added", F.lit(False)
    )
    key = SPECS[table].key
    columns = SPECS[table].schema.names
    content = F.struct(*[F.col(n) for n in columns])
    sign = F.when(F.col("is_added"), 1).otherwise(-1)
    # Equal rows of both sides add up to 0 and drop out. Sums above 0 were added, below 0 removed.
    return (
        added.unionByName(removed)
        # A map column cannot be hashed or grouped by, but its JSON can.
        .withColumn("content", F.xxhash64(F.to_json(content)))
        .groupBy(*key, "content")
        .agg(F.sum(sign).alias("side"), F.first(content).alias("row"))
        .where("side != 0")
        .select("row.*", (F.col("side") > 0).alias("is_added"))
    )


def _read_files(catalog: TableCatalog, table: str, files: list[str]) -> DataFrame:
    spec = SPECS[table]
    if not files:
        return catalog.spark.createDataFrame([], spec.schema)
    try:
        # The partition columns come from the folder names below basePath.
        rows = (
            catalog.spark.read.schema(spec.schema)
            .option("basePath", catalog.path(table))
            .parquet(*files)
        )
    except AnalysisException as error:
        raise VersionNotFoundError(
            f"table '{table}': files of an older version are gone (vacuumed?): "
            f"{str(error).splitlines()[0]}; rebuild what is derived from it"
        ) from None
    return rows.select(*spec.schema.names)
