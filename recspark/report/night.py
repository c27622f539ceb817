"""The night on one screen: tables, evaluation, seconds, and three users' lists beside what they
bought.
"""

from __future__ import annotations

from datetime import date
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from recspark.config import Sessions, cutoff_of
from recspark.data.features import items_as_of
from recspark.data.sessions import is_act
from recspark.errors import TableNotFoundError
from recspark.pipeline.run import STAGES, RunContext
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS

_SHOWN = ("ndcg", "recall", "recall_capped", "precision", "map", "mrr", "hit_rate", "coverage")


def print_night(context: RunContext, console: Console) -> None:
    """Print what the night of `context` made. Runs small jobs; collects only what is shown."""
    console.print(table_of_tables(tables_of(context.catalog)))
    for mode in ("novel", "repeat"):
        console.print(evaluation_table(context, mode))
    console.print(seconds_table(context))
    for user in example_users(context):
        console.print(user_panel(context, user))


def tables_of(catalog: TableCatalog) -> list[dict[str, Any]]:
    """Return name, version, rows, files, MB and place of every table that exists."""
    out = []
    for name, version in catalog.versions().items():
        if SPECS[name].name.startswith("staged_"):
            continue
        size = catalog.size(name)
        rows = catalog.count(name, version)
        out.append(
            {"table": name, "version": version, "rows": rows, **size, "path": catalog.path(name)}
        )
    return out


def table_of_tables(rows: list[dict[str, Any]]) -> Table:
    """Return the tables as a rich table."""
    table = Table(title="tables")
    for column in ("table", "version", "rows", "files", "MB"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for row in rows:
        table.add_row(
            row["table"],
            str(row["version"]),
            f"{row['rows']:,}",
            str(row["files"]),
            f"{row['bytes'] / 1e6:.1f}",
        )
    return table


def evaluation_table(context: RunContext, mode: str) -> Table:
    """Return the backtest of one mode: every model, the metrics at k, and the interval to the
    baseline.
    """
    settings = context.config.evaluate
    k = settings.ks[0]
    metrics = context.catalog.read("metrics", context.catalog.version("metrics"))
    rows = metrics.where(
        (F.col("run_date") == F.lit(context.run_date))
        & (F.col("kind") == "backtest")
        & (F.col("mode") == mode)
        & (F.col("segment") == "warm")
        & (F.col("k") == k)
    ).collect()
    by_model: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["metric"]] = row
    n_users = max((r["n_users"] or 0 for r in rows), default=0)
    until = context.backtest_cutoff.date()
    table = Table(
        title=f"backtest, {mode}: cutoff {until}, {settings.horizon_days} days, "
        f"{n_users:,} users, lists of {k}",
        caption=f"all at k = {k}; interval: paired bootstrap of the users",
    )
    table.add_column("model")
    for name in _SHOWN:
        table.add_column(name, justify="right")
    table.add_column(f"NDCG - {settings.baseline} [95 % interval]", justify="right", no_wrap=True)
    order = [*context.config.models, "published"]
    for model in sorted(by_model, key=lambda m: order.index(m) if m in order else 99):
        found = by_model[model]
        ndcg = found.get("ndcg")
        interval = ""
        if ndcg is not None and ndcg["ci_low"] is not None and model != settings.baseline:
            interval = f"{ndcg['diff']:+.4f} [{ndcg['ci_low']:+.4f}, {ndcg['ci_high']:+.4f}]"
        cells = [f"{found[m]['value']:.4f}" if m in found else "" for m in _SHOWN]
        table.add_row(model, *cells, interval)
    return table


def seconds_table(context: RunContext) -> Table:
    """Return seconds and rows of each stage."""
    table = Table(title=f"stages of {context.run_date}, run {context.run_id}")
    for column in ("stage", "model", "rows in", "rows out", "seconds", "peak MB"):
        table.add_column(column, justify="left" if column in ("stage", "model") else "right")
    catalog = context.catalog
    rows = catalog.read("runs", catalog.version("runs")).where(F.col("run_id") == context.run_id)
    order = {stage.name: i for i, stage in enumerate(STAGES)}
    total = 0.0
    for row in sorted(rows.collect(), key=lambda r: (order.get(r["stage"], -1), r["started_at"])):
        if row["stage"] not in order:
            continue
        total += row["seconds"]
        table.add_row(
            row["stage"],
            row["model"],
            f"{row['rows_in']:,}",
            f"{row['rows_out']:,}",
            f"{row['seconds']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
        )
    table.add_section()
    table.add_row("total", "", "", "", f"{total:.1f}", "")
    return table


def example_users(context: RunContext, n: int = 3) -> list[str]:
    """Return user_ids to show: one with few, some and many orders, by a fixed rule."""
    features = context.catalog.read("user_features", context.catalog.version("user_features"))
    ids = context.catalog.read("user_ids", context.catalog.version("user_ids"))
    published = context.catalog.read("recommendations", context.catalog.version("recommendations"))
    tonight = (
        published.where(F.col("run_date") == F.lit(context.run_date)).select("user_id").distinct()
    )
    named = (
        features.where(F.col("cutoff") == F.lit(context.cutoff))
        .join(ids, on="user_idx", how="inner")
        .join(tonight, on="user_id", how="left_semi")
    )
    picked = (
        named.groupBy("activity")
        .agg(F.min_by("user_id", F.struct("recency_days", "user_id")).alias("user_id"))
        .orderBy(F.expr("array_position(array('light', 'regular', 'heavy'), activity)"))
    )
    return [row["user_id"] for row in picked.limit(n).collect()]


def user_panel(context: RunContext, user: str) -> Columns:
    """Return one user's list beside the newest things they bought."""
    published = context.catalog.read("recommendations", context.catalog.version("recommendations"))
    rows = user_list(published.where(F.col("run_date") == F.lit(context.run_date)), user)
    left = Table(title=f"user {user}: recommended")
    for column in ("", "item", "name"):
        left.add_column(column)
    for row in rows:
        left.add_row(str(row["rank"]), row["item_id"], row["item_name"] or "")
    right = Table(title="bought before, newest first")
    for column in ("date", "item", "name"):
        right.add_column(column)
    for event in bought(context.catalog, user, str(context.run_date), 10, context.config.sessions):
        right.add_row(event["event_at"][:10], event["item_id"], event["item_name"] or "")
    return Columns([left, right])


def latest_night(rows: DataFrame) -> date:
    """Return the newest run_date in a published table."""
    night = rows.agg(F.max("run_date")).collect()[0][0]
    if night is None:
        raise TableNotFoundError("nothing has been published yet: run `recspark nightly` first")
    found: date = night
    return found


def user_list(recommendations: DataFrame, user: str) -> list[dict[str, Any]]:
    """Return one user's rows by rank."""
    mine = recommendations.where(F.col("user_id") == user).orderBy("rank")
    return [row.asDict() for row in mine.drop("run_date", "user_id").collect()]


def bought(
    catalog: TableCatalog, user: str, night: str, limit: int, sessions: Sessions
) -> list[dict[str, Any]]:
    """Return a user's newest acts up to the night, with item names as of then."""
    cutoff = cutoff_of(date.fromisoformat(str(night)))
    events = catalog.read("events", catalog.version("events"))
    items = items_as_of(catalog.read("items", catalog.version("items")), cutoff)
    mine = (
        events.where((F.col("user_id") == user) & (F.col("event_at") < F.lit(cutoff)))
        .where(is_act(sessions))
        .orderBy(F.desc("event_at"), "event_id")
        .limit(limit)
    )
    names = items.select("item_id", "item_name")
    rows = mine.join(names, on="item_id", how="left").orderBy(F.desc("event_at"), "event_id")
    return [
        {"event_at": str(r["event_at"]), "item_id": r["item_id"], "item_name": r["item_name"]}
        for r in rows.collect()
    ]
