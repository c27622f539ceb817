"""`recspark similar ITEM`: the items most similar to one item."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, print_json, reading
from recspark.errors import UnknownUserError
from recspark.report.answers import cell, latest_night, neighbours, scores
from recspark.terminal import printable


def similar(
    item: Annotated[str, typer.Argument(help="item_id, as the source spells it")],
    env: Env = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show the items most like one item, of the newest night."""
    with reading(env, set_) as (_, tables):
        night = latest_night(tables, "item_neighbours")
        rows = neighbours(tables, item, night)
    if not rows:
        raise UnknownUserError(
            f"item '{item}' has no neighbours on the night of {night}: is the id right?"
        )
    if as_json:
        print_json(rows)
        return
    table = Table(title=f"items like {printable(item)}, night of {night}")
    for column in ("rank", "item", "name", "score"):
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for row, score in zip(rows, scores([row["score"] for row in rows])):
        table.add_row(
            str(row["rank"]), cell(row["neighbour_id"]), cell(row["neighbour_name"]), score
        )
    console.print(table)
