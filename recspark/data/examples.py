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
from recspark.data.feature_encoding import (
    Encoding,
    flat,
    flat_names,
    make_encoding,
    parse_encoded,
)
from recspark.data.interactions import hash_sample, in_horizon
from recspark.data.pair_features import names
from recspark.data.pair_similarity import similarity_names
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

    One shuffle, no action. The pairs of a user are in one partition, so what follows by user, with
    these pairs on its left side, needs no further shuffle of them.
    """
    position = F.array_position(F.array(*[F.lit(name) for name in sources]), F.col("model"))
    proposal = F.struct(
        position.alias("place"), "model", "rank", F.col("score").cast("float").alias("score")
    )
    lists_of_sources = lists.where(F.col("model").isin(list(sources)))
    pairs = lists_of_sources.repartition("user_idx").groupBy("mode", "user_idx", "item_idx")
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
    vectors: Sequence[str] = (),
) -> Encoding:
    """Return the encoding of all features of pairs.

    `groups` : those of `data.pair_features`; `vectors` : the models of `data.pair_similarity`.

    The vocabularies are those of the values in `user_features` and `item_features`. One job for
    each of the two tables.
    """
    users = make_encoding(flat(user_features.drop("cutoff"), "user_"))
    items = make_encoding(flat(item_features.drop("cutoff"), "item_"))
    source_numbers = (
        "n_sources",
        *(feature for name in sources for feature in source_features(name)),
        *names(groups),
        *similarity_names(vectors),
    )
    return Encoding(
        (*source_numbers, *users.numbers, *items.numbers), {**users.fields, **items.fields}
    )


def feature_names(
    sources: Sequence[str], groups: Sequence[str], vectors: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names of all features of pairs: those that `make_pair_encoding` encodes, in any
    order.
    """
    return (
        "n_sources",
        *(feature for name in sources for feature in (f"{name}_rank", *score_names(name))),
        *names(groups),
        *similarity_names(vectors),
        *flat_names(schema.USER_FEATURES, "user_"),
        *flat_names(schema.ITEM_FEATURES, "item_"),
    )


def labelled(pairs: DataFrame, truths: DataFrame) -> DataFrame:
    """Return `pairs` with `label`, float: the weight in `truths`, 0 where the user did nothing.

    `truths` : user_idx, truth, as `truths_of` returns them. One join by user, no action.
    """
    acts_on_item = F.filter("truth", lambda act: act["item_idx"] == F.col("item_idx"))
    weight = F.get(acts_on_item, F.lit(0))["weight"].cast("float")
    label = F.coalesce(weight, F.lit(0.0).cast("float"))
    return pairs.join(truths, on="user_idx", how="left").withColumn("label", label).drop("truth")


def truths_of(histories: DataFrame, cutoff: datetime, horizon_days: int) -> DataFrame:
    """Return `user_idx, truth array<struct<item_idx int, weight double>>`: what each user did in
    [cutoff, cutoff + horizon).

    An item is once in `truth`. Its weight is the sum over the user's events with the item. An event
    whose weight is not above 0 or is null counts 1, because it was an act all the same. Sums run in
    time order. Narrow: no shuffle, no action.
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

    truth = F.transform(
        items, lambda item: F.struct(item.alias("item_idx"), weight_of(item).alias("weight"))
    )
    return histories.select("user_idx", events_in_horizon.alias("later")).select(
        "user_idx", truth.alias("truth")
    )


def sampled(pairs: DataFrame, settings: Examples, seed: int) -> DataFrame:
    """Return `pairs` with `is_kept`: whether the pair becomes an example.

    Kept are all pairs with a label above 0, and `n_negatives` pairs with label 0 for each user and
    mode. A hash of user, item and `seed` decides which of them are kept, not the order of rows.
    Cost: one window by user; a task holds the candidates of one user.
    """
    hashed = F.xxhash64("user_idx", "item_idx", F.lit(seed))
    is_negative = F.col("label") == 0
    by_hash = Window.partitionBy("mode", "user_idx", is_negative).orderBy(hashed, "item_idx")
    is_kept = ~is_negative | (F.row_number().over(by_hash) <= settings.n_negatives)
    return pairs.withColumn("is_kept", is_kept)


def check_no_leak(
    rows: DataFrame, encoding: Encoding, seed: int, honest: Sequence[str] = ()
) -> None:
    """Raise LeakError, which names them, where features tell the label almost alone.

    A feature is named if, of 100 pairs of an example with a label above 0 and one with label 0, it
    puts 99 in the same order (its AUC is at least .99 or at most .01). A missing number counts as
    the smallest. A field gives each of its codes the share of labels above 0 that the code has among
    one half of the users, drawn by a hash, and is judged on the other half. A feature that comes
    near has nearly always seen what the user did after the cutoff. Where it has not (the item of a
    subscription is bought again every month), `honest` names it, and it is not judged.

    About 20,000 examples are looked at, a seeded hash sample; with fewer than 100 examples of
    either kind nothing is said. One or two jobs; the driver holds the sample.

    `rows` : user_idx, label, numbers, fields, encoded by `encoding`
    """
    is_sampled = hash_sample(rows, _LEAK_ROWS, seed)
    is_judged = F.pmod(F.xxhash64("user_idx", F.lit("half")), F.lit(2)) == 0
    columns = "label", "numbers", "fields", is_judged.alias("is_judged")
    sample = rows.where(is_sampled).select(*columns).toArrow().combine_chunks()
    if sample.num_rows == 0:
        return
    [batch] = sample.to_batches()
    numbers, fields = parse_encoded(batch, encoding)
    is_acted_on = batch.column("label").to_numpy() > 0
    if min(is_acted_on.sum(), (~is_acted_on).sum()) < 100:
        return
    is_judged = batch.column("is_judged").to_numpy(zero_copy_only=False)
    leaks = [
        name
        for name, values in zip(encoding.numbers, numbers.T, strict=True)
        if name not in honest and _tells(np.nan_to_num(values, nan=-np.inf), is_acted_on)
    ]
    for name, codes in zip(encoding.fields, fields.T, strict=True):
        if name in honest:
            continue
        n_by_code = np.bincount(codes[~is_judged], minlength=codes.max() + 1)
        n_acted_on = np.bincount(codes[~is_judged], is_acted_on[~is_judged], codes.max() + 1)
        shares = n_acted_on / np.maximum(n_by_code, 1)
        if _tells(shares[codes[is_judged]], is_acted_on[is_judged]):
            leaks.append(name)
    if leaks:
        raise LeakError(
            f"examples: {', '.join(leaks)} alone tells what the user did after the cutoff. A "
            "feature may only read what is known before the cutoff: correct it, or leave it out. "
            "If it reads nothing later, and tells so much all the same (the item of a subscription "
            "is bought again every month), name it in examples.honest_features"
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
