"""Pairs of a user and an item that retrievers propose, with their features: what rankers read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Examples
from recspark.data.encoded import Encoding, flat, learn
from recspark.data.interactions import in_horizon

_SOURCE = schema.SOURCE_OF_EXAMPLE.simpleString()


def proposed(lists: DataFrame, sources: Sequence[str]) -> DataFrame:
    """Return `user_idx, item_idx, sources`: a row for each pair that some of `sources` propose.

    Parameters
    ----------
    lists : model, user_idx, item_idx, rank, score; a row for each pair and model
    sources : the models, in the order of the answer's arrays

    One shuffle by pair, no action.
    """
    place = F.array_position(F.array(*[F.lit(name) for name in sources]), F.col("model"))
    said = F.struct(
        place.alias("place"), "model", "rank", F.col("score").cast("float").alias("score")
    )
    pairs = lists.where(F.col("model").isin(list(sources))).groupBy("user_idx", "item_idx")
    in_order = F.array_sort(F.collect_list(said))
    names = [f.name for f in schema.SOURCE_OF_EXAMPLE.fields]
    named = F.transform(in_order, lambda s: F.struct(*[s[name].alias(name) for name in names]))
    return pairs.agg(named.cast(f"array<{_SOURCE}>").alias("sources"))


def with_pair_features(
    pairs: DataFrame, sources: Sequence[str], user_features: DataFrame, item_features: DataFrame
) -> DataFrame:
    """Return `pairs` with a column for each feature: of the user (`user_…`), of the item (`item_…`),
    and of what the sources say (`als_rank`, `als_score`, `n_sources`); what is not known is null.

    Parameters
    ----------
    pairs : user_idx, item_idx, sources
    user_features, item_features : the tables as of the cutoff of the lists

    Two joins, by user and by item, no action.
    """
    said = pairs.withColumn("n_sources", F.size("sources"))
    for name in sources:
        mine = _said_by(name)
        said = said.withColumns({f"{name}_rank": mine["rank"], f"{name}_score": mine["score"]})
    users, items = (f.drop("cutoff") for f in (user_features, item_features))
    return said.join(flat(users, "user_"), on="user_idx", how="left").join(
        flat(items, "item_"), on="item_idx", how="left"
    )


def _said_by(name: str) -> Column:
    """Return what one of the sources says of a pair, null where it does not propose it."""
    return F.get(F.filter("sources", lambda source: source["model"] == name), F.lit(0))


def learn_encoding(
    sources: Sequence[str], user_features: DataFrame, item_features: DataFrame
) -> Encoding:
    """Return the encoding of all that `with_pair_features` adds, its vocabularies those of the feature
    tables given. A job for each table.
    """
    users = learn(flat(user_features.drop("cutoff"), "user_"))
    items = learn(flat(item_features.drop("cutoff"), "item_"))
    said = ("n_sources", *(f"{name}_{what}" for name in sources for what in ("rank", "score")))
    return Encoding((*said, *users.numbers, *items.numbers), {**users.fields, **items.fields})


def labelled(pairs: DataFrame, truths: DataFrame) -> DataFrame:
    """Return `pairs` with `label`, float: the weight in `truths`, 0 where the user did nothing.

    `truths` : user_idx, item_idx, weight. One join by pair, no action.
    """
    weights = truths.select("user_idx", "item_idx", F.col("weight").cast("float").alias("label"))
    return pairs.join(weights, on=["user_idx", "item_idx"], how="left").withColumn(
        "label", F.coalesce("label", F.lit(0.0).cast("float"))
    )


def truths_of(histories: DataFrame, cutoff: datetime, horizon_days: int) -> DataFrame:
    """Return `user_idx, item_idx, weight` of what users did in [cutoff, cutoff + horizon).

    An event counts its weight, one that weighs nothing or less 1: it was an act all the same. Sums
    run in time order. Narrow, no action.
    """
    later = F.filter("history", in_horizon(cutoff, horizon_days))
    items = F.array_distinct(F.transform("later", lambda e: e["item_idx"]))

    def weight_of(item: Column) -> Column:
        events = F.filter("later", lambda e: e["item_idx"] == item)
        positive = F.transform(
            events, lambda e: F.when(e["weight"] > 0, e["weight"].cast("double")).otherwise(1.0)
        )
        return F.aggregate(positive, F.lit(0.0), lambda total, w: total + w)

    return (
        histories.select("user_idx", later.alias("later"))
        .select("user_idx", "later", F.explode(items).alias("item_idx"))
        .select("user_idx", "item_idx", weight_of(F.col("item_idx")).alias("weight"))
    )


def sample(pairs: DataFrame, settings: Examples, seed: int) -> DataFrame:
    """Return all pairs with a label above 0, and of each user `n_negatives` of the others.

    Which of them is decided by a hash of user, item and `seed`, not by the order of rows. A window by
    user: a task holds one user's candidates.
    """
    drawn = F.xxhash64("user_idx", "item_idx", F.lit(seed))
    is_negative = F.col("label") == 0
    by_hash = Window.partitionBy("user_idx", is_negative).orderBy(drawn, "item_idx")
    kept = ~is_negative | (F.row_number().over(by_hash) <= settings.n_negatives)
    return pairs.withColumn("is_kept", kept).where("is_kept").drop("is_kept")
