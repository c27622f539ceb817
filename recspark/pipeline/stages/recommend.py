"""Stage recommend: one model's candidate lists, for tonight and for the backtest."""

from __future__ import annotations

import logging
from datetime import datetime
from functools import reduce

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Mode
from recspark.data.interactions import before, queries
from recspark.eval.evaluate import in_sample
from recspark.models.base import FittedModel, RankerModel, RetrieverModel
from recspark.pipeline.activity import to_score
from recspark.pipeline.availability import allowed_of, unavailable_items
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    backtest_model,
    load_model,
    why_not_fitted,
    with_user_features,
)
from recspark.pipeline.pairs import pairs_with_features
from recspark.pipeline.plan import listed_tonight
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import USERS_WITH_TRUTH, with_truth

log = logging.getLogger(__name__)


def recommend(context: RunContext, model: str) -> StageResult:
    """Write one model's lists to `candidates`.

    - Lists as of tonight, in each mode in which somebody reads them (`listed_tonight`). They are
      for the active users that are scored tonight (`activity.to_score`), and they hold only items
      that are available. A ranker that had too few examples has none, and a warning says so.
    - Lists of the backtest, in both modes, where there is a model of the backtest. They are for the
      users of `backtest_users`.
    """
    config, catalog = context.config, context.catalog
    histories = context.read("histories")
    k = config.n_candidates
    tonight_cutoff, past_cutoff = context.cutoffs.tonight, context.cutoffs.backtest
    allowed = None  # the items that may be listed tonight; None = all
    lists_to_make: list[tuple[datetime, Mode, FittedModel, DataFrame]] = []
    if reason := why_not_fitted(context, model, tonight_cutoff):
        log.warning("%s has no lists tonight: %s", model, reason)
    elif modes := listed_tonight(config).get(model):
        fitted, users_of_tonight = load_model(context, model, tonight_cutoff), to_score(context)
        lists_to_make += [(tonight_cutoff, mode, fitted, users_of_tonight) for mode in modes]
        if isinstance(fitted, RetrieverModel):  # a ranker lists what its retrievers list
            allowed = allowed_of(fitted.items, unavailable_items(context))
    if (past_model := backtest_model(context, model)) is not None:
        users_tested = backtest_users(context, histories)
        lists_to_make += [
            (past_cutoff, "novel", past_model, users_tested),
            (past_cutoff, "repeat", past_model, users_tested),
        ]
    lists_made = []
    for cutoff, mode, fitted, users in lists_to_make:
        if isinstance(fitted, RankerModel):
            lists = ranked(context, model, fitted, cutoff, mode, users, k)
        else:
            assert isinstance(fitted, RetrieverModel), model
            user_queries = queries(users, mode)
            lists = fitted.recommend(
                with_user_features(context, fitted, user_queries),
                k,
                allowed if cutoff == tonight_cutoff else None,
            )
        lists_made.append(
            lists.select(
                F.lit(context.run_date).alias("run_date"),
                F.lit(cutoff).alias("cutoff"),
                F.lit(model).alias("model"),
                F.lit(mode).alias("mode"),
                "user_idx",
                "item_idx",
                "rank",
                "score",
            )
        )
    no_rows = context.spark.createDataFrame([], schema.CANDIDATES)
    rows = reduce(DataFrame.unionByName, lists_made) if lists_made else no_rows
    written = catalog.replace_slice(
        "candidates", rows, {"run_date": context.run_date, "model": model}
    )
    return StageResult({"candidates": written.version}, context.count("histories"), written.rows)


def ranked(
    context: RunContext,
    model: str,
    fitted: RankerModel,
    cutoff: datetime,
    mode: Mode,
    users: DataFrame,
    k: int,
) -> DataFrame:
    """Return a ranker's lists: the k best of the items that its retrievers list, by the ranker's
    scores.

    `schema.RECOMMENDED`. Among equal scores the smaller item_idx comes first. The lists of the
    retrievers are read from `candidates`, those of the same night, cutoff and mode; `users` has the
    histories of their users. Cost: that of `pairs_with_features` for the features that the ranker
    reads, and a window by user.
    """
    is_of_lists = (F.col("cutoff") == F.lit(cutoff)) & (F.col("mode") == F.lit(mode))
    lists_of_night = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date)) & is_of_lists
    )
    read = (*fitted.encoding.numbers, *fitted.encoding.fields)
    pairs = pairs_with_features(context, model, cutoff, lists_of_night, users, read)
    scored_pairs = fitted.score(fitted.encoding.encode(pairs, ("user_idx", "item_idx")))
    best_first = Window.partitionBy("user_idx").orderBy(F.desc("score"), "item_idx")
    return (
        scored_pairs.withColumn("rank", F.row_number().over(best_first))
        .where(F.col("rank") <= k)
        .select(*schema.RECOMMENDED.names)
    )


def backtest_users(context: RunContext, histories: DataFrame) -> DataFrame:
    """Return `user_idx, history, seen` of the users of the backtest, as of the backtest's cutoff.

    These are the users who act in the horizon after the cutoff. A cold user (no event before the
    cutoff) has an empty history. Where there are more than `max_eval_users`, only the sample that
    `evaluate` looks at is returned.
    """
    row = context.runlog.find("build_features")  # it has counted the users for all models
    n_tested = None if row is None else row.detail.get(USERS_WITH_TRUTH)
    users_with_truth = with_truth(context, histories, context.cutoffs.backtest)
    sampled_users = users_with_truth.where(
        in_sample(users_with_truth, context.config.evaluate, n_tested)
    )
    return before(
        sampled_users,
        context.cutoffs.backtest,
        keep_empty=True,
        ratings=context.config.features.explicit,
    )
