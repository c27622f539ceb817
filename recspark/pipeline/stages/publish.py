"""Stage publish: write tonight's lists aside, judge them by the gates, then promote them.

A night may publish several lists for each user. They are promoted together, in one commit, or none
of them is. Two things refuse a publish: a gate (`recspark.eval.gates`), and a newer run of the same night
(`recspark.pipeline.promote`).
"""

from __future__ import annotations

from functools import partial, reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import features
from recspark.data.interactions import before
from recspark.errors import GateRefusedError, ModelError
from recspark.eval.evaluate import MetricRow
from recspark.eval.gates import Gate, audit, publish_gates
from recspark.hybrid.default_lists import default_lists
from recspark.hybrid.ladder import ladder_steps
from recspark.hybrid.rules import RERANKED
from recspark.models.registry import spec_of
from recspark.pipeline.activity import LISTS_CODE, active, kept_lists, lists_code
from recspark.pipeline.availability import (
    allowed_of,
    cold_items,
    listable_items,
    unavailable_items,
)
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever
from recspark.pipeline.maintain import forget
from recspark.pipeline.plan import models_of_cold_items
from recspark.pipeline.promote import last_published_at, promote
from recspark.pipeline.reasons import with_because
from recspark.pipeline.rules import NightRules, filled_lists
from recspark.pipeline.runlog import StageResult
from recspark.session import together
from recspark.tables.catalog import TableVersion, retried


def publish(context: RunContext) -> StageResult:
    """Write tonight's lists to `staged_recommendations`, judge them, and promote them if they pass.

    Raises GateRefusedError where a gate refuses one of the lists, and ConfigError where a rule names
    what no item has. All published lists then stay as they are.
    """
    config = context.config
    rules = NightRules(context, context.cutoffs.tonight)
    rules.check(name for one in config.publish.published_lists for name in one.rules)
    published_at_before = last_published_at(context)
    histories = before(context.read("histories"), context.cutoffs.tonight)
    users_to_answer = active(histories, context.cutoffs.tonight, config.publish.active_days).select(
        "user_idx", "seen"
    )
    items = item_names(context)
    unavailable = unavailable_items(context)
    listable = listable_items(context, unavailable)
    staged = stage_lists(context, users_to_answer, items, rules)
    cold = None
    if models_of_cold_items(config):
        cold = cold_items(context, context.cutoffs.tonight, unavailable)
    gates_of_lists = judge(context, staged, users_to_answer, listable, cold)
    gate_rows = context.spark.createDataFrame(
        [
            (
                context.run_id,
                context.run_date,
                name,
                gate.name,
                gate.value,
                gate.threshold,
                gate.passed,
                gate.detail,
            )
            for name, gates in gates_of_lists.items()
            for gate in gates
        ],
        schema.GATES,
    )
    outputs = {"gates": retried(lambda: write_gates(context, gate_rows)).version}
    refused = {
        name: [gate for gate in gates if not gate.passed] for name, gates in gates_of_lists.items()
    }
    if reasons := [
        f"list {name}, {gate.name}: {gate.detail}"
        for name, gates in refused.items()
        for gate in gates
    ]:
        raise GateRefusedError(
            f"night {context.run_date}, run {context.run_id}: {'; '.join(reasons)}. Nothing was "
            "promoted, the last good lists stay, all of them; tonight's are in table "
            "staged_recommendations"
        )
    rows_by_table = {
        "default_recommendations": named_default_lists(context, histories, items, unavailable),
        "item_neighbours": neighbour_lists(context, items, unavailable),
    }
    for written in together(
        context.spark,
        *[
            partial(promote, context, table, rows, published_at_before)
            for table, rows in rows_by_table.items()
        ],
    ):
        outputs[written.table] = written.version
    promoted = promote(context, "recommendations", staged, published_at_before)
    outputs["recommendations"] = promoted.version
    forget(context)
    passed = {
        name: {gate.name: gate.passed for gate in gates} for name, gates in gates_of_lists.items()
    }
    detail = {"gates": passed, LISTS_CODE: lists_code(context)}
    return StageResult(outputs, users_to_answer.count(), promoted.rows, detail)


def write_gates(context: RunContext, rows: DataFrame) -> TableVersion:
    """Write this run's verdicts to `gates`, beside those of the night's other runs.

    The slice of a night holds the verdicts of all its runs. Where another run writes its verdicts
    first, Delta refuses the commit, and the caller tries again.
    """
    catalog = context.catalog
    version_read = catalog.version("gates")
    rows_of_other_runs = catalog.read("gates", version_read).where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("run_id") != context.run_id)
    )
    night = {"run_date": context.run_date}
    return catalog.replace_slice(
        "gates",
        rows_of_other_runs.unionByName(rows),
        night,
        expected=version_read,
        any_commit_conflicts=False,
    )


def item_names(context: RunContext) -> DataFrame:
    """Return `item_idx, item_id, item_name` of every item; the name is null without a catalogue."""
    names = features.items_as_of(context.read("items"), context.cutoffs.tonight)
    return (
        context.read("item_ids")
        .select("item_idx", "item_id")
        .join(names.select("item_idx", "item_name"), on="item_idx", how="left")
    )


def stage_lists(
    context: RunContext, users_to_answer: DataFrame, items: DataFrame, rules: NightRules
) -> DataFrame:
    """Fill each published list for each user of `users_to_answer`, re-rank it by its rules, and write
    the lists to `staged_recommendations`.

    Returns the rows written. `items` : as `item_names` returns them. `rules` : as of tonight.
    """
    catalog = context.catalog
    candidates = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date))
        & (F.col("cutoff") == F.lit(context.cutoffs.tonight))
    )
    kept = kept_lists(context)
    lists_by_name = [
        filled_lists(
            context,
            ladder_steps(published_list.steps, candidates, published_list.mode),
            users_to_answer.select("user_idx"),
            published_list.k,
            context.cutoffs.tonight,
            None if kept is None else kept.where(F.col("list") == F.lit(published_list.name)),
            rules.book(published_list.rules),
        ).select(F.lit(published_list.name).alias("list"), *RERANKED.names)
        for published_list in context.config.publish.published_lists
    ]
    lists = reduce(DataFrame.unionByName, lists_by_name)
    written = catalog.replace_slice(
        "staged_recommendations", with_names(context, lists, items), {"run_date": context.run_date}
    )
    return catalog.read("staged_recommendations", written.version).where(
        F.col("run_date") == F.lit(context.run_date)
    )


def with_names(context: RunContext, lists: DataFrame, items: DataFrame) -> DataFrame:
    """Return `lists` as `schema.RECOMMENDATIONS`: ids instead of integers, item names, reasons."""
    names = context.item_sized(items.select("item_idx", "item_id", "item_name"))
    list_columns = lists.select("list", *RERANKED.names)
    # Users are joined first, because the lists are still partitioned by user here.
    lists_of_users = list_columns.join(
        context.read("user_ids").select("user_id", "user_idx"), on="user_idx", how="inner"
    )
    return (
        with_because(context, lists_of_users, items, context.config.publish.steps)
        .join(names, on="item_idx", how="left")
        .withColumn("run_date", F.lit(context.run_date))
        .select(*schema.RECOMMENDATIONS.names)
    )


def judge(
    context: RunContext,
    staged: DataFrame,
    users_to_answer: DataFrame,
    listable: DataFrame,
    cold: DataFrame | None,
) -> dict[str, list[Gate]]:
    """Return, by the name of each published list, the verdicts of the gates on its staged rows.

    Parameters
    ----------
    staged : the lists, as `stage_lists` returns them
    users_to_answer : user_idx, seen: the users who must get each of the lists
    listable : item_idx: the items with events that may be listed
    cold : item_idx: the items without events that may be listed; None = no model knows them

    Cost: one job for each list, side by side, and one for the metrics.
    """
    config = context.config
    published_lists = config.publish.published_lists
    users = context.read("user_ids").select("user_id", "user_idx")
    items = context.item_sized(context.read("item_ids").select("item_id", "item_idx"))
    rows = staged.join(users, on="user_id", how="left").join(items, on="item_id", how="left")
    counts_of_lists = together(
        context.spark,
        *[
            partial(
                audit,
                rows.where(F.col("list") == F.lit(published_list.name)),
                users_to_answer,
                listable,
                published_list.k,
                published_list.mode,
                broadcast_items=context.has_few_items,
                cold_items=cold,
            )
            for published_list in published_lists
        ],
    )
    metrics = context.read("metrics").where(
        (F.col("run_date") == F.lit(context.run_date))
        & (F.col("kind") == "backtest")
        & F.col("model").isin(*[one.judged_model for one in published_lists])
    )
    metric_rows = [MetricRow(**row.asDict()) for row in metrics.collect()]
    return {
        published_list.name: publish_gates(
            counts, published_list, metric_rows, config.evaluate.metric, config.evaluate.ks[0]
        )
        for published_list, counts in zip(published_lists, counts_of_lists, strict=True)
    }


def named_default_lists(
    context: RunContext, histories: DataFrame, items: DataFrame, unavailable: DataFrame | None
) -> DataFrame:
    """Return `schema.DEFAULT_RECOMMENDATIONS`: the lists of `hybrid.default_lists`, with names.

    There is one default list for each segment, of `publish.k` items, however many lists a night
    publishes: it is for users without events, or without any for a long time, so there is nothing
    that they would buy again.

    `histories` are cut at tonight's cutoff. `items` : as `item_names` returns them. `unavailable` :
    as `availability.unavailable_items` returns them; they are not listed.
    """
    cutoff = context.cutoffs.tonight
    user_features = context.read("user_features").where(F.col("cutoff") == F.lit(cutoff))
    lists = default_lists(histories, user_features, cutoff, context.config.publish.k, unavailable)
    names = context.item_sized(items.select("item_idx", "item_id", "item_name"))
    return lists.join(names, on="item_idx", how="left").select(
        F.lit(context.run_date).alias("run_date"),
        "segment",
        "rank",
        "item_id",
        "item_name",
        F.col("weight").cast("float").alias("score"),
    )


def neighbour_lists(
    context: RunContext, items: DataFrame, unavailable: DataFrame | None
) -> DataFrame:
    """Return `schema.ITEM_NEIGHBOURS`: the nearest items of each item, by
    `publish.neighbours_model`.

    An item of `unavailable` (as `availability.unavailable_items` returns them) is no neighbour. No
    rows where the settings name no such model. Raises ModelError where the model gives no
    neighbours.
    """
    settings = context.config.publish
    model = settings.neighbours_model
    if model is None:
        return context.spark.createDataFrame([], schema.ITEM_NEIGHBOURS)
    if "neighbours" not in spec_of(model, context.config.settings_of(model)).tags:
        raise ModelError(f"publish.neighbours_model = '{model}' gives no neighbours")
    fitted = load_retriever(context, model, context.cutoffs.tonight)
    neighbours = fitted.neighbours(settings.n_neighbours, allowed_of(fitted.items, unavailable))
    names = items.select("item_idx", "item_id", "item_name")
    names_of_neighbours = names.select(
        F.col("item_idx").alias("neighbour_idx"),
        F.col("item_id").alias("neighbour_id"),
        F.col("item_name").alias("neighbour_name"),
    )
    return (
        neighbours.join(
            context.item_sized(names.select("item_idx", "item_id")), on="item_idx", how="inner"
        )
        .join(context.item_sized(names_of_neighbours), on="neighbour_idx", how="inner")
        .select(
            F.lit(context.run_date).alias("run_date"),
            "item_id",
            "rank",
            "neighbour_id",
            "neighbour_name",
            "score",
            F.lit(model).alias("model"),
        )
    )
