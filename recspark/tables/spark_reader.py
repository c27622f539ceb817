"""The questions of `recspark.tables.reader`, answered by Spark: for a root on a store."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import TimestampType

from recspark.errors import TableNotFoundError
from recspark.masking import mask
from recspark.tables.catalog import TableCatalog
from recspark.tables.reader import Condition, Reader, TableReader, opens


def reader_of(catalog: TableCatalog) -> Reader:
    """Return the quickest reader of a catalogue's tables: without Spark where that can be."""
    return TableReader(catalog.root) if opens(catalog.root) else SparkReader(catalog)


def of_root(spark: SparkSession, root: str) -> SparkReader:
    """Return the reader of the tables below `root`, whose catalogue writes nothing."""
    return SparkReader(TableCatalog(spark, root))


class SparkReader:
    """The newest versions of the tables of a catalogue."""

    def __init__(self, catalog: TableCatalog) -> None:
        self.catalog = catalog

    def nights(self, table: str) -> list[date]:
        """Return the `run_date`s of `table`, oldest first. One job."""
        version = self.catalog.version(table)
        if version is None:
            return []
        nights = self.catalog.read(table, version).select("run_date").distinct()
        return sorted(row[0] for row in nights.collect())

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the rows that meet all conditions, in no order; () = all columns. One job."""
        _, frame = self.newest(table)
        for column, op, value in where:
            if op == "in":
                frame = frame.where(F.col(column).isin(list(value)))
            else:
                known = F.lit(value)
                frame = frame.where(F.col(column) == known if op == "=" else F.col(column) < known)
        frame = frame.select(*(columns or frame.columns))
        times = [f.name for f in frame.schema.fields if isinstance(f.dataType, TimestampType)]
        # Collected as a time it would be given in this machine's zone.
        counted = frame.withColumns({name: F.unix_micros(name) for name in times})
        return [
            {name: _time(v) if name in times else _sorted(v) for name, v in row.asDict().items()}
            for row in counted.collect()
        ]

    def newest(self, table: str) -> tuple[int, DataFrame]:
        """Return the newest version of a table and its rows; TableNotFoundError without any."""
        version = self.catalog.version(table)
        if version is None:
            raise TableNotFoundError(
                f"table '{table}' does not exist below {self.catalog.root}; run a night first"
            )
        return version, self.catalog.read(table, version)

    def sizes(self) -> list[dict[str, Any]]:
        """Return table, version, rows, files, bytes and path of every table, by name."""
        catalog = self.catalog
        return [
            {
                "table": name,
                "version": version,
                "rows": catalog.count(name, version),
                **catalog.size(name),
                "path": mask(catalog.path(name)),
            }
            for name, version in sorted(catalog.versions().items())
        ]


def _sorted(value: Any) -> Any:
    """Return a map in the order of its keys; Spark's has none."""
    return dict(sorted(value.items())) if isinstance(value, dict) else value


def _time(micros: int | None) -> datetime | None:
    """Return microseconds since 1970 as a time without a zone, which is UTC.

    >>> _time(1_000_000)
    datetime.datetime(1970, 1, 1, 0, 0, 1)
    """
    if micros is None:
        return None
    return (datetime.fromtimestamp(0, UTC) + timedelta(microseconds=micros)).replace(tzinfo=None)
