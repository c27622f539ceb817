"""Stage publish: write the list aside, let the gates look at it, then promote it in one commit."""

from __future__ import annotations

from functools import partial

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import features
from recspark.data.interactions import before, decayed_item_weights
from recspark.errors import GateRefusedError, ModelError
from recspark.eval.evaluate import MetricRow
from recspark.eval.gates import Gate, audit, publish_gates
from recspark.hybrid.ladder import fill, ladder_steps
from recspark.models.registry import spec_of
from recspark.pipeline.activity import LISTS_CODE, active, kept_lists, lists_code
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever
from recspark.pipeline.maintain import forget
from recspark.pipeline.promote import own_publish, promote
from recspark.pipeline.runlog import StageResult
from recspark.session import together
from recspark.tables.catalog import TableVersion, retried

EVERYONE = "everyone"
# Half-life of what default lists count, days. `popular` over the last 14 days was the best plain
# baseline on the bundled shop (docs/metrics.md); 7 days of half-life weigh about as much.
DEFAULT_HALF_LIFE_DAYS = 7.0


def publish(context: RunContext) -> StageResult:
    """Audit tonight's lists and promote them; raise GateRefusedError and keep the last ones
    otherwise.
    """
    config = context.config
    before_ = own_publish(context)
    mine = before(context.read("histories"), context.cutoff)
    answered = active(mine, context.cutoff, config.publish.active_days).select("user_idx", "seen")
    items = item_names(context)
    known = context.read("item_features").where(F.col("cutoff") == F.lit(context.cutoff))
    staged = stage_lists(context, answered, items)
    gates = judge(context, staged, answered, known)
    gate_rows = context.spark.createDataFrame(
        [
            (context.run_id, context.run_date, g.name, g.value, g.threshold, g.passed, g.detail)
            for g in gates
        ],
        schema.GATES,
    )
    outputs = {"gates": retried(lambda: write_gates(context, gate_rows)).version}
    refused = [g for g in gates if not g.passed]
    if refused:
        said = "; ".join(f"{g.name}: {g.detail}" for g in refused)
        raise GateRefusedError(
            f"night {context.run_date}, run {context.run_id}: {said}. Nothing was promoted, the last good "
            "lists stay; the refused list is in table staged_recommendations"
        )
    beside = {
        "default_recommendations": default_lists(context, mine, items),
        "item_neighbours": neighbour_lists(context, items),
    }
    for written in together(
        context.spark,
        *[partial(promote, context, table, rows, before_) for table, rows in beside.items()],
    ):
        outputs[written.table] = written.version
    promoted = promote(context, "recommendations", staged, before_)
    outputs["recommendations"] = promoted.version
    forget(context)
    detail = {"gates": {g.name: g.passed for g in gates}, LISTS_CODE: lists_code(context)}
    return StageResult(outputs, answered.count(), promoted.rows, detail)


def write_gates(context: RunContext, rows: DataFrame) -> TableVersion:
    """Write this run's verdicts beside those of the night's other runs."""
    catalog = context.catalog
    seen = catalog.version("gates")
    others = catalog.read("gates", seen).where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("run_id") != context.run_id)
    )
    night = {"run_date": context.run_date}
    return catalog.replace_slice(
        "gates", others.unionByName(rows), night, expected=seen, whole=False
    )


def item_names(context: RunContext) -> DataFrame:
    """Return `item_idx, item_id, item_name` of every item; a source without catalogue has no names."""
    names = features.items_as_of(context.read("items"), context.cutoff)
    return (
        context.read("item_ids")
        .select("item_idx", "item_id")
        .join(names.select("item_idx", "item_name"), on="item_idx", how="left")
    )


def stage_lists(context: RunContext, answered: DataFrame, items: DataFrame) -> DataFrame:
    """Write tonight's ladder to `staged_recommendations`; return the rows written."""
    config, catalog = context.config, context.catalog
    candidates = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("cutoff") == F.lit(context.cutoff))
    )
    mode = config.publish.mode
    lists = fill(
        ladder_steps(config.publish.steps, candidates, mode),
        answered.select("user_idx"),
        config.publish.k,
        kept_lists(context),
    )
    written = catalog.replace_slice(
        "staged_recommendations", named(context, lists, items), {"run_date": context.run_date}
    )
    return catalog.read("staged_recommendations", written.version).where(
        F.col("run_date") == F.lit(context.run_date)
    )


def named(context: RunContext, lists: DataFrame, items: DataFrame) -> DataFrame:
    """Return `schema.RECOMMENDATIONS` of lists in integers: ids and names as of tonight."""
    names = F.broadcast(items.select("item_idx", "item_id", "item_name"))
    columns = lists.select("user_idx", "item_idx", "rank", "score", "model", "source")
    return (
        columns.join(
            context.read("user_ids").select("user_id", "user_idx"), on="user_idx", how="inner"
        )
        .join(names, on="item_idx", how="left")
        .withColumn("run_date", F.lit(context.run_date))
        .select(*schema.RECOMMENDATIONS.names)
    )


def judge(
    context: RunContext, staged: DataFrame, answered: DataFrame, known: DataFrame
) -> list[Gate]:
    """Return the gates' verdicts on the staged lists."""
    config = context.config
    users = context.read("user_ids").select("user_id", "user_idx")
    items = F.broadcast(context.read("item_ids").select("item_id", "item_idx"))
    lists = staged.join(users, on="user_id", how="left").join(items, on="item_id", how="left")
    counts = audit(lists, answered, known.select("item_idx"), config.publish.k, config.publish.mode)
    rows = context.read("metrics").where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("kind") == "backtest")
    )
    measured = [MetricRow(**row.asDict()) for row in rows.where("model = 'published'").collect()]
    return publish_gates(
        counts, config.publish, measured, config.evaluate.metric, config.evaluate.ks[0]
    )


def default_lists(context: RunContext, mine: DataFrame, items: DataFrame) -> DataFrame:
    """Return the lists for users without one: what everyone, and each activity segment, takes now."""
    segments = context.read("user_features").where(F.col("cutoff") == F.lit(context.cutoff))
    both = F.explode(F.array(F.lit(EVERYONE), F.col("activity"))).alias("segment")
    users = mine.join(segments.select("user_idx", "activity"), on="user_idx", how="inner")
    weights = decayed_item_weights(
        users.select("history", both), context.cutoff, DEFAULT_HALF_LIFE_DAYS, by=("segment",)
    )
    order = Window.partitionBy("segment").orderBy(F.desc("weight"), "item_idx")
    return (
        weights.withColumn("rank", F.row_number().over(order))
        .where(F.col("rank") <= context.config.publish.k)
        .join(
            F.broadcast(items.select("item_idx", "item_id", "item_name")), on="item_idx", how="left"
        )
        .select(
            F.lit(context.run_date).alias("run_date"),
            "segment",
            "rank",
            "item_id",
            "item_name",
            F.col("weight").cast("float").alias("score"),
        )
    )


def neighbour_lists(context: RunContext, items: DataFrame) -> DataFrame:
    """Return `schema.ITEM_NEIGHBOURS` of the neighbours' model; no rows where there is none."""
    settings = context.config.publish
    model = settings.neighbours_model
    if model is None:
        return context.spark.createDataFrame([], schema.ITEM_NEIGHBOURS)
    if "neighbours" not in spec_of(model, context.config.settings_of(model)).tags:
        raise ModelError(f"publish.neighbours_model = '{model}' gives no neighbours")
    found = load_retriever(context, model, context.cutoff).neighbours(settings.n_neighbours)
    names = items.select("item_idx", "item_id", "item_name")
    theirs = names.select(
        F.col("item_idx").alias("neighbour_idx"),
        F.col("item_id").alias("neighbour_id"),
        F.col("item_name").alias("neighbour_name"),
    )
    return (
        found.join(F.broadcast(names.select("item_idx", "item_id")), on="item_idx", how="inner")
        .join(F.broadcast(theirs), on="neighbour_idx", how="inner")
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
