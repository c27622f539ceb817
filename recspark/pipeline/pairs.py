"""The pairs that a ranker learns from and scores, with all their features as of a cutoff."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from pyspark.sql import DataFrame

from recspark.data.blocks import micros
from recspark.data.examples import proposed, score_names, source_features, with_pair_features
from recspark.data.feature_encoding import with_features
from recspark.data.pair_features import Catalogue, names
from recspark.hybrid.pairs import describe_pairs
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever, sources_of
from recspark.pipeline.training_sets import features_as_of


def pairs_with_features(
    context: RunContext,
    ranker: str,
    cutoff: datetime,
    lists: DataFrame,
    users: DataFrame,
    read: Collection[str] | None = None,
) -> DataFrame:
    """Return `mode, user_idx, item_idx, sources` and a column for each feature of a pair.

    Parameters
    ----------
    lists : mode, model, user_idx, item_idx, rank, score: what the ranker's retrievers list
    users : user_idx, history: at least the users in `lists`, with their events before `cutoff`
    read : names of the features that are read; None = all. What none of them asks for is not
        computed, and its columns may be missing: scores of a retriever, a group of features, and
        the features of users and of items

    The examples and tonight's lists both come from here, so a feature means the same in both. Cost:
    a shuffle by pair; for scores and groups one by user and a small job for the catalogue; a join
    for features of users, and one for those of items.
    """
    sources = sources_of(context, ranker)
    user_features, item_features = features_as_of(context, cutoff)
    scored, groups = list(sources), list(context.config.examples.features)
    if read is not None:
        scored = [name for name in sources if not set(score_names(name)).isdisjoint(read)]
        groups = [group for group in groups if not set(names([group])).isdisjoint(read)]
    pairs = proposed(lists, sources)
    if scored or groups:
        retrievers = {name: load_retriever(context, name, cutoff) for name in scored}
        queries = users.select("user_idx", "history")
        for name, model in retrievers.items():
            if model.user_encoding is not None:
                queries = with_features(
                    queries, user_features, model.user_encoding
                ).withColumnRenamed("features", f"features_{name}")
        catalogue = Catalogue.of(item_features if groups else item_features.limit(0))
        pairs = describe_pairs(pairs, queries, retrievers, catalogue, micros(cutoff), groups)
    of_sources = {name for source in sources for name in source_features(source)}
    others = None if read is None else tuple(set(read) - of_sources)
    return with_pair_features(
        pairs,
        sources,
        user_features if others is None or any(n.startswith("user_") for n in others) else None,
        item_features if others is None or any(n.startswith("item_") for n in others) else None,
    )
