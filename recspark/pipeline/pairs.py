"""The pairs that a ranker learns from and scores, with all their features as of a cutoff."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from pyspark.sql import DataFrame

from recspark.data.blocks import micros
from recspark.data.examples import proposed, with_pair_features
from recspark.data.feature_encoding import with_features
from recspark.data.pair_features import Catalogue
from recspark.hybrid.pairs import describe_pairs
from recspark.models.base import RetrieverModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever, sources_of
from recspark.pipeline.training_sets import features_as_of


def pairs_with_features(
    context: RunContext, ranker: str, cutoff: datetime, lists: DataFrame, users: DataFrame
) -> DataFrame:
    """Return `mode, user_idx, item_idx, sources` and a column for each feature of a pair.

    Parameters
    ----------
    lists : mode, model, user_idx, item_idx, rank, score: what the ranker's retrievers list
    users : user_idx, history: at least the users in `lists`, with their events before `cutoff`

    The examples and tonight's lists both come from here, so a feature means the same in both. Cost:
    a shuffle by pair and one by user, one small job for the catalogue, two joins.
    """
    sources = sources_of(context, ranker)
    retrievers = {name: load_retriever(context, name, cutoff) for name in sources}
    user_features, item_features = features_as_of(context, cutoff)
    described_pairs = describe_pairs(
        proposed(lists, sources),
        queries_of_retrievers(context, retrievers, cutoff, users),
        retrievers,
        Catalogue.of(item_features),
        micros(cutoff),
        context.config.examples.features,
    )
    return with_pair_features(described_pairs, sources, user_features, item_features)


def queries_of_retrievers(
    context: RunContext,
    retrievers: Mapping[str, RetrieverModel],
    cutoff: datetime,
    users: DataFrame,
) -> DataFrame:
    """Return `user_idx, history`, and a column `features_NAME` for each retriever that reads user
    features: those as of `cutoff`.

    `users` : user_idx, history. Cost: a join by user for each of these retrievers; none without
    any.
    """
    queries = users.select("user_idx", "history")
    for name, model in retrievers.items():
        if model.user_encoding is not None:
            user_features, _ = features_as_of(context, cutoff)
            queries = with_features(queries, user_features, model.user_encoding).withColumnRenamed(
                "features", f"features_{name}"
            )
    return queries
