"""`recspark show USER`: the lists of a user, beside what the user bought."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, parse_date, print_json, reading
from recspark.errors import UnknownUserError
from recspark.report.answers import bought, cell, check_night, latest_night, scores, user_lists
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
    """Show one user's published lists of a night."""
    requested_night = parse_date(run_date) if run_date else None
    with reading(env, set_) as (config, tables):
        if requested_night:
            check_night(tables, requested_night)
        night = requested_night or latest_night(tables, "recommendations")
        lists = user_lists(tables, user, night)
        recent_events = bought(tables, user, night, 10, config.sessions)
    if not lists and not recent_events:
        raise UnknownUserError(
            f"user '{user}' has neither events nor a list on the night of {night}; "
            "everyone else gets default_recommendations"
        )
    if as_json:
        rows = [row for rows_of_list in lists.values() for row in rows_of_list]
        print_json(
            {"user_id": user, "run_date": night, "recommendations": rows, "bought": recent_events}
        )
        return
    if not lists:
        console.print(
            f"user {printable(user)} has no list of the night of {night}: default_recommendations "
            "is for everyone without one",
            markup=False,
        )
    for name, rows in lists.items():
        console.print(list_table(f"user {printable(user)}, night of {night}, list {name}", rows))
    console.print("newest events", style="bold")
    for event in recent_events:
        item, name = cell(event["item_id"]), cell(event["item_name"])
        console.print(f"  {event['event_at'][:10]}  {item:<8} {name}", highlight=False)


def list_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return one list of a user, as `answers.user_lists` gives it, as a table."""
    table = Table(title=title)
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
    return table
