"""`recspark tables`: every table, its version, rows and files."""

from __future__ import annotations

import json

from recspark.cli.common import Env, Json, Set, console, reading


def tables(env: Env = "local", set_: Set = None, as_json: Json = False) -> None:
    """List the tables with version, rows, files and place."""
    from recspark.report.night import table_of_tables, tables_of

    with reading(env, set_) as (_, catalog):
        rows = tables_of(catalog)
    if as_json:
        print(json.dumps(rows))
    else:
        console.print(table_of_tables(rows))
