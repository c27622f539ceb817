"""Examples for rankers: pairs of user and item that retrievers propose, with their features."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Examples
from recspark.data.blocks import Array
from recspark.data.feature_encoding import Encoding, flat, make_encoding, parse_encoded
from recspark.data.interactions import hash_sample, in_horizon
from recspark.data.pair_features import names
from recspark.errors import LeakError

_LEAK_ROWS = 20_000  # examples that `check_no_leak` looks at
_SOURCE = schema.SOURCE_OF_EXAMPLE.simpleString()


def proposed(lists: DataFrame, sources: Sequence[str]) -> DataFrame:
    """Return `mode, user_idx, item_idx, sources`: a row per pair that one of `sources` proposes.

    Parameters
    ----------
    lists : mode, model, user_idx, item_idx, rank, score; a row per mode, pair and model
    sources : names of the models that propose pairs. The array `sources` of the result is in this
        order; its elements have `schema.SOURCE_OF_EXAMPLE`

    One shuffle by pair, no action.
    """
    position = F.array_position(F.array(*[F.lit(name) for name in sources]), F.col("model"))
    proposal = F.struct(
        position.alias("place"), "model", "rank", F.col("score").cast("float").alias("score")
    )
    pairs = lists.where(F.col("model").isin(list(sources))).groupBy("mode", "user_idx", "item_idx")
    in_order = F.array_sort(F.collect_list(proposal))  # by `place`, the first field
    names_of_fields = schema.SOURCE_OF_EXAMPLE.names
    without_place = F.transform(
        in_order, lambda source: F.struct(*[source[name].alias(name) for name in names_of_fields])
    )
    return pairs.agg(without_place.cast(f"array<{_SOURCE}>").alias("sources"))


def with_pair_features(
    pairs: DataFrame,
    sources: Sequence[str],
    user_features: DataFrame | None,
    item_features: DataFrame | None,
) -> DataFrame:
    """Return `pairs` with a column for each feature; an unknown feature is null.

    Added are the features of the user (`user_…`), those of the item (`item_…`), the rank that each
    source gives the pair (`als_rank`; null where it does not propose the pair), and the number of
    sources that propose the pair (`n_sources`).

    Parameters
    ----------
    pairs : mode, user_idx, item_idx, sources, and the columns that
        `recspark.hybrid.pairs.describe_pairs` adds
    sources : names of the models that propose pairs
    user_features, item_features : the tables as of the cutoff of the lists; None = leave out their
        features

    A join by user and one by item, no action.
    """
    with_sources = pairs.withColumn("n_sources", F.size("sources"))
    for name in sources:
        with_sources = with_sources.withColumn(rank_name(name), _proposal_of(name)["rank"])
    described = with_sources
    if user_features is not None:
        users = flat(user_features.drop("cutoff"), "user_")
        described = described.join(users, on="user_idx", how="left")
    if item_features is not None:
        items = flat(item_features.drop("cutoff"), "item_")
        described = described.join(items, on="item_idx", how="left")
    return described


def _proposal_of(name: str) -> Column:
    """Return the element of `sources` of model `name`; null where it does not propose the pair."""
    return F.get(F.filter("sources", lambda source: source["model"] == name), F.lit(0))


def rank_name(source: str) -> str:
    """Return the name of the feature that holds the rank which a source gives a pair."""
    return f"{source}_rank"


def score_names(source: str) -> tuple[str, str]:
    """Return the names of the two features that a source's score of a pair gives."""
    return f"{source}_score", f"{source}_relative"


def source_features(source: str) -> tuple[str, ...]:
    """Return the names of all features that one source gives: its rank and its scores of a pair."""
    return rank_name(source), *score_names(source)


def make_pair_encoding(
    sources: Sequence[str],
    groups: Sequence[str],
    user_features: DataFrame,
    item_features: DataFrame,
) -> Encoding:
    """Return the encoding of all features of pairs; `groups` : those of `data.pair_features`.

    The vocabularies are those of the values in `user_features` and `item_features`. One job for
    each of the two tables.
    """
    users = make_encoding(flat(user_features.drop("cutoff"), "user_"))
    items = make_encoding(flat(item_features.drop("cutoff"), "item_"))
    source_numbers = (
        "n_sources",
        *(feature for name in sources for feature in source_features(name)),
        *names(groups),
    )
    return Encoding(
        (*source_numbers, *users.numbers, *items.numbers), {**users.fields, **items.fields}
    )


def labelled(pairs: DataFrame, truths: DataFrame) -> DataFrame:
    """Return `pairs` with `label`, float: the weight in `truths`, 0 where the user did nothing.

    `truths` : user_idx, item_idx, weight, as `truths_of` returns them. One join by pair, no action.
    """
    weights = truths.select("user_idx", "item_idx", F.col("weight").cast("float").alias("label"))
    return pairs.join(weights, on=["user_idx", "item_idx"], how="left").withColumn(
        "label", F.coalesce("label", F.lit(0.0).cast("float"))
    )


def truths_of(histories: DataFrame, cutoff: datetime, horizon_days: int) -> DataFrame:
    """Return `user_idx, item_idx, weight`: what each user did in [cutoff, cutoff + horizon).

    `weight`, double, is the sum over the user's events with the item. An event whose weight is not
    above 0 or is null counts 1, because it was an act all the same. Sums run in time order. Narrow:
    no shuffle, no action.
    """
    events_in_horizon = F.filter("history", in_horizon(cutoff, horizon_days))
    items = F.array_distinct(F.transform("later", lambda event: event["item_idx"]))

    def weight_of(item: Column) -> Column:
        events = F.filter("later", lambda event: event["item_idx"] == item)
        weights = F.transform(
            events,
            lambda event: F.when(event["weight"] > 0, event["weight"].cast("double")).otherwise(
                1.0
            ),
        )
        return F.aggregate(weights, F.lit(0.0), lambda total, weight: total + weight)

    return (
        histories.select("user_idx", events_in_horizon.alias("later"))
        .select("user_idx", "later", F.explode(items).alias("item_idx"))
        .select("user_idx", "item_idx", weight_of(F.col("item_idx")).alias("weight"))
    )


def sample(pairs: DataFrame, settings: Examples, seed: int) -> DataFrame:
    """Return all pairs with a label above 0, and `n_negatives` pairs with label 0 for each user.

    The negatives of a user are drawn for each mode. A hash of user, item and `seed` decides which
    of them stay, not the order of rows. Cost: one window by user; a task holds the candidates of
    one user.
    """
    hashed = F.xxhash64("user_idx", "item_idx", F.lit(seed))
    is_negative = F.col("label") == 0
    by_hash = Window.partitionBy("mode", "user_idx", is_negative).orderBy(hashed, "item_idx")
    is_kept = ~is_negative | (F.row_number().over(by_hash) <= settings.n_negatives)
    return pairs.withColumn("is_kept", is_kept).where("is_kept").drop("is_kept")


def check_no_leak(rows: DataFrame, encoding: Encoding, seed: int) -> None:
    """Raise LeakError, which names them, where features tell the label almost alone.

    A feature is named if, of 100 pairs of an example with a label above 0 and one with label 0, it
    puts 99 in the same order (its AUC is at least .99 or at most .01). A missing number counts as
    the smallest. A field gives each of its codes the share of labels above 0 that the code has in
    one half of the examples, and is judged on the other half. No honest feature comes near: one
    that does has seen what the user did after the cutoff.

    About 20,000 examples are looked at, a seeded hash sample; with fewer than 100 examples of
    either kind nothing is said. One or two jobs; the driver holds the sample.

    `rows` : user_idx, label, numbers, fields, encoded by `encoding`
    """
    is_sampled = hash_sample(rows, _LEAK_ROWS, seed)
    sample = rows.where(is_sampled).select("label", "numbers", "fields").toArrow().combine_chunks()
    if sample.num_rows == 0:
        return
    [batch] = sample.to_batches()
    numbers, fields = parse_encoded(batch, encoding)
    is_acted_on = batch.column("label").to_numpy() > 0
    if min(is_acted_on.sum(), (~is_acted_on).sum()) < 100:
        return
    is_judged = np.arange(len(is_acted_on)) % 2 == 0
    leaks = [
        name
        for name, values in zip(encoding.numbers, numbers.T, strict=True)
        if _tells(np.nan_to_num(values, nan=-np.inf), is_acted_on)
    ]
    for name, codes in zip(encoding.fields, fields.T, strict=True):
        n_by_code = np.bincount(codes[~is_judged], minlength=codes.max() + 1)
        n_acted_on = np.bincount(codes[~is_judged], is_acted_on[~is_judged], codes.max() + 1)
        shares = n_acted_on / np.maximum(n_by_code, 1)
        if _tells(shares[codes[is_judged]], is_acted_on[is_judged]):
            leaks.append(name)
    if leaks:
        raise LeakError(
            f"examples: {', '.join(leaks)} alone tells what the user did after the cutoff. A "
            "feature may only read what is known before the cutoff: correct it, or leave it out"
        )


def _tells(values: Array, is_acted_on: Array) -> bool:
    """Return whether `values` order almost all pairs of an acted-on and another example."""
    _, rank, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[rank]  # of equal values: their mean
    n_acted_on = is_acted_on.sum()
    n_others = len(values) - n_acted_on
    if min(n_acted_on, n_others) == 0:
        return False
    n_in_order = mean_rank[is_acted_on].sum() - n_acted_on * (n_acted_on + 1) / 2
    return bool(abs(n_in_order / (n_acted_on * n_others) - 0.5) >= 0.49)
