"""`recspark tables`: every table with its version, rows and files."""

from __future__ import annotations

from recspark.cli.common import Env, Json, Set, console, print_json, reading
from recspark.errors import TableNotFoundError
from recspark.report.answers import sizes, table_of_tables


def tables(env: Env = "local", set_: Set = None, as_json: Json = False) -> None:
    """List the tables with version, rows, files and place; TableNotFoundError without any."""
    with reading(env, set_) as (config, reader):
        rows = sizes(reader)
    if not rows:
        raise TableNotFoundError(
            f"no tables in {config.paths.tables}: is paths.root right? `recspark nightly` makes them"
        )
    if as_json:
        print_json(rows)
    else:
        console.print(table_of_tables(rows))
        console.print(f"below {config.paths.tables}", highlight=False)
