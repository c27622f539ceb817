"""The fallback ladder: what the champion leaves open is filled by the next model, then the next."""

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
)


def ladder_steps(
    models: Sequence[str], candidates: DataFrame, mode: str
) -> list[tuple[str, DataFrame]]:
    """Return (model, its lists of one mode) for each of `models`, from the rows of `candidates`."""
    columns = ("user_idx", "item_idx", "rank", "score")
    of_mode = candidates.where(F.col("mode") == mode)
    return [(name, of_mode.where(F.col("model") == name).select(*columns)) for name in models]


def fill(
    ladder: Sequence[tuple[str, DataFrame]],
    users: DataFrame,
    k: int,
    kept: DataFrame | None = None,
) -> DataFrame:
    """Return one list of at most k items for each of `users`, from the first model that has them.

    Parameters
    ----------
    ladder : (model, its lists as `user_idx, item_idx, rank, score`), the champion first. Every list
        has k items or all that its model can give
    users : user_idx; lists of other users are left out
    k : items wanted
    kept : lists that still hold, `user_idx, item_idx, rank, score, model`; they go before the ladder

    Returns
    -------
    `user_idx, item_idx, rank, score, model, source`; `source` is `champion`, `fallback:<model>`, or
    `unchanged` for what is in `kept`.
    An item stands where its first model put it; later steps follow, in their own order. `rank`
    orders the list. `score` is that of the row's own model: comparable within one `source`, and not
    falling from one to the next. A user whom no step answers has no row.

    Lazy. One shuffle, by user, of at most k rows a user and step.
    """
    if not ladder or k < 1:
        raise ModelError(f"ladder of {len(ladder)} models, k = {k}: at least one of each is needed")
    wanted = users.select(
        "user_idx", *[F.lit(None).cast(f.dataType).alias(f.name) for f in _STEP.fields[1:]]
    )
    steps = [_step(place, model, lists, k) for place, (model, lists) in enumerate(ladder)]
    if kept is not None:
        steps.append(_step(_KEPT, "unchanged", kept, k))
    by_user = Window.partitionBy("user_idx")
    best_first = by_user.orderBy("place", "item_rank")
    same_item = Window.partitionBy("user_idx", "item_idx").orderBy("place", "item_rank")
    return (
        reduce(DataFrame.unionByName, steps, wanted)
        .repartition("user_idx")
        .withColumn("is_wanted", F.max(F.col("place").isNull()).over(by_user))
        .withColumn("nth", F.row_number().over(same_item))
        .where(F.col("is_wanted") & F.col("place").isNotNull() & (F.col("nth") == 1))
        .withColumn("rank", F.row_number().over(best_first))
        .where(F.col("rank") <= k)
        .select(*FILLED.names)
    )


_STEP = schema.columns(
    user_idx=schema.LONG,
    item_idx=schema.INT,
    item_rank=schema.INT,
    score=schema.FLOAT,
    model=schema.STRING,
    source=schema.STRING,
    place=schema.INT,
)


_KEPT = -1  # the place of lists that still hold


def _step(place: int, name: str, lists: DataFrame, k: int) -> DataFrame:
    missing = [name for name in schema.RECOMMENDED.names if name not in lists.columns]
    if missing:
        raise SchemaError(
            f"lists of '{name}': missing columns {missing}, there are {lists.columns}"
        )
    sources = {_KEPT: "unchanged", 0: "champion"}
    # Of k items at most those taken before can be taken again: the first k are enough.
    return lists.where(F.col("rank") <= k).select(
        "user_idx",
        "item_idx",
        F.col("rank").alias("item_rank"),
        "score",
        (F.col("model") if place == _KEPT else F.lit(name)).alias("model"),
        F.lit(sources.get(place, f"fallback:{name}")).alias("source"),
        F.lit(place).alias("place"),
    )
