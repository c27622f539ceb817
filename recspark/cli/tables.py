"""`recspark tables`: every table, its version, rows and files."""

from __future__ import annotations

import json

from recspark.cli.common import Env, Json, Set, console, reading
from recspark.errors import TableNotFoundError


def tables(env: Env = "local", set_: Set = None, as_json: Json = False) -> None:
    """List the tables with version, rows, files and place; TableNotFoundError without any."""
    from recspark.report.night import table_of_tables, tables_of

    with reading(env, set_) as (config, catalog):
        rows = tables_of(catalog)
    if not rows:
        raise TableNotFoundError(
            f"no tables in {config.paths.tables}: is paths.root right? `recspark nightly` makes them"
        )
    if as_json:
        print(json.dumps(rows))
    else:
        console.print(table_of_tables(rows))
