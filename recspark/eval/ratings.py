"""RMSE and MAE of predicted ratings, which explicit data have beside the metrics of lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark.data.blocks import micros
from recspark.data.interactions import in_horizon, newest_ratings

# Errors are summed as integers, in units of 2^-32, so that the sum is the same in any order.
_STEPS = float(1 << 32)


@dataclass(frozen=True)
class Scale:
    """The mean, the smallest (`low`) and the largest (`high`) of the ratings before the cutoff."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RatingErrors:
    """The errors of one model, over `n_pairs` pairs of a user and an item, of `n_users` users.

    For `n_unknown` of the pairs the model predicted nothing.
    """

    rmse: float
    mae: float
    n_users: int
    n_pairs: int
    n_unknown: int


def ratings_of(histories: DataFrame, cutoff: datetime, horizon_days: int) -> DataFrame:
    """Return `user_idx, asked`: the ratings in [cutoff, cutoff + horizon) that models must predict.

    `asked` is array<struct<item_idx, rating>>, in ascending order of the item.
    `histories` hold all events. An item that the user rated before the cutoff is left out. Of
    several ratings of an item in the horizon the newest counts. An event whose weight is null is no
    rating. Users without a rating in the horizon are left out. Narrow: no shuffle, no action.
    """
    cutoff_at = F.timestamp_micros(F.lit(micros(cutoff)))
    rated_before = F.filter(
        "history", lambda event: (event["event_at"] < cutoff_at) & event["weight"].isNotNull()
    )
    users = histories.select(
        "user_idx",
        F.transform(rated_before, lambda event: event["item_idx"]).alias("known"),
        F.filter("history", in_horizon(cutoff, horizon_days)).alias("later"),
    ).select("user_idx", "known", newest_ratings("later").alias("later"))
    new_ratings = F.filter(
        "later",
        lambda event: event["weight"].isNotNull() & ~F.array_contains("known", event["item_idx"]),
    )
    ratings = F.array_sort(
        F.transform(
            new_ratings,
            lambda event: F.struct(
                event["item_idx"].alias("item_idx"), event["weight"].alias("rating")
            ),
        )
    )
    return users.select("user_idx", ratings.alias("asked")).where(F.size("asked") > 0)


def scale(pairs: DataFrame) -> Scale:
    """Return the scale of the ratings, `weight` in `pairs`: a row per user and item. One job."""
    steps = F.round(F.col("weight").cast("double") * F.lit(_STEPS)).cast("decimal(38,0)")
    row = pairs.agg(F.sum(steps), F.count("*"), F.min("weight"), F.max("weight")).first()
    assert row is not None
    return Scale(float(row[0]) / _STEPS / row[1], float(row[2]), float(row[3]))


def errors(predictions: Mapping[str, DataFrame], rating_scale: Scale) -> dict[str, RatingErrors]:
    """Return model -> the errors of the model.

    Parameters
    ----------
    predictions : model -> user_idx, item_idx, rating, predicted. `predicted` is null where the
        model does not know the item or the user
    rating_scale : its mean replaces a null prediction, and every prediction is cut to its `low` and
        `high`

    RMSE = sqrt(sum (rating - predicted)^2 / n) and MAE = sum |rating - predicted| / n over all
    pairs. A model without a pair is left out. One job, one shuffle of partial sums.
    """
    if not predictions:
        return {}
    frames = [frame.withColumn("model", F.lit(name)) for name, frame in predictions.items()]
    predictions_of_all = reduce(DataFrame.unionByName, frames)
    prediction = F.coalesce(F.col("predicted").cast("double"), F.lit(rating_scale.mean))
    error = F.col("rating") - F.least(
        F.greatest(prediction, F.lit(rating_scale.low)), F.lit(rating_scale.high)
    )

    def exact_sum(values: Column) -> Column:
        return F.sum(F.round(values * F.lit(_STEPS)).cast("decimal(38,0)"))

    rows = (
        predictions_of_all.groupBy("model")
        .agg(
            exact_sum(error * error).alias("squares"),
            exact_sum(F.abs(error)).alias("sizes"),
            F.count_distinct("user_idx").alias("n_users"),
            F.count("*").alias("n_pairs"),
            F.count_if(F.col("predicted").isNull()).alias("n_unknown"),
        )
        .collect()
    )
    errors_of_model = {
        row["model"]: RatingErrors(
            (float(row["squares"]) / _STEPS / row["n_pairs"]) ** 0.5,
            float(row["sizes"]) / _STEPS / row["n_pairs"],
            row["n_users"],
            row["n_pairs"],
            row["n_unknown"],
        )
        for row in rows
    }
    return {name: errors_of_model[name] for name in predictions if name in errors_of_model}
