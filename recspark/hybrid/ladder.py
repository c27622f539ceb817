"""The fallback ladder: the champion's list, filled up by the next models until it has k items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark.errors import ModelError

CHAMPION = "champion"


def fill(ladder: Sequence[tuple[str, DataFrame]], users: DataFrame, k: int) -> DataFrame:
    """Return one list of up to k items for each user: `user_idx, item_idx, rank, score, model, source`.

    Parameters
    ----------
    ladder : (model, its lists: user_idx, item_idx, rank, score); the first is the champion
    users : user_idx: who is answered
    k : items of a full list

    A step's items follow those of the steps before it, in the step's own order, without the items that
    are listed already. `source` is `champion`, or `fallback:<model>`. `score` is the model's own: it
    does not increase within a step, and is not comparable between steps; `rank` decides. One shuffle by
    user, no action. Raises ModelError on an empty ladder or k < 1.
    """
    if not ladder or k < 1:
        raise ModelError(
            f"a ladder needs at least one model and k >= 1, got {len(ladder)} and k = {k}"
        )
    steps = [
        lists.where(F.col("rank") <= 2 * k if step else F.col("rank") <= k).select(
            "user_idx",
            "item_idx",
            "rank",
            "score",
            F.lit(step).alias("step"),
            F.lit(model).alias("model"),
            F.lit(CHAMPION if step == 0 else f"fallback:{model}").alias("source"),
        )
        for step, (model, lists) in enumerate(ladder)
    ]
    asked = users.select("user_idx").distinct()
    mine = reduce(DataFrame.unionByName, steps).join(asked, on="user_idx", how="left_semi")
    order = ("step", "rank")
    same_item = Window.partitionBy("user_idx", "item_idx").orderBy(*order)
    in_list = Window.partitionBy("user_idx").orderBy(*order)
    return (
        mine.repartition("user_idx")  # one shuffle serves both windows
        .withColumn("nth", F.row_number().over(same_item))
        .where("nth = 1")
        .withColumn("rank", F.row_number().over(in_list))
        .where(F.col("rank") <= k)
        .select("user_idx", "item_idx", "rank", "score", "model", "source")
    )
