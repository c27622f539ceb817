"""Stage recommend: one model's candidate lists, of tonight and of the backtest."""

from __future__ import annotations

from datetime import datetime
from functools import reduce

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Mode
from recspark.data.examples import proposed, with_pair_features
from recspark.data.interactions import before, queries
from recspark.eval.evaluate import in_sample
from recspark.models.base import FittedModel, RankerModel, RetrieverModel
from recspark.pipeline.activity import to_score
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import backtest_model, load_model, sources_of, with_what_it_reads
from recspark.pipeline.plan import listed_tonight
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import USERS_WITH_TRUTH, features_as_of, with_truth


def recommend(context: RunContext, model: str) -> StageResult:
    """One model's lists: as of tonight, where somebody reads them (`listed_tonight`), of every active
    user that is scored (`activity.to_score`); and of the backtest's users in both modes, where there is
    a model of the backtest.
    """
    config, catalog = context.config, context.catalog
    everyone = context.read("histories")
    k = config.n_candidates
    tonight, earlier = context.cutoff, context.backtest_cutoff
    parts: list[tuple[datetime, Mode, FittedModel, DataFrame]] = []
    if model in listed_tonight(config):
        fitted = load_model(context, model, tonight)
        parts.append((tonight, config.publish.mode, fitted, to_score(context)))
    if (past := backtest_model(context, model)) is not None:
        tested = backtest_users(context, everyone)
        parts += [(earlier, "novel", past, tested), (earlier, "repeat", past, tested)]
    frames = []
    for cutoff, mode, fitted, users in parts:
        if isinstance(fitted, RankerModel):
            lists = ranked(context, model, fitted, cutoff, mode, k)
        else:
            assert isinstance(fitted, RetrieverModel), model
            asked = queries(users, mode)
            lists = fitted.recommend(with_what_it_reads(context, fitted, asked), k)
        frames.append(
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
    none = context.spark.createDataFrame([], schema.CANDIDATES)
    rows = reduce(DataFrame.unionByName, frames) if frames else none
    written = catalog.replace_slice(
        "candidates", rows, {"run_date": context.run_date, "model": model}
    )
    return StageResult({"candidates": written.version}, context.count("histories"), written.rows)


def ranked(
    context: RunContext, model: str, fitted: RankerModel, cutoff: datetime, mode: Mode, k: int
) -> DataFrame:
    """Return a ranker's lists: the k best of what its retrievers list tonight, by its own scores.

    `schema.RECOMMENDED`; ties by the smaller item. A shuffle by pair, joins with the features, and a
    window by user.
    """
    sources = sources_of(context, model)
    of_lists = (F.col("cutoff") == F.lit(cutoff)) & (F.col("mode") == F.lit(mode))
    tonight = context.read("candidates").where(
        (F.col("run_date") == F.lit(context.run_date)) & of_lists
    )
    described = with_pair_features(
        proposed(tonight, sources), sources, *features_as_of(context, cutoff)
    )
    scored = fitted.score(fitted.encoding.encode(described, ("user_idx", "item_idx")))
    best_first = Window.partitionBy("user_idx").orderBy(F.desc("score"), "item_idx")
    return (
        scored.withColumn("rank", F.row_number().over(best_first))
        .where(F.col("rank") <= k)
        .select(*schema.RECOMMENDED.names)
    )


def backtest_users(context: RunContext, everyone: DataFrame) -> DataFrame:
    """Return `user_idx, history, seen` as of the backtest's cutoff of every user with truth.

    A cold user has an empty history. Above `max_eval_users` they are those whom `evaluate` asks for.
    """
    row = context.runlog.find("build_features")  # it has counted them, for all models
    n_tested = None if row is None else row.detail.get(USERS_WITH_TRUTH)
    tested = with_truth(context, everyone, context.backtest_cutoff)
    asked = tested.where(in_sample(tested, context.config.evaluate, n_tested))
    return before(
        asked, context.backtest_cutoff, keep_empty=True, ratings=context.config.features.explicit
    )
