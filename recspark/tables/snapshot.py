"""The active files of one table version, and the rows that changed between two versions."""

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
    """Return the sorted URIs of the files that make up `table` at `version`, of the slice
    `condition`.

    Never the folder: that also holds files of other versions. Raises ConfigError where the session
    keeps Delta from leaving out files: those of other slices would be among them. Cost: no job, driver
    memory per file.
    """
    if condition and catalog.spark.conf.get(FILE_SKIPPING, "true") == "false":
        raise ConfigError(
            f"{FILE_SKIPPING} = false: Delta then names the files of all slices of table '{table}', and a "
            "model would learn from those of another cutoff; leave the setting out"
        )
    frame = catalog.read(table, version)
    return sorted((frame.where(condition) if condition else frame).inputFiles())


def changed_rows(catalog: TableCatalog, table: str, old: int | None, new: int) -> DataFrame:
    """Return the rows of `table` that only one of two versions has, with `is_added` boolean.

    Reads only the files that one version has and the other has not, so the cost follows the change;
    a row that merely moved to another file is not returned. Raises VersionNotFoundError when a
    removed file was vacuumed. Cost: no action; one shuffle, only where rows were removed.
    """
    now = set(active_files(catalog, table, new))
    before = set(active_files(catalog, table, old)) if old is not None else set()
    added = _read_files(catalog, table, sorted(now - before)).withColumn("is_added", F.lit(True))
    if not before - now:
        return added
    removed = _read_files(catalog, table, sorted(before - now)).withColumn("is_added", F.lit(False))
    key = SPECS[table].key
    names = SPECS[table].schema.names
    content = F.struct(*[F.col(n) for n in names])
    # A map cannot be hashed or grouped by; its JSON can.
    side = F.when(F.col("is_added"), 1).otherwise(-1)
    return (
        added.unionByName(removed)
        .withColumn("content", F.xxhash64(F.to_json(content)))
        .groupBy(*key, "content")
        .agg(F.sum(side).alias("side"), F.first(content).alias("row"))
        .where("side != 0")
        .select("row.*", (F.col("side") > 0).alias("is_added"))
    )


def _read_files(catalog: TableCatalog, table: str, files: list[str]) -> DataFrame:
    spec = SPECS[table]
    if not files:
        return catalog.spark.createDataFrame([], spec.schema)
    try:
        # The partition columns come from the folder names below basePath.
        frame = (
            catalog.spark.read.schema(spec.schema)
            .option("basePath", catalog.path(table))
            .parquet(*files)
        )
    except AnalysisException as error:
        raise VersionNotFoundError(
            f"table '{table}': files of an older version are gone (vacuumed?): "
            f"{str(error).splitlines()[0]}; rebuild what is derived from it"
        ) from None
    return frame.select(*spec.schema.names)
