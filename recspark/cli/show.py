"""`recspark show USER`: what a user was recommended, beside what they bought."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from pyspark.sql import functions as F
from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, parse_date, reading
from recspark.errors import UnknownUserError


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
    from recspark.report.night import bought, latest_night, user_list

    with reading(env, set_) as (config, catalog):
        recommendations = catalog.read("recommendations", catalog.version("recommendations"))
        night = parse_date(run_date) if run_date else latest_night(recommendations)
        rows = user_list(
            recommendations.where(F.col("run_date") == F.lit(night).cast("date")), user
        )
        recent = bought(catalog, user, str(night), 10, config.sessions)
        if not rows and not recent:
            raise UnknownUserError(
                f"user '{user}' has neither events nor a list on the night of {night}; "
                "everyone else gets default_recommendations"
            )
        if as_json:
            print(
                json.dumps(
                    {
                        "user_id": user,
                        "run_date": str(night),
                        "recommendations": rows,
                        "bought": recent,
                    }
                )
            )
            return
        table = Table(title=f"user {user}, night of {night}")
        for column in ("rank", "item", "name", "score", "source"):
            table.add_column(column, justify="right" if column in ("rank", "score") else "left")
        for row in rows:
            table.add_row(
                str(row["rank"]),
                row["item_id"],
                row["item_name"],
                f"{row['score']:.4g}",
                row["source"],
            )
        console.print(table)
        console.print("newest events", style="bold")
        for event in recent:
            console.print(
                f"  {event['event_at'][:10]}  {event['item_id']:<8} {event['item_name']}",
                highlight=False,
            )
