"""Stage evaluate: the backtest of tonight's models, and the lists published a horizon ago."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import reduce
from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Config, Mode, PublishedList, lists_of
from recspark.data import features
from recspark.data.interactions import before, interactions, queries
from recspark.errors import EmptyDataError
from recspark.eval import evaluate as scoring
from recspark.eval import ratings
from recspark.eval.evaluate import MetricRow
from recspark.eval.metrics import Catalogue
from recspark.hybrid.ladder import ladder_steps
from recspark.hybrid.rules import RuleBook
from recspark.models.ratings import predicted
from recspark.pipeline.availability import cold_items
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    load_model,
    load_retriever,
    not_compared,
    with_user_features,
)
from recspark.pipeline.plan import models_of, models_of_cold_items
from recspark.pipeline.promote import last_published_at, promote
from recspark.pipeline.rules import NightRules, filled_lists
from recspark.pipeline.runlog import StageResult, published_row
from recspark.pipeline.training_sets import features_as_of
from recspark.session import together
from recspark.tables.catalog import TableVersion

NOT_COMPARED = "not_compared"  # in the detail of the `runs` row: model -> why


def evaluate(context: RunContext) -> StageResult:
    """Write the ladder's backtest lists to `candidates`, and tonight's rows of `metrics`.

    A model that failed, or that had too little to learn from before the cutoff, is not compared:
    `detail` says why. While a shop is younger than a horizon there is nothing to compare, and
    `metrics` counts only the users and what they bought.
    """
    with context.scratch_folder("evaluate") as folder:
        return _evaluated(context, folder)


def _evaluated(context: RunContext, folder: str) -> StageResult:
    """Do the work of `evaluate`; the vectors of catalogues are files below the URI `folder`."""
    began = last_published_at(context)
    cutoff, horizon_days = context.cutoffs.backtest, context.config.evaluate.horizon_days
    histories = context.read("histories")
    truths = scoring.truth(histories, cutoff, horizon_days)
    users, catalogue_of = users_and_catalogue(context, histories, cutoff, folder)
    rules, published_lists = NightRules(context, cutoff), context.config.publish.published_lists
    books = {one.name: rules.book(one.rules) for one in published_lists}
    written, items = together(
        context.spark, lambda: write_ladder(context, truths, cutoff, books), catalogue_of
    )
    assert isinstance(written, TableVersion)
    assert isinstance(items, Catalogue | None)
    left_out = not_compared(context)
    for model, why in left_out.items():
        context.progress(f"  {model} is not compared: {why}")
    compared = [
        model for model in models_of(context.config, "retriever", "ranker") if model not in left_out
    ]
    lists_before_rules = [
        ladder_lists(context, truths, cutoff, one).withColumn("model", F.lit(one.before_rules))
        for one in published_lists
        if one.rules
    ]
    before_rules = reduce(DataFrame.unionByName, lists_before_rules) if lists_before_rules else None
    rows = backtest_rows(context, written, users, items, compared, before_rules)
    rows += cold_item_rows(context, histories, users, written, compared)
    if context.config.features.explicit:
        rows += rating_rows(context, histories, compared)
    rows += followup_rows(context, histories, users, items, folder)
    frame = context.spark.createDataFrame(rows, schema.METRICS)
    metrics = promote(context, "metrics", frame, began)
    outputs = {"candidates": written.version, "metrics": metrics.version}
    detail = {NOT_COMPARED: left_out} if left_out else {}
    return StageResult(outputs, context.count("histories"), metrics.rows, detail)


def write_ladder(
    context: RunContext, truths: DataFrame, cutoff: datetime, books: Mapping[str, RuleBook | None]
) -> TableVersion:
    """Write the lists that would have been published at `cutoff`, in both modes.

    They are rows of `candidates` under the names `PublishedList.backtest_model`, for the users in
    `truths`. One commit. `books` : the rules of each list, as of `cutoff`.
    """
    lists_of_all = [
        ladder_lists(context, truths, cutoff, published_list, books[published_list.name])
        for published_list in context.config.publish.published_lists
    ]
    return context.catalog.replace_slice(
        "candidates",
        reduce(DataFrame.unionByName, lists_of_all),
        {"run_date": context.run_date, "model": context.config.publish.backtest_models},
    )


def ladder_lists(
    context: RunContext,
    truths: DataFrame,
    cutoff: datetime,
    published_list: PublishedList,
    book: RuleBook | None = None,
) -> DataFrame:
    """Return the lists, in both modes, that a ladder makes of the models' backtest lists and that
    the rules of `book` re-rank: rows of `candidates` of the model `published_list.backtest_model`.
    """
    config = context.config
    candidates = _lists_at(context, context.read("candidates"), cutoff)
    users = truths.select("user_idx")
    length = max(published_list.k, *config.evaluate.ks)
    lists_by_mode = [
        filled_lists(
            context,
            ladder_steps(published_list.steps, candidates, mode),
            users,
            length,
            cutoff,
            book=book,
        ).select(
            F.lit(context.run_date).alias("run_date"),
            F.lit(cutoff).alias("cutoff"),
            F.lit(published_list.backtest_model).alias("model"),
            F.lit(mode).alias("mode"),
            "user_idx",
            "item_idx",
            "rank",
            "score",
        )
        for mode in schema.MODES
    ]
    return lists_by_mode[0].unionByName(lists_by_mode[1])


def backtest_rows(
    context: RunContext,
    written: TableVersion,
    users: DataFrame,
    items: Catalogue | None,
    compared: Sequence[str],
    before_rules: DataFrame | None = None,
) -> list[MetricRow]:
    """Return the rows of the backtest for the models in `compared` and for the published lists.

    Parameters
    ----------
    written : the version of `candidates` that has the lists of the ladders
    users, items : as `users_and_catalogue` gives them
    compared : models; a published list is compared where one of its steps is among them
    before_rules : the lists with rules before these re-rank them, as rows of the models
        `PublishedList.before_rules`; None where no list has rules
    """
    cutoff, settings = context.cutoffs.backtest, context.config.evaluate
    if items is None:
        context.progress(f"  nothing to compare yet: no event before {cutoff:%Y-%m-%d}")
        return scoring.nobody_known(
            users, settings, run_date=context.run_date, kind="backtest", cutoff=cutoff
        )
    just_written = dict.fromkeys(context.config.publish.backtest_models, written.version)
    lists = _lists_at(context, context.read("candidates", just_written), cutoff)
    published_lists = compared_lists(context.config, compared)
    names = [published_list.backtest_model for published_list in published_lists]
    if before_rules is not None:
        lists = lists.unionByName(before_rules)
        names += [one.before_rules for one in published_lists if one.rules]
    return rows_of_lists(
        context, lists, users, items, "backtest", cutoff, (*compared, *names), schema.MODES
    )


def compared_lists(config: Config, compared: Sequence[str]) -> list[PublishedList]:
    """Return the published lists one of whose steps is among the models in `compared`."""
    return [
        published_list
        for published_list in config.publish.published_lists
        if not set(compared).isdisjoint(published_list.steps)
    ]


def rows_of_lists(
    context: RunContext,
    lists: DataFrame,
    users: DataFrame,
    items: Catalogue,
    kind: str,
    cutoff: datetime,
    models: Sequence[str],
    modes: Sequence[str],
) -> list[MetricRow]:
    """Return the rows of `scoring.evaluate` and of `scoring.concentration` for the same lists."""
    settings = context.config.evaluate
    head: dict[str, Any] = {"run_date": context.run_date, "kind": kind, "cutoff": cutoff}
    head |= {"models": models, "modes": modes}
    scored, concentrated = together(
        context.spark,
        lambda: scoring.evaluate(lists, users, items, settings, **head),
        lambda: scoring.concentration(lists, len(items), settings, **head),
    )
    return [*scored, *concentrated]


def cold_item_rows(
    context: RunContext,
    histories: DataFrame,
    users: DataFrame,
    lists_version: TableVersion,
    compared: Sequence[str],
) -> list[MetricRow]:
    """Return the rows of the backtest about items without events; [] where no model knows them.

    Those of segment `cold_items` are of all lists of the backtest in mode novel. Those of segment
    `among_cold_items` are of the retrievers that may list such items, asked for the best of these
    items alone; only users who acted on one of them are asked.

    Cost: a job for the items, two evaluations, and `recommend` of these models for these users.
    """
    config, cutoff = context.config, context.cutoffs.backtest
    knowing = [model for model in models_of_cold_items(config) if model in compared]
    if not knowing:
        return []
    cold = cold_items(context, cutoff, None)
    items = np.sort(cold.toArrow().column("item_idx").to_numpy())
    if len(items) == 0:
        return []
    head: dict[str, Any] = {"run_date": context.run_date, "kind": "backtest", "cutoff": cutoff}
    just_written = dict.fromkeys(config.publish.backtest_models, lists_version.version)
    lists = _lists_at(context, context.read("candidates", just_written), cutoff)
    names = [*compared, *[one.backtest_model for one in compared_lists(config, compared)]]
    rows = scoring.cold_items(
        lists, users, items, config.evaluate, scoring.COLD_ITEMS, **head, models=names
    )
    if not rows:
        return []
    is_sampled = scoring.in_sample(users, config.evaluate)
    buyers = (
        users.where(is_sampled)
        .select("user_idx", F.explode("items").alias("item_idx"))
        .join(context.item_sized(cold), on="item_idx", how="left_semi")
        .select("user_idx")
        .distinct()
    )
    explicit = config.features.explicit
    earlier = before(histories, cutoff, keep_empty=True, ratings=explicit)
    questions = queries(earlier, "novel").join(buyers, on="user_idx", how="left_semi")
    lists_of_models = []
    for name in knowing:
        model = load_retriever(context, name, cutoff)
        answers = model.recommend(
            with_user_features(context, model, questions), max(config.evaluate.ks), items
        )
        lists_of_models.append(answers.withColumns({"model": F.lit(name), "mode": F.lit("novel")}))
    among = reduce(DataFrame.unionByName, lists_of_models)
    return rows + scoring.cold_items(
        among, users, items, config.evaluate, scoring.AMONG_COLD_ITEMS, **head, models=knowing
    )


def _lists_at(context: RunContext, candidates: DataFrame, cutoff: datetime) -> DataFrame:
    """Return tonight's rows of `candidates` whose lists were made at `cutoff`."""
    is_tonights = F.col("run_date") == F.lit(context.run_date)
    return candidates.where(is_tonights & (F.col("cutoff") == F.lit(cutoff)))


def users_and_catalogue(
    context: RunContext, histories: DataFrame, cutoff: datetime, folder: str
) -> tuple[DataFrame, Callable[[], Catalogue | None]]:
    """Return the population of a cutoff (`scoring.population`), and a function for its catalogue.

    The features come from the feature tables where these have the cutoff. For another cutoff they
    are computed from the histories. `folder` : as `scoring.catalogue` takes it.
    """
    horizon = context.config.evaluate.horizon_days
    past = before(histories, cutoff)
    if cutoff in context.cutoffs.all:
        features_of_users, items = features_as_of(context, cutoff)
    else:
        features_of_users = features.user_features(past, cutoff)
        seen = past.select(F.explode("seen").alias("item_idx"))
        items = seen.groupBy("item_idx").agg(F.count(F.lit(1)).alias("n_users"))
    warm_users = past.select("user_idx", "seen").join(
        features_of_users.select("user_idx", "activity"), on="user_idx", how="inner"
    )
    users = scoring.population(scoring.truth(histories, cutoff, horizon), warm_users)
    return users, lambda: catalogue_or_none(items, past, folder)


def followup_rows(
    context: RunContext,
    histories: DataFrame,
    users: DataFrame,
    items: Catalogue | None,
    folder: str,
) -> list[MetricRow]:
    """Return the metrics of the lists that were published a horizon ago; [] where there are none.

    Each list has the rows of its own mode. `users` and `items` are those of the backtest. They are
    used again where the lists were made at the backtest's cutoff, as they are unless
    `evaluate.every_days` puts backtests on a grid of days. `folder` : as `scoring.catalogue` takes
    it. Cost: for each mode that of `scoring.evaluate`.
    """
    past = published_lists(context)
    cutoff = context.cutoffs.followup
    if past is not None and cutoff != context.cutoffs.backtest:
        users, catalogue_of = users_and_catalogue(context, histories, cutoff, folder)
        items = catalogue_of()
    if past is None or items is None:
        return []
    models_of_modes, lists = past
    return [
        row
        for mode, models in models_of_modes.items()
        for row in rows_of_lists(context, lists, users, items, "followup", cutoff, models, (mode,))
    ]


def catalogue_or_none(items: DataFrame, users: DataFrame, folder: str) -> Catalogue | None:
    """Return the catalogue of a cutoff; None where no item has an event before it."""
    try:
        return scoring.catalogue(items, users, folder)
    except EmptyDataError:
        return None


def rating_rows(
    context: RunContext, histories: DataFrame, models: Sequence[str]
) -> list[MetricRow]:
    """Return rmse and mae of each of `models` that predicts ratings; their k is 0.

    The ratings are those in the horizon of items that are new to the user. `n_unknown_ratings` counts
    the pairs of which a model knew nothing, so that the mean rating was taken as its prediction.
    """
    cutoff, horizon = context.cutoffs.backtest, context.config.evaluate.horizon_days
    true_ratings = ratings.ratings_of(histories, cutoff, horizon)
    earlier = before(histories, cutoff, keep_empty=True, ratings=True)
    rated_queries = queries(earlier, "repeat").join(true_ratings, on="user_idx", how="inner")
    predictions = {
        name: predicted(model, with_user_features(context, model, rated_queries))
        for name in models
        if (model := load_model(context, name, cutoff)).rates
    }
    if not predictions:
        return []
    earlier_ratings = interactions(before(histories, cutoff, ratings=True), cutoff, None)
    errors_of = ratings.errors(predictions, ratings.scale(earlier_ratings))
    head = (context.run_date, "backtest", cutoff, horizon)
    return [
        MetricRow(*head, model, "novel", "all", metric, 0, value, errors.n_users)
        for model, errors in errors_of.items()
        for metric, value in (
            ("rmse", errors.rmse),
            ("mae", errors.mae),
            ("n_ratings", float(errors.n_pairs)),
            ("n_unknown_ratings", float(errors.n_unknown)),
        )
    ]


def published_lists(context: RunContext) -> tuple[dict[Mode, list[str]], DataFrame] | None:
    """Return the lists published a horizon ago, and mode -> the model names of the lists of that
    mode.

    The lists are rows `model, mode, user_idx, item_idx, rank`; `model` is the list's name in the
    backtest of that night. Names and modes are those of the settings of that night. None where
    nothing was published that night.
    """
    night = context.run_date - timedelta(days=context.config.evaluate.horizon_days)
    if context.version("recommendations") is None:
        return None
    rows = context.read("recommendations").where(F.col("run_date") == F.lit(night))
    if rows.isEmpty():
        return None
    done = published_row(context.catalog, night)
    lists_of_night = (
        context.config.publish.published_lists
        if done is None
        else lists_of(json.loads(done["config"])["publish"])
    )
    models_of_modes: dict[Mode, list[str]] = {}
    for one in lists_of_night:
        models_of_modes.setdefault(one.mode, []).append(one.backtest_model)
    list_columns = context.spark.createDataFrame(
        [(one.name, one.backtest_model, one.mode) for one in lists_of_night],
        "list string, model string, mode string",
    )
    return models_of_modes, (
        rows.drop("model")
        .join(F.broadcast(list_columns), on="list", how="inner")
        .join(context.read("user_ids").select("user_id", "user_idx"), on="user_id", how="inner")
        .join(
            context.item_sized(context.read("item_ids").select("item_id", "item_idx")),
            on="item_id",
            how="inner",
        )
        .select("model", "mode", "user_idx", "item_idx", "rank")
    )
