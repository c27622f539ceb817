"""The night on one screen: tables, evaluation, seconds per stage, and the lists of three users
beside what they bought.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pyspark.sql import functions as F
from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from recspark.config import Config, is_backtest_model
from recspark.models.registry import lists_only_own_items
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import not_compared
from recspark.pipeline.plan import STAGES
from recspark.pipeline.runlog import OK
from recspark.report.answers import bought, cell, sizes, table_of_tables, user_lists
from recspark.tables.reader import Reader
from recspark.tables.spark_reader import reader_of
from recspark.terminal import printable

_SHOWN_METRICS = (
    "ndcg",
    "recall",
    "recall_capped",
    "precision",
    "map",
    "mrr",
    "hit_rate",
    "coverage",
)
_CONCENTRATION = (
    "top20_share",
    "most_listed_share",
    "gini",
    "coverage",
    "intra_list_diversity",
)


def print_night(context: RunContext, console: Console) -> list[str]:
    """Print what the night of `context` made; return the users whose lists are shown.

    Runs small jobs; collects only what is shown.
    """
    tables = reader_of(context.catalog)
    console.print(table_of_tables(sizes(tables)))
    for mode in ("novel", "repeat"):
        console.print(evaluation_table(context, mode))
    for mode in sorted({one.mode for one in context.config.publish.published_lists}):
        console.print(concentration_table(context, mode))
    for model, reason in not_compared(context).items():
        console.print(f"{model} is not compared: {reason}", markup=False)
    console.print(seconds_table(context))
    users = example_users(context)
    for user in users:
        console.print(user_panel(context, tables, user))
    return users


def evaluation_table(context: RunContext, mode: str) -> Table:
    """Return the backtest of one mode as a table: for every model the metrics at k, and the
    interval of its NDCG difference to the baseline.

    Models that list nothing in this mode by design have no row; the caption names them.
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
    cutoff_date = context.cutoffs.backtest.date()
    description = f"{settings.horizon_days} days, {n_users:,} users, lists of {k}"
    table = Table(
        title=f"backtest, {mode}: cutoff {cutoff_date}, {description if by_model else 'nothing to compare yet'}",
        caption=f"all at k = {k}; interval: paired bootstrap of the users",
    )
    table.add_column("model")
    for name in _SHOWN_METRICS:
        table.add_column(name, justify="right")
    table.add_column(f"NDCG - {settings.baseline} [95 % interval]", justify="right", no_wrap=True)
    silent_models = models_that_list_nothing(context.config, mode) & {*by_model}
    for model in in_order(by_model, context.config):
        if model in silent_models:  # its metrics are all 0
            continue
        metrics_of_model = by_model[model]
        ndcg = metrics_of_model.get("ndcg")
        interval = ""
        if ndcg is not None and ndcg["ci_low"] is not None and model != settings.baseline:
            interval = f"{ndcg['diff']:+.4f} [{ndcg['ci_low']:+.4f}, {ndcg['ci_high']:+.4f}]"
        cells = [
            f"{metrics_of_model[m]['value']:.4f}" if m in metrics_of_model else ""
            for m in _SHOWN_METRICS
        ]
        table.add_row(cell(model), *cells, interval)
    lines = below_baseline(by_model, settings.baseline, silent_models)
    lines += [
        f"{model} lists only items that the user acted on, so nothing in mode {mode}"
        for model in sorted(silent_models)
    ]
    table.caption = "\n".join([str(table.caption), *lines])
    return table


def in_order(models: Iterable[str], config: Config) -> list[str]:
    """Return `models` in the order of the settings; the published lists come last, each as the
    ladder fills it and then as its rules leave it.
    """
    order = list(config.models)
    for published_list in config.publish.published_lists:
        order += [published_list.before_rules, published_list.backtest_model]
    return sorted(models, key=lambda model: order.index(model) if model in order else len(order))


def concentration_table(context: RunContext, mode: str) -> Table:
    """Return how few items fill the lists of the backtest in one mode, by model.

    A published list that has rules is there before and after them.
    """
    settings = context.config.evaluate
    k = settings.ks[0]
    metrics = context.catalog.read("metrics", context.catalog.version("metrics"))
    rows = metrics.where(
        (F.col("run_date") == F.lit(context.run_date))
        & (F.col("kind") == "backtest")
        & (F.col("mode") == mode)
        & (F.col("segment") == "all")
        & (F.col("k") == k)
        & F.col("metric").isin(*_CONCENTRATION)
    ).collect()
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["value"] is not None:
            values.setdefault(row["model"], {})[row["metric"]] = row["value"]
    table = Table(
        title=f"which items fill the lists, {mode}",
        caption=f"lists of {k}: share of all places that the 20 most listed items have, share of "
        "lists with the most listed item, Gini index over all items",
    )
    table.add_column("model")
    for name in _CONCENTRATION:
        table.add_column(name, justify="right")
    for model in in_order(values, context.config):
        cells = [
            f"{values[model][name]:.4f}" if name in values[model] else "" for name in _CONCENTRATION
        ]
        table.add_row(cell(model), *cells)
    return table


def models_that_list_nothing(config: Config, mode: str) -> set[str]:
    """Return the night's models that list nothing in this mode by design.

    In mode novel, these are the models that list only items that the user acted on.
    """
    if mode != "novel":
        return set()
    return {
        model for model in config.models if lists_only_own_items(model, config.settings_of(model))
    }


def below_baseline(
    by_model: Mapping[str, Mapping[str, Any]], baseline: str, silent_models: Collection[str] = ()
) -> list[str]:
    """Return one line for each model whose NDCG in this backtest is below the baseline, or not
    above it.

    `by_model` : model -> metric -> row of `metrics`. Models without an interval and the published
    lists are left out, and so are `silent_models`, which list nothing in this mode by design: no
    setting would help.
    Example: an interval [-0.02, -0.01] is below the baseline, [-0.01, 0.02] is no better than the
    baseline.
    """
    lines = []
    for model, metrics_of_model in by_model.items():
        ndcg = metrics_of_model.get("ndcg")
        if (
            model in (baseline, *silent_models)
            or is_backtest_model(model)
            or ndcg is None
            or ndcg["ci_low"] is None
            or ndcg["ci_low"] > 0
        ):
            continue
        comparison = "below" if ndcg["ci_high"] < 0 else "no better than"
        lines.append(
            f"{model} is {comparison} {baseline} here: choose its settings (recspark tune {model}) or leave it out"
        )
    return lines


def seconds_table(context: RunContext) -> Table:
    """Return a table with the seconds and rows of each stage."""
    table = Table(title=f"stages of {context.run_date}, run {context.run_id}")
    for column in ("stage", "model", "rows in", "rows out", "seconds", "peak MB"):
        table.add_column(column, justify="left" if column in ("stage", "model") else "right")
    catalog = context.catalog
    rows = catalog.read("runs", catalog.version("runs")).where(F.col("run_id") == context.run_id)
    rows = rows.orderBy("started_at")
    stage_order = {stage.name: i for i, stage in enumerate(STAGES)}
    total = 0.0
    for row in sorted(rows.collect(), key=lambda r: stage_order.get(r["stage"], -1)):
        if row["stage"] not in stage_order:
            continue
        total += row["seconds"]
        table.add_row(
            row["stage"],
            cell(row["model"]),
            f"{row['rows_in']:,}",
            f"{row['rows_out']:,}" if row["status"] == OK else row["status"],
            f"{row['seconds']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
        )
    table.add_section()
    table.add_row("total", "", "", "", f"{total:.1f}", "")
    return table


def example_users(context: RunContext, n_users: int = 3) -> list[str]:
    """Return the user_ids to show: by a fixed rule, one user with few, one with some and one with
    many orders (activity light, regular and heavy).

    Of each activity it is the user with the most recent event, and of several the one with the
    smallest user_id. Only users with a list of tonight are picked, and at most `n_users`.
    """
    features = context.catalog.read("user_features", context.catalog.version("user_features"))
    user_ids = context.catalog.read("user_ids", context.catalog.version("user_ids"))
    published = context.catalog.read("recommendations", context.catalog.version("recommendations"))
    users_of_tonight = (
        published.where(F.col("run_date") == F.lit(context.run_date)).select("user_id").distinct()
    )
    users_with_list = (
        features.where(F.col("cutoff") == F.lit(context.cutoffs.tonight))
        .join(user_ids, on="user_idx", how="inner")
        .join(users_of_tonight, on="user_id", how="left_semi")
    )
    user_per_activity = (
        users_with_list.groupBy("activity")
        .agg(F.min_by("user_id", F.struct("recency_days", "user_id")).alias("user_id"))
        .orderBy(F.expr("array_position(array('light', 'regular', 'heavy'), activity)"))
    )
    return [row["user_id"] for row in user_per_activity.limit(n_users).collect()]


def user_panel(context: RunContext, tables: Reader, user: str) -> Columns:
    """Return one user's lists beside the newest items that they bought."""
    list_tables = []
    for name, rows in user_lists(tables, user, context.run_date).items():
        list_tables.append(Table(title=f"user {printable(user)}: {name}"))
        for column in ("", "item", "name"):
            list_tables[-1].add_column(column)
        for row in rows:
            list_tables[-1].add_row(str(row["rank"]), cell(row["item_id"]), cell(row["item_name"]))
    bought_table = Table(title="bought before, newest first")
    for column in ("date", "item", "name"):
        bought_table.add_column(column)
    for event in bought(tables, user, context.run_date, 10, context.config.sessions):
        bought_table.add_row(
            event["event_at"][:10], cell(event["item_id"]), cell(event["item_name"])
        )
    return Columns([*list_tables, bought_table])
