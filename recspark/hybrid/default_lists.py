"""Lists for users who have no personal list: the items that weigh most among all users, and among
the users of each segment.
"""

from __future__ import annotations

from datetime import datetime

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark.data.interactions import decayed_item_weights

EVERYONE = "everyone"  # the segment of the default list for all users
# Half-life, in days, of the events that default lists count. `popular` over the last 14 days was
# the best plain baseline on the bundled shop (docs/metrics.md); a half-life of 7 days is about the
# same.
DEFAULT_HALF_LIFE_DAYS = 7.0


def default_lists(
    histories: DataFrame,
    user_features: DataFrame,
    cutoff: datetime,
    k: int,
    unavailable: DataFrame | None = None,
) -> DataFrame:
    """Return `segment, rank, item_idx, weight`: the k items with the largest weight in each
    segment.

    Parameters
    ----------
    histories : user_idx, history with the events before `cutoff` only
    user_features : user_idx, activity as of `cutoff`; the segments are the values of `activity`,
        and `EVERYONE`
    cutoff : UTC. An event `DEFAULT_HALF_LIFE_DAYS` before the cutoff has half of its weight
    unavailable : item_idx of items that may not be listed; None = all may

    Items of equal weight are ordered by item_idx, the smaller one first. Cost: a join by user, a
    shuffle by segment and item.
    """
    segment_of_user = F.explode(F.array(F.lit(EVERYONE), F.col("activity"))).alias("segment")
    users_with_segment = histories.join(
        user_features.select("user_idx", "activity"), on="user_idx", how="inner"
    )
    weights = decayed_item_weights(
        users_with_segment.select("history", segment_of_user),
        cutoff,
        DEFAULT_HALF_LIFE_DAYS,
        by=("segment",),
    )
    if unavailable is not None:
        weights = weights.join(unavailable, on="item_idx", how="left_anti")
    by_weight = Window.partitionBy("segment").orderBy(F.desc("weight"), "item_idx")
    return weights.withColumn("rank", F.row_number().over(by_weight)).where(F.col("rank") <= k)
