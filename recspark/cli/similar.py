"""`recspark similar ITEM`: an item's neighbours."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from pyspark.sql import functions as F
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, reading
from recspark.errors import UnknownUserError


def similar(
    item: Annotated[str, typer.Argument(help="item_id, as the source spells it")],
    env: Env = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show the items most like one item, of the newest night."""
    from recspark.report.night import latest_night

    with reading(env, set_) as (_, catalog):
        neighbours = catalog.read("item_neighbours", catalog.version("item_neighbours"))
        night = latest_night(neighbours)
        mine = neighbours.where((F.col("run_date") == F.lit(night)) & (F.col("item_id") == item))
        rows = [r.asDict() for r in mine.orderBy("rank").collect()]
    if not rows:
        raise UnknownUserError(
            f"item '{item}' has no neighbours on the night of {night}: is the id right?"
        )
    if as_json:
        print(json.dumps(rows, default=str))
        return
    table = Table(title=f"items like {item}, night of {night}")
    for column in ("rank", "item", "name", "score"):
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for row in rows:
        table.add_row(
            str(row["rank"]), row["neighbour_id"], row["neighbour_name"], f"{row['score']:.4g}"
        )
    console.print(table)
