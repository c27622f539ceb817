"""`recspark models`: the algorithms that the models of a night may use."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from recspark.cli.common import Json, console, print_json
from recspark.errors import ConfigError, suggest


def models(
    name: Annotated[
        str | None, typer.Argument(help="an algorithm: all of its settings; left out: the list")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the algorithms, or one with its settings: value, default and meaning of each."""
    from recspark.models.registry import MODELS
    from recspark.report.algorithms import algorithms, with_settings

    if name is not None and name not in MODELS:
        raise ConfigError(f"no algorithm is called '{name}'.{suggest(name, MODELS)}")
    rows = [row for row in algorithms() if name in (None, row["algorithm"])]
    if as_json:
        print_json([with_settings(row) for row in rows])
        return
    if name is None:
        table = Table(title="algorithms", caption="recspark models NAME shows the settings of one")
        for column in ("algorithm", "kind", "tags", "source"):
            table.add_column(column)
        for row in rows:
            table.add_row(
                row["algorithm"],
                row["kind"],
                ", ".join(row["tags"]),
                row["source"],
            )
    else:
        row = with_settings(rows[0])
        table = Table(title=f"{name}: {row['kind']}, {', '.join(row['tags'])}. {row['source']}")
        for column in ("setting", "value", "default", "meaning"):
            table.add_column(column)
        for setting in row["settings"]:
            table.add_row(
                setting["setting"], setting["value"], str(setting["default"]), setting["meaning"]
            )
    console.print(table)
