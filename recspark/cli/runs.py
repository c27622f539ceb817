"""`recspark runs`: what the last nights did."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from pyspark.sql import functions as F
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, reading


def runs(
    env: Env = "local",
    set_: Set = None,
    nights: Annotated[int, typer.Option(min=1, help="how many of the newest nights")] = 1,
    as_json: Json = False,
) -> None:
    """List the stages of the newest nights: rows, seconds, memory, versions."""
    with reading(env, set_) as (_, catalog):
        rows = catalog.read("runs", catalog.version("runs"))
        dates = [
            r[0]
            for r in rows.select("run_date")
            .distinct()
            .orderBy(F.desc("run_date"))
            .limit(nights)
            .collect()
        ]
        found = (
            rows.where(F.col("run_date").isin(dates))
            .drop("config")
            .orderBy("run_date", "started_at")
            .collect()
        )
    if as_json:
        print(json.dumps([r.asDict() for r in found], default=str))
        return
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
    for row in found:
        table.add_row(
            str(row["run_date"]),
            row["run_id"][:8],
            row["stage"],
            row["model"],
            f"{row['rows_in']:,}",
            f"{row['rows_out']:,}",
            f"{row['seconds']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
            row["status"],
        )
    console.print(table)
