"""`recspark explain USER ITEM`: why an item is in a user's list, or what kept it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from recspark.cli.common import (
    Env,
    Json,
    Set,
    console,
    parse_date,
    print_json,
    reading,
    reading_by_spark,
)
from recspark.report.answers import cell, check_night, latest_night
from recspark.report.explanation import explain as explain_item
from recspark.report.explanation import published_night
from recspark.terminal import printable

if TYPE_CHECKING:
    from recspark.config import Config
    from recspark.report.explanation import PublishedNight

N_FEATURES = 3  # features of a ranker that are shown


def explain(
    user: Annotated[str, typer.Argument(help="user_id, as the source spells it")],
    item: Annotated[str, typer.Argument(help="item_id, as the source spells it")],
    env: Env = "local",
    set_: Set = None,
    run_date: Annotated[
        str | None, typer.Option("--run-date", help="default: the newest night")
    ] = None,
    list_name: Annotated[
        str | None, typer.Option("--list", help="which published list; default: main")
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            help="for a ranker: which features moved the score most (starts Spark, half a minute)"
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Say why an item is in a user's list of a night, or the first thing that kept it out."""
    requested_night = parse_date(run_date) if run_date else None
    with reading(env, set_) as (config, tables):
        if requested_night:
            check_night(tables, requested_night)
        night = published_night(
            tables, requested_night or latest_night(tables, "recommendations"), list_name
        )
        explanation = explain_item(tables, user, item, night)
    if features and explanation["ranker"] is not None:
        explanation["ranker_score"] = _ranker_score(config, night, explanation)
    if as_json:
        print_json(explanation)
    else:
        _print(explanation)


def _ranker_score(
    config: Config, night: PublishedNight, explanation: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the score of the explanation's ranker and its strongest features, as plain values."""
    from recspark.pipeline.ranker_parts import past_context, score_parts

    then = night.config.model_copy(update={"paths": config.paths, "spark": config.spark})
    with reading_by_spark(config) as tables:
        context = past_context(tables.catalog, then, night.run_date, night.run_id)
        parts = score_parts(
            context,
            explanation["ranker"],
            explanation["user_id"],
            explanation["item_id"],
            night.published_list.mode,
        )
        return None if parts is None else parts.to_dict(N_FEATURES)


def _print(explanation: dict[str, Any]) -> None:
    item = printable(explanation["item_id"])
    name = f" {cell(explanation['item_name'])}" if explanation["item_name"] else ""
    console.print(
        f"user {printable(explanation['user_id'])}, item {item}{name}, "
        f"night of {explanation['run_date']}",
        style="bold",
    )
    if explanation["listed"]:
        console.print(
            f"listed: rank {explanation['rank']} of list {explanation['list']}, score "
            f"{explanation['score']:.6g} by {explanation['model']} ({explanation['source']})",
            highlight=False,
        )
        if explanation["rules"]:
            console.print(
                f"let in or raised by: {', '.join(explanation['rules'])}", highlight=False
            )
        _print_reasons(explanation["because"])
    else:
        console.print(f"not listed: {explanation['reason']}", highlight=False)
    if explanation["candidates"]:
        console.print(
            _table(
                "proposed by",
                ("model", "rank", "score"),
                [
                    (row["model"], str(row["rank"]), f"{row['score']:.6g}")
                    for row in explanation["candidates"]
                ],
            )
        )
    if parts := explanation.get("ranker_score"):
        console.print(
            _table(
                f"{explanation['ranker']}: score {parts['score']:.6g}, of which {parts['rest']:.6g} "
                f"without any feature; {len(parts['features'])} of {parts['n_features']} features",
                ("feature", "value", "adds"),
                [
                    (
                        part["feature"],
                        _value(part["value"]),
                        f"{part['adds']:+.6g}",
                    )
                    for part in parts["features"]
                ],
            )
        )


def _print_reasons(because: list[dict[str, Any]] | None) -> None:
    if not because:
        console.print("no item of the user speaks for it", highlight=False)
        return
    console.print(
        _table(
            "because of the user's own items",
            ("share", "item", "name"),
            [
                (
                    f"{100 * reason['share']:.0f} %",
                    cell(reason["item_id"]),
                    cell(reason["item_name"]),
                )
                for reason in because
            ],
        )
    )


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_number = column in ("rank", "score", "share", "value", "adds")
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _value(value: float | str | None) -> str:
    if value is None:
        return "missing"
    return f"{value:.6g}" if isinstance(value, float) else cell(value)
