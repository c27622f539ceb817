"""Stage evaluate: the backtest of tonight's models, and the list published a horizon ago."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Mode
from recspark.data import features
from recspark.data.interactions import before, interactions, queries
from recspark.errors import EmptyDataError
from recspark.eval import evaluate as scoring
from recspark.eval import ratings
from recspark.eval.evaluate import MetricRow
from recspark.eval.metrics import Catalogue
from recspark.hybrid.ladder import fill, ladder_steps
from recspark.models.ratings import predicted
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_model, not_compared, with_what_it_reads
from recspark.pipeline.plan import PUBLISHED, models_of
from recspark.pipeline.promote import own_publish, promote
from recspark.pipeline.runlog import StageResult, published_row
from recspark.pipeline.training_sets import features_as_of
from recspark.session import together
from recspark.tables.catalog import TableVersion

NOT_COMPARED = "not_compared"  # in the detail of the `runs` row: model -> why


def evaluate(context: RunContext) -> StageResult:
    """Write the ladder's backtest lists to `candidates`, and tonight's rows of `metrics`.

    A model that failed, or that had too little before the cutoff, is not compared: `detail` says
    why. Before a shop's first horizon is over there is nothing to compare, and `metrics` holds the
    users and what they bought alone.
    """
    config, catalog = context.config, context.catalog
    began = own_publish(context)
    cutoff, settings = context.backtest_cutoff, context.config.evaluate
    everyone = context.read("histories")
    truths = scoring.truth(everyone, cutoff, settings.horizon_days)
    candidates = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("cutoff") == F.lit(cutoff))
    )
    length = max(config.publish.k, *settings.ks)
    ladder = [
        fill(
            ladder_steps(config.publish.steps, candidates, mode), truths.select("user_idx"), length
        ).select(
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
    users, catalogue_of = people_and_items(context, everyone, cutoff)
    written, items = together(
        context.spark,
        lambda: catalog.replace_slice(
            "candidates",
            ladder[0].unionByName(ladder[1]),
            {"run_date": context.run_date, "model": PUBLISHED},
        ),
        catalogue_of,
    )
    assert isinstance(written, TableVersion)
    assert isinstance(items, Catalogue | None)
    lists = context.read("candidates", {PUBLISHED: written.version}).where(
        (F.col("run_date") == F.lit(context.run_date)) & (F.col("cutoff") == F.lit(cutoff))
    )
    left_out = not_compared(context)
    for model, why in left_out.items():
        context.progress(f"  {model} is not compared: {why}")
    listing = models_of(config, "retriever", "ranker")
    compared = [model for model in listing if model not in left_out]
    steps = set(config.publish.steps)
    if items is None:
        context.progress(f"  nothing to compare yet: no event before {cutoff:%Y-%m-%d}")
        rows = scoring.nobody_known(
            users, settings, run_date=context.run_date, kind="backtest", cutoff=cutoff
        )
    else:
        rows = scoring.evaluate(
            lists,
            users,
            items,
            settings,
            run_date=context.run_date,
            kind="backtest",
            cutoff=cutoff,
            models=(*compared, PUBLISHED) if steps & set(compared) else compared,
        )
    if config.features.explicit:
        rows += rating_rows(context, everyone, compared)
    rows += followup_rows(context, everyone, users, items)
    frame = context.spark.createDataFrame(rows, schema.METRICS)
    metrics = promote(context, "metrics", frame, began)
    outputs = {"candidates": written.version, "metrics": metrics.version}
    detail = {NOT_COMPARED: left_out} if left_out else {}
    return StageResult(outputs, context.count("histories"), metrics.rows, detail)


def people_and_items(
    context: RunContext, everyone: DataFrame, cutoff: datetime
) -> tuple[DataFrame, Callable[[], Catalogue | None]]:
    """Return the population of a cutoff (`scoring.population`), and what gives its catalogue.

    From the feature tables where they have the cutoff; of another one they are made anew.
    """
    horizon = context.config.evaluate.horizon_days
    past = before(everyone, cutoff)
    if cutoff in context.cutoffs:
        features_of_users, items = features_as_of(context, cutoff)
    else:
        features_of_users = features.user_features(past, cutoff)
        seen = past.select(F.explode("seen").alias("item_idx"))
        items = seen.groupBy("item_idx").agg(F.count(F.lit(1)).alias("n_users"))
    known = past.select("user_idx", "seen").join(
        features_of_users.select("user_idx", "activity"), on="user_idx", how="inner"
    )
    users = scoring.population(scoring.truth(everyone, cutoff, horizon), known)
    return users, lambda: known_items(items, past)


def followup_rows(
    context: RunContext, everyone: DataFrame, users: DataFrame, items: Catalogue | None
) -> list[MetricRow]:
    """Return what became of the list published a horizon ago; [] where there is none.

    `users`, `items` : of the backtest, whose cutoff is the same where each night has its own.
    """
    past = published_lists(context)
    cutoff = context.followup_cutoff
    if past is not None and cutoff != context.backtest_cutoff:
        users, catalogue_of = people_and_items(context, everyone, cutoff)
        items = catalogue_of()
    if past is None or items is None:
        return []
    mode, lists = past
    return scoring.evaluate(
        lists,
        users,
        items,
        context.config.evaluate,
        run_date=context.run_date,
        kind="followup",
        cutoff=cutoff,
        models=(PUBLISHED,),
        modes=(mode,),
    )


def known_items(items: DataFrame, users: DataFrame) -> Catalogue | None:
    """Return the catalogue of the backtest; None where no item has an event before its cutoff."""
    try:
        return scoring.catalogue(items, users)
    except EmptyDataError:
        return None


def rating_rows(context: RunContext, everyone: DataFrame, models: Sequence[str]) -> list[MetricRow]:
    """Return rmse and mae of each of `models` that predicts ratings, of items new to the user; k is
    0.

    `n_unknown_ratings` counts the pairs that a model knew nothing of: the mean rating stood for them.
    """
    cutoff, horizon = context.backtest_cutoff, context.config.evaluate.horizon_days
    wanted = ratings.ratings_of(everyone, cutoff, horizon)
    earlier = before(everyone, cutoff, keep_empty=True, ratings=True)
    asked = queries(earlier, "repeat").join(wanted, on="user_idx", how="inner")
    guesses = {
        name: predicted(model, with_what_it_reads(context, model, asked))
        for name in models
        if (model := load_model(context, name, cutoff)).rates
    }
    if not guesses:
        return []
    rated = interactions(before(everyone, cutoff, ratings=True), cutoff, None)
    known = ratings.scale(rated)
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


def published_lists(context: RunContext) -> tuple[Mode, DataFrame] | None:
    """Return the list published a horizon ago as `model, mode, user_idx, item_idx, rank`, and the
    mode that it was published in: that of the settings then. None where there is no such list.
    """
    night = context.run_date - timedelta(days=context.config.evaluate.horizon_days)
    if context.version("recommendations") is None:
        return None
    rows = context.read("recommendations").where(F.col("run_date") == F.lit(night))
    if rows.isEmpty():
        return None
    done = published_row(context.catalog, night)
    settings = context.config.publish.model_dump() if done is None else json.loads(done["config"])
    mode: Mode = settings.get("publish", settings)["mode"]
    return mode, (
        rows.join(context.read("user_ids").select("user_id", "user_idx"), on="user_id", how="inner")
        .join(
            F.broadcast(context.read("item_ids").select("item_id", "item_idx")),
            on="item_id",
            how="inner",
        )
        .select(
            F.lit(PUBLISHED).alias("model"),
            F.lit(mode).alias("mode"),
            "user_idx",
            "item_idx",
            "rank",
        )
    )
