"""`recspark runs`: what the last nights did."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, print_json, reading
from recspark.report.answers import cell, stages


def runs(
    env: Env = "local",
    set_: Set = None,
    nights: Annotated[int, typer.Option(min=1, help="how many of the newest nights")] = 1,
    as_json: Json = False,
) -> None:
    """List the stages of the newest nights: rows, seconds, memory, versions."""
    with reading(env, set_) as (_, tables):
        stage_rows = stages(tables, nights)
    if as_json:
        print_json(stage_rows)
        return
    dates = sorted({row["run_date"] for row in stage_rows}, reverse=True)
    table = Table(title=f"runs of {', '.join(map(str, dates))}")
    for column in (
        "night",
        "run",
        "stage",
        "model",
        "rows in",
        "rows out",
        "seconds",
        "MB",
        "status",
    ):
        table.add_column(
            column,
            justify="right" if column in ("rows in", "rows out", "seconds", "MB") else "left",
        )
    for row in stage_rows:
        table.add_row(
            str(row["run_date"]),
            cell(row["run_id"][:8]),
            cell(row["stage"]),
            cell(row["model"]),
            f"{row['rows_in']:,}",
            f"{row['rows_out']:,}",
            f"{row['seconds']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
            cell(row["status"]),
        )
    console.print(table)
