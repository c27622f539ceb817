"""Stage recommend: one model's candidate lists, of tonight and of the backtest."""

from __future__ import annotations

from datetime import datetime
from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import Mode
from recspark.data.interactions import before, queries
from recspark.eval.evaluate import in_horizon, in_sample
from recspark.models.base import RecommenderModel
from recspark.pipeline.activity import to_score
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import backtest_model, load_model
from recspark.pipeline.runlog import StageResult


def recommend(context: RunContext, model: str) -> StageResult:
    """One model's lists: as of tonight of every active user that is scored (`activity.to_score`), and
    of the backtest's users in both modes, where there is a model of the backtest.
    """
    config, catalog = context.config, context.catalog
    everyone = context.read("histories")
    k = config.n_candidates
    tonight, earlier = context.cutoff, context.backtest_cutoff
    parts: list[tuple[datetime, Mode, RecommenderModel, DataFrame]] = [
        (tonight, config.publish.mode, load_model(context, model, tonight), to_score(context)),
    ]
    if (past := backtest_model(context, model)) is not None:
        tested = backtest_users(context, everyone)
        parts += [(earlier, "novel", past, tested), (earlier, "repeat", past, tested)]
    frames = []
    for cutoff, mode, fitted, users in parts:
        lists = fitted.recommend(queries(users, mode), k)
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
    rows = reduce(DataFrame.unionByName, frames)
    written = catalog.replace_slice(
        "candidates", rows, {"run_date": context.run_date, "model": model}
    )
    return StageResult({"candidates": written.version}, context.count("histories"), written.rows)


def backtest_users(context: RunContext, everyone: DataFrame) -> DataFrame:
    """Return `user_idx, history, seen` as of the backtest's cutoff of every user with truth.

    A cold user has an empty history. Above `max_eval_users` they are those whom `evaluate` asks for.
    """
    cutoff, evaluate_ = context.backtest_cutoff, context.config.evaluate
    tested = everyone.where(F.exists("history", in_horizon(cutoff, evaluate_.horizon_days)))
    asked = tested.where(in_sample(tested, evaluate_))
    return before(asked, cutoff, keep_empty=True, ratings=context.config.features.explicit)
