"""The fallback ladder: lists that the champion cannot fill are filled up by the next models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.errors import ModelError, SchemaError

FILLED = schema.columns(
    user_idx=schema.LONG,
    item_idx=schema.INT,
    rank=schema.INT,
    score=schema.FLOAT,
    model=schema.STRING,
    source=schema.STRING,
    because=schema.BECAUSE,
)


def ladder_steps(
    models: Sequence[str], candidates: DataFrame, mode: str
) -> list[tuple[str, DataFrame]]:
    """Return (model, its lists of `mode`) for each of `models`, from the rows of `candidates`."""
    columns = ("user_idx", "item_idx", "rank", "score")
    of_mode = candidates.where(F.col("mode") == mode)
    return [(name, of_mode.where(F.col("model") == name).select(*columns)) for name in models]


def fill(
    ladder: Sequence[tuple[str, DataFrame]],
    users: DataFrame,
    k: int,
    unchanged_lists: DataFrame | None = None,
) -> DataFrame:
    """Return one list of at most k items for each of `users`, filled by the models of the ladder.

    A list begins with the items of the champion, in their order. The items of the next model
    follow, in their order and without those that are in the list already, then the items of the
    model after it, and so on, up to k items. Lazy. One shuffle, by user, of at most k rows per user
    and step.

    Parameters
    ----------
    ladder : (model, its lists as `user_idx, item_idx, rank, score`), the champion first. Every list
        has k items, or all that its model can give
    users : user_idx; lists of other users are left out
    k : the number of items to fill a list up to
    unchanged_lists : lists of an earlier night that are still valid, as `user_idx, item_idx, rank,
        score, model, because`; they go before the champion's

    Returns
    -------
    `user_idx, item_idx, rank, score, model, source, because`, as in `FILLED`. `source` is `champion`,
    `fallback:<model>`, or `unchanged` for an item of `unchanged_lists`. `rank` orders the list.
    `score` is the score that the row's model gave. Compare scores within one `source` only, because
    they need not fall from one source to the next. `because` holds the reasons of the items of
    `unchanged_lists`; for other items it is null. A user whom no step gives an item has no row.

    Example: with k = 3, the champion gives user 2 the item 10, and the next model gives the items
    10 and 13. The list is 10 (`champion`), 13 (`fallback:<model>`), then the best item of the third
    model that is neither 10 nor 13.
    """
    if not ladder or k < 1:
        raise ModelError(f"ladder of {len(ladder)} models, k = {k}: at least one of each is needed")
    # One row per user without an item (`place` is null), to find the users in the union below.
    user_markers = users.select(
        "user_idx", *[F.lit(None).cast(f.dataType).alias(f.name) for f in _STEP.fields[1:]]
    )
    steps = [_step(place, model, lists, k) for place, (model, lists) in enumerate(ladder)]
    if unchanged_lists is not None:
        steps.append(_step(_UNCHANGED_PLACE, "unchanged", unchanged_lists, k))
    by_user = Window.partitionBy("user_idx")
    in_list_order = by_user.orderBy("place", "item_rank")
    by_user_and_item = Window.partitionBy("user_idx", "item_idx").orderBy("place", "item_rank")
    return (
        reduce(DataFrame.unionByName, steps, user_markers)
        .repartition("user_idx")
        .withColumn("is_wanted", F.max(F.col("place").isNull()).over(by_user))
        .withColumn("nth", F.row_number().over(by_user_and_item))
        .where(F.col("is_wanted") & F.col("place").isNotNull() & (F.col("nth") == 1))
        .withColumn("rank", F.row_number().over(in_list_order))
        .where(F.col("rank") <= k)
        .select(*FILLED.names)
    )


# A row of one step: an item of a user's list of one model. `item_rank` is its rank in that list,
# and `place` is the place of the model in the ladder, 0 = the champion.
_STEP = schema.columns(
    user_idx=schema.LONG,
    item_idx=schema.INT,
    item_rank=schema.INT,
    score=schema.FLOAT,
    model=schema.STRING,
    source=schema.STRING,
    because=schema.BECAUSE,
    place=schema.INT,
)

_UNCHANGED_PLACE = -1  # `place` of the unchanged lists: before the champion's


def _step(place: int, name: str, lists: DataFrame, k: int) -> DataFrame:
    missing = [name for name in schema.RECOMMENDED.names if name not in lists.columns]
    if missing:
        raise SchemaError(
            f"lists of '{name}': missing columns {missing}, there are {lists.columns}"
        )
    sources = {_UNCHANGED_PLACE: "unchanged", 0: "champion"}
    no_reasons = F.lit(None).cast(schema.BECAUSE)
    because = F.col("because") if "because" in lists.columns else no_reasons
    # The first k items of a step are enough. If earlier steps put n items into the list, at most n
    # of these k are in it already, and k - n are needed.
    return lists.where(F.col("rank") <= k).select(
        "user_idx",
        "item_idx",
        F.col("rank").alias("item_rank"),
        "score",
        (F.col("model") if place == _UNCHANGED_PLACE else F.lit(name)).alias("model"),
        F.lit(sources.get(place, f"fallback:{name}")).alias("source"),
        because.alias("because"),
        F.lit(place).alias("place"),
    )
