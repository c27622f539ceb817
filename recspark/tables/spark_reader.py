"""Read tables with Spark, for a root that is not on this machine. Same answers as
`recspark.tables.reader`.
"""

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
from recspark.tables.reader import Condition, Reader, TableReader, is_readable_without_spark


def reader_of(catalog: TableCatalog) -> Reader:
    """Return the fastest reader of a catalogue's tables: without Spark where that is possible."""
    return (
        TableReader(catalog.root)
        if is_readable_without_spark(catalog.root)
        else SparkReader(catalog)
    )


def spark_reader_of_root(spark: SparkSession, root: str) -> SparkReader:
    """Return a reader of the tables below `root`. The catalogue that it makes is only read."""
    return SparkReader(TableCatalog(spark, root))


class SparkReader:
    """Reads the newest versions of the tables of a catalogue."""

    def __init__(self, catalog: TableCatalog) -> None:
        self.catalog = catalog

    def nights(self, table: str) -> list[date]:
        """Return the `run_date`s of `table`, oldest first; [] without such a table. One job."""
        version = self.catalog.version(table)
        if version is None:
            return []
        nights = self.catalog.read(table, version).select("run_date").distinct()
        return sorted(row[0] for row in nights.collect())

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the rows that meet all conditions, in no particular order. Empty `columns` means
        all columns. One job.
        """
        _, rows = self.newest(table)
        for column, operator, value in where:
            if operator == "in":
                rows = rows.where(F.col(column).isin(list(value)))
            else:
                literal = F.lit(value)
                rows = rows.where(
                    F.col(column) == literal if operator == "=" else F.col(column) < literal
                )
        rows = rows.select(*(columns or rows.columns))
        time_columns = [f.name for f in rows.schema.fields if isinstance(f.dataType, TimestampType)]
        # `collect` would convert a timestamp to this machine's time zone; microseconds stay in UTC.
        selected = rows.withColumns({name: F.unix_micros(name) for name in time_columns})
        return [
            {
                name: _time_in_utc(cell) if name in time_columns else _sorted_map(cell)
                for name, cell in row.asDict(recursive=True).items()
            }
            for row in selected.collect()
        ]

    def newest(self, table: str) -> tuple[int, DataFrame]:
        """Return (newest version, its rows) of a table. Raises TableNotFoundError if there is no
        table.
        """
        version = self.catalog.version(table)
        if version is None:
            raise TableNotFoundError(
                f"table '{table}' does not exist below {self.catalog.root}; run a night first"
            )
        return version, self.catalog.read(table, version)

    def sizes(self) -> list[dict[str, Any]]:
        """Return table, version, rows, files, bytes and path of every table, sorted by name."""
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


def _sorted_map(value: Any) -> Any:
    """Return a map sorted by key, because Spark's maps have no order; other values as they are."""
    return dict(sorted(value.items())) if isinstance(value, dict) else value


def _time_in_utc(micros: int | None) -> datetime | None:
    """Return microseconds since 1970 as a time in UTC, without a zone.

    >>> _time_in_utc(1_000_000)
    datetime.datetime(1970, 1, 1, 0, 0, 1)
    """
    if micros is None:
        return None
    return (datetime.fromtimestamp(0, UTC) + timedelta(microseconds=micros)).replace(tzinfo=None)
