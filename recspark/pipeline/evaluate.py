"""Stage evaluate: the backtest of tonight's models, and the list published a horizon ago."""

from __future__ import annotations

from datetime import timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Config
from recspark.data.interactions import before, queries
from recspark.eval import evaluate as scoring
from recspark.eval import ratings
from recspark.eval.evaluate import MetricRow
from recspark.eval.metrics import Catalogue
from recspark.hybrid.ladder import fill
from recspark.models.ratings import predicted
from recspark.pipeline.run import RunContext, StageResult
from recspark.pipeline.train import load_model
from recspark.session import together
from recspark.tables.catalog import TableVersion

PUBLISHED = "published"  # the model name of the list that is, or would have been, published


def evaluate(context: RunContext) -> StageResult:
    """Write the ladder's backtest lists to `candidates`, and tonight's rows of `metrics`."""
    config, catalog = context.config, context.catalog
    cutoff, settings = context.backtest_cutoff, context.config.evaluate
    everyone = context.read("histories")
    truths = scoring.truth(everyone, cutoff, settings.horizon_days)
    candidates = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("cutoff") == F.lit(cutoff))
    )
    length = max(config.publish.k, *settings.ks)
    ladder = [
        fill(ladder_steps(config, candidates, mode), truths.select("user_idx"), length).select(
            F.lit(context.run_date).alias("run_date"),
            F.lit(cutoff).alias("cutoff"),
            F.lit(PUBLISHED).alias("model"),
            F.lit(mode).alias("mode"),
            "user_idx",
            "item_idx",
            "rank",
            "score",
        )
        for mode in schema.MODES
    ]
    at = F.col("cutoff") == F.lit(cutoff)
    written, items = together(
        context.spark,
        lambda: catalog.replace_slice(
            "candidates",
            ladder[0].unionByName(ladder[1]),
            {"run_date": context.run_date, "model": PUBLISHED},
        ),
        lambda: scoring.catalogue(
            context.read("item_features").where(at), context.read("interactions").where(at)
        ),
    )
    assert isinstance(written, TableVersion)
    assert isinstance(items, Catalogue)
    lists = catalog.read("candidates", written.version).where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("cutoff") == F.lit(cutoff))
    )
    activity = context.read("user_features").where(at).select("user_idx", "activity")
    known = (
        before(everyone, cutoff)
        .select("user_idx", "seen")
        .join(activity, on="user_idx", how="inner")
    )
    users = scoring.population(truths, known)
    rows = scoring.evaluate(
        lists,
        users,
        items,
        settings,
        run_date=context.run_date,
        kind="backtest",
        cutoff=cutoff,
        models=(*config.models, PUBLISHED),
    )
    if config.features.explicit:
        rows += rating_rows(context, everyone)
    past = published_lists(context)
    if past is not None:
        rows += scoring.evaluate(
            past,
            users,
            items,
            settings,
            run_date=context.run_date,
            kind="followup",
            cutoff=cutoff,
            models=(PUBLISHED,),
            modes=(config.publish.mode,),
        )
    frame = context.spark.createDataFrame(rows, schema.METRICS)
    metrics = catalog.replace_slice("metrics", frame, {"run_date": context.run_date})
    outputs = {"candidates": written.version, "metrics": metrics.version}
    return StageResult(outputs, context.count("histories"), metrics.rows)


def rating_rows(context: RunContext, everyone: DataFrame) -> list[MetricRow]:
    """Return rmse and mae of each model that predicts ratings, of items new to the user; k is 0.

    `n_unknown_ratings` counts the pairs that a model knew nothing of: the mean rating stood for them.
    """
    cutoff, horizon = context.backtest_cutoff, context.config.evaluate.horizon_days
    wanted = ratings.ratings_of(everyone, cutoff, horizon)
    earlier = before(everyone, cutoff, keep_empty=True, ratings=True)
    asked = queries(earlier, "repeat").join(wanted, on="user_idx", how="inner")
    known = ratings.scale(context.read("interactions").where(F.col("cutoff") == F.lit(cutoff)))
    guesses = {
        name: predicted(model, asked)
        for name in context.config.models
        if (model := load_model(context, name, cutoff)).rates
    }
    found = ratings.errors(guesses, known)
    head = (context.run_date, "backtest", cutoff, horizon)
    return [
        MetricRow(*head, model, "novel", "all", metric, 0, value, errors.n_users)
        for model, errors in found.items()
        for metric, value in (
            ("rmse", errors.rmse),
            ("mae", errors.mae),
            ("n_ratings", float(errors.n_pairs)),
            ("n_unknown_ratings", float(errors.n_unknown)),
        )
    ]


def ladder_steps(config: Config, candidates: DataFrame, mode: str) -> list[tuple[str, DataFrame]]:
    """Return the champion's lists and those of each fallback, of one mode, in the ladder's
    order.
    """
    steps = (config.publish.model, *(m for m in config.publish.ladder if m != config.publish.model))
    return [
        (
            model,
            candidates.where((F.col("model") == model) & (F.col("mode") == mode)).select(
                "user_idx", "item_idx", "rank", "score"
            ),
        )
        for model in steps
    ]


def published_lists(context: RunContext) -> DataFrame | None:
    """Return the list published a horizon ago as `model, mode, user_idx, item_idx, rank`; None if
    none.
    """
    night = context.run_date - timedelta(days=context.config.evaluate.horizon_days)
    if context.version("recommendations") is None:
        return None
    rows = context.read("recommendations").where(F.col("run_date") == F.lit(night))
    if rows.isEmpty():
        return None
    return (
        rows.join(context.read("user_ids").select("user_id", "user_idx"), on="user_id", how="inner")
        .join(
            F.broadcast(context.read("item_ids").select("item_id", "item_idx")),
            on="item_id",
            how="inner",
        )
        .select(
            F.lit(PUBLISHED).alias("model"),
            F.lit(context.config.publish.mode).alias("mode"),
            "user_idx",
            "item_idx",
            "rank",
        )
    )
