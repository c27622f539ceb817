"""RMSE and MAE of predicted ratings: for explicit data, beside the metrics of lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark.data.blocks import micros
from recspark.data.interactions import in_horizon, newest_ratings

_STEPS = float(1 << 32)  # errors are summed as integers of 2^-32: the same sum in any order


@dataclass(frozen=True)
class Scale:
    """Ratings before the cutoff: their mean, and the least and the largest."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RatingErrors:
    """Of one model, over `n_pairs` pairs of `n_users` users; `n_unknown` pairs it knew nothing of."""

    rmse: float
    mae: float
    n_users: int
    n_pairs: int
    n_unknown: int


def ratings_of(histories: DataFrame, cutoff: datetime, horizon_days: int) -> DataFrame:
    """Return `user_idx, asked array<struct<item_idx, rating>>`: ratings in [cutoff, cutoff + horizon).

    `histories` hold all events. An item that the user rated before the cutoff is not asked; of several
    ratings in the horizon the newest counts, and an event without a value is none; ascending items.
    Users without any are left out. Narrow: no shuffle, no action.
    """
    begin = F.timestamp_micros(F.lit(micros(cutoff)))
    known = F.filter("history", lambda e: (e["event_at"] < begin) & e["weight"].isNotNull())
    parts = histories.select(
        "user_idx",
        F.transform(known, lambda e: e["item_idx"]).alias("known"),
        F.filter("history", in_horizon(cutoff, horizon_days)).alias("later"),
    ).select("user_idx", "known", newest_ratings("later").alias("later"))
    new = F.filter(
        "later", lambda e: e["weight"].isNotNull() & ~F.array_contains("known", e["item_idx"])
    )
    asked = F.array_sort(
        F.transform(
            new, lambda e: F.struct(e["item_idx"].alias("item_idx"), e["weight"].alias("rating"))
        )
    )
    return parts.select("user_idx", asked.alias("asked")).where(F.size("asked") > 0)


def scale(pairs: DataFrame) -> Scale:
    """Return the scale of `pairs`, a row for each user's item with `weight`, its rating. One job."""
    steps = F.round(F.col("weight").cast("double") * F.lit(_STEPS)).cast("decimal(38,0)")
    row = pairs.agg(F.sum(steps), F.count("*"), F.min("weight"), F.max("weight")).first()
    assert row is not None
    return Scale(float(row[0]) / _STEPS / row[1], float(row[2]), float(row[3]))


def errors(predictions: Mapping[str, DataFrame], known: Scale) -> dict[str, RatingErrors]:
    """Return the errors of each model.

    Parameters
    ----------
    predictions : model -> user_idx, item_idx, rating, predicted (null = the model knows nothing of
        the item or the user)
    known : what stands for a null (the mean), and what predictions are cut to (low, high)

    RMSE = sqrt(sum (rating - predicted)^2 / n) and MAE = sum |rating - predicted| / n over all pairs.
    A model without a pair is left out. One job, one shuffle of partial sums.
    """
    if not predictions:
        return {}
    frames = [frame.withColumn("model", F.lit(name)) for name, frame in predictions.items()]
    every = reduce(DataFrame.unionByName, frames)
    guess = F.coalesce(F.col("predicted").cast("double"), F.lit(known.mean))
    off = F.col("rating") - F.least(F.greatest(guess, F.lit(known.low)), F.lit(known.high))

    def summed(values: Column) -> Column:
        return F.sum(F.round(values * F.lit(_STEPS)).cast("decimal(38,0)"))

    rows = (
        every.groupBy("model")
        .agg(
            summed(off * off).alias("squares"),
            summed(F.abs(off)).alias("sizes"),
            F.count_distinct("user_idx").alias("n_users"),
            F.count("*").alias("n_pairs"),
            F.count_if(F.col("predicted").isNull()).alias("n_unknown"),
        )
        .collect()
    )
    found = {
        row["model"]: RatingErrors(
            (float(row["squares"]) / _STEPS / row["n_pairs"]) ** 0.5,
            float(row["sizes"]) / _STEPS / row["n_pairs"],
            row["n_users"],
            row["n_pairs"],
            row["n_unknown"],
        )
        for row in rows
    }
    return {name: found[name] for name in predictions if name in found}
