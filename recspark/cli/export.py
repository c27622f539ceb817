"""`recspark export TABLE`: one table to Parquet, CSV or JSON lines, for those without a Delta
reader.
"""

from __future__ import annotations

from typing import Annotated

import typer
from pyspark.errors.exceptions.captured import CapturedException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import storage
from recspark.cli.common import Env, Set, console, parse_date, reading
from recspark.errors import ConfigError, suggest

_FORMATS = ("parquet", "csv", "json")


def export(
    table: Annotated[str, typer.Argument(help="such as recommendations")],
    to: Annotated[str, typer.Argument(help="new folder or URI; an export of before is replaced")],
    env: Env = "local",
    set_: Set = None,
    run_date: Annotated[str | None, typer.Option("--run-date", help="one night only")] = None,
    format_: Annotated[str, typer.Option("--format", help="parquet, csv or json")] = "parquet",
    where: Annotated[str | None, typer.Option(help="SQL condition on the table's columns")] = None,
) -> None:
    """Write a table, or one night of it, to files."""
    if format_ not in _FORMATS:
        raise ConfigError(f"--format {format_}.{suggest(format_, _FORMATS)}")
    with reading(env, set_) as (_, catalog):
        rows = catalog.read(
            table, catalog.version(table) if catalog.version(table) is not None else -1
        )
        if run_date is not None:
            if "run_date" not in rows.columns:
                raise ConfigError(
                    f"--run-date {run_date}: table '{table}' has no run_date; say which rows with "
                    f"--where, its columns are {', '.join(rows.columns)}"
                )
            rows = rows.where(F.col("run_date") == F.lit(parse_date(run_date)))
        if where is not None:
            try:
                rows = rows.where(where)
            except CapturedException as error:
                raise ConfigError(f'--where "{where}": {str(error).splitlines()[0]}') from None
        if format_ == "csv" and (nested := _nested(rows)):
            raise ConfigError(
                f"CSV has no lists: {', '.join(nested)}; use --format json or parquet"
            )
        ours = storage.exists(storage.join(to, "_SUCCESS"))
        if storage.exists(to) and not ours and storage.list_files(to):
            raise ConfigError(f"{to} holds files that no export wrote; name another folder")
        writer = rows.write.mode("overwrite")
        (writer.option("header", "true") if format_ == "csv" else writer).format(format_).save(to)
        console.print(f"{table}: {rows.count():,} rows to {to}")


def _nested(rows: DataFrame) -> list[str]:
    kinds = ("array", "map", "struct")
    return [name for name, kind in rows.dtypes if kind.startswith(kinds)]
