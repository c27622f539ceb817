"""`recspark show USER`: the list of a user, beside what the user bought."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, parse_date, print_json, reading
from recspark.errors import UnknownUserError
from recspark.report.answers import bought, cell, check_night, latest_night, scores, user_list
from recspark.terminal import printable


def show(
    user: Annotated[str, typer.Argument(help="user_id, as the source spells it")],
    env: Env = "local",
    set_: Set = None,
    run_date: Annotated[
        str | None, typer.Option("--run-date", help="default: the newest night")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one user's published list of a night."""
    requested_night = parse_date(run_date) if run_date else None
    with reading(env, set_) as (config, tables):
        if requested_night:
            check_night(tables, requested_night)
        night = requested_night or latest_night(tables, "recommendations")
        rows = user_list(tables, user, night)
        recent_events = bought(tables, user, night, 10, config.sessions)
    if not rows and not recent_events:
        raise UnknownUserError(
            f"user '{user}' has neither events nor a list on the night of {night}; "
            "everyone else gets default_recommendations"
        )
    if as_json:
        print_json(
            {"user_id": user, "run_date": night, "recommendations": rows, "bought": recent_events}
        )
        return
    table = Table(title=f"user {printable(user)}, night of {night}")
    for column in ("rank", "item", "name", "score", "source"):
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for row, score in zip(rows, scores([row["score"] for row in rows])):
        table.add_row(
            str(row["rank"]),
            cell(row["item_id"]),
            cell(row["item_name"]),
            score,
            cell(row["source"]),
        )
    console.print(table)
    console.print("newest events", style="bold")
    for event in recent_events:
        item, name = cell(event["item_id"]), cell(event["item_name"])
        console.print(f"  {event['event_at'][:10]}  {item:<8} {name}", highlight=False)
