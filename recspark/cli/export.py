"""`recspark export TABLE`: write one table as Parquet, CSV or JSON lines, for those without a Delta
reader.
"""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from recspark.cli.common import Env, Set, console, parse_date, reading_by_spark
from recspark.config.load import load_config
from recspark.errors import ConfigError, suggest
from recspark.tables.reader import Reader, TableReader, is_readable_without_spark

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from recspark.config import Config
    from recspark.report.export import Export

_FORMATS = ("parquet", "csv", "json")


def export(
    table: Annotated[str, typer.Argument(help="such as recommendations")],
    to: Annotated[
        str, typer.Argument(help="new folder or URI; an export of recspark there is replaced")
    ],
    env: Env = "local",
    set_: Set = None,
    run_date: Annotated[str | None, typer.Option("--run-date", help="one night only")] = None,
    format_: Annotated[str, typer.Option("--format", help="parquet, csv or json")] = "parquet",
    where: Annotated[
        str | None, typer.Option(help="Spark SQL condition on the table's columns; starts Spark")
    ] = None,
    spreadsheet: Annotated[
        bool,
        typer.Option(
            "--spreadsheet",
            help="csv: an apostrophe before text that a spreadsheet would run (= + - @ tab CR first)",
        ),
    ] = False,
) -> None:
    """Write a table, or one night of it, to files."""
    from recspark.report.export import Export

    if format_ not in _FORMATS:
        raise ConfigError(f"--format {format_}.{suggest(format_, _FORMATS)}")
    if spreadsheet and format_ != "csv":
        raise ConfigError("--spreadsheet is for --format csv: only there a cell is text alone")
    night = parse_date(run_date) if run_date is not None else None
    config = load_config(env, set_ or [])
    target = Export(to, cast("Any", format_), neutral=spreadsheet)
    # A condition (--where) is Spark SQL, so only Spark can evaluate it, wherever the tables are.
    if where is None and is_readable_without_spark(config.paths.root):
        n_rows = _export_without_spark(target, config, table, night)
    else:
        n_rows = _export_with_spark(target, config, table, night, where)
    target.end()
    console.print(f"{table}: {n_rows:,} rows to {to}")


def _export_without_spark(target: Export, config: Config, table: str, night: date | None) -> int:
    tables = TableReader(config.paths.tables)
    schema, batches = tables.batches(table)  # nothing is read before the batches are iterated
    _check_export(target, table, schema, night, tables)
    if night is not None:
        schema, batches = tables.batches(table, night)
    target.begin({"table": table, "version": tables.version(table)})
    return target.write(schema, batches, "00000")


def _export_with_spark(
    target: Export, config: Config, table: str, night: date | None, where: str | None
) -> int:
    from pyspark.sql import functions as F

    from recspark.report.export import arrow_schema

    with reading_by_spark(config) as tables:
        version, rows = tables.newest(table)
        _check_export(target, table, arrow_schema(rows), night, tables)
        if night is not None:
            rows = rows.where(F.col("run_date") == F.lit(night))
        if where is not None:
            rows = _rows_that_meet(rows, where)
        target.begin({"table": table, "version": version})
        return target.write_spark(rows)


def _rows_that_meet(rows: DataFrame, where: str) -> DataFrame:
    from pyspark.errors.exceptions.captured import CapturedException

    try:
        return rows.where(where)
    except CapturedException as error:
        raise ConfigError(f'--where "{where}": {str(error).splitlines()[0]}') from None


def _check_export(
    target: Export, table: str, schema: Any, night: date | None, tables: Reader
) -> None:
    """Raise ConfigError for an export that is impossible or would overwrite other files, before
    anything is written.
    """
    from recspark.report.answers import nights_in_words

    if night is not None and "run_date" not in schema.names:
        raise ConfigError(
            f"--run-date {night}: table '{table}' has no run_date; say which rows with "
            f"--where, its columns are {', '.join(schema.names)}"
        )
    if night is not None and night not in (nights := tables.nights(table)):
        raise ConfigError(
            f"--run-date {night}: table '{table}' has no rows of that night; it has {nights_in_words(nights)}"
        )
    target.check_target()
