"""The pairs that a ranker learns from and scores, with all their features as of a cutoff."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from pyspark.sql import DataFrame

from recspark.data.blocks import micros
from recspark.data.examples import proposed, with_pair_features
from recspark.data.feature_encoding import with_features
from recspark.data.pair_features import Catalogue
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
    sample: Callable[[DataFrame], DataFrame] | None = None,
) -> DataFrame:
    """Return `mode, user_idx, item_idx, sources` and a column for each feature of a pair.

    Parameters
    ----------
    lists : mode, model, user_idx, item_idx, rank, score: what the ranker's retrievers list
    users : user_idx, history: at least the users in `lists`, with their events before `cutoff`
    sample : adds to the pairs of `recspark.data.examples.proposed` the columns `label` and
        `is_kept`. Only kept pairs are returned; the others have their part in `NAME_relative` only.
        None = all pairs are returned

    The examples and tonight's lists both come from here, so a feature means the same in both. Cost:
    the shuffles of `proposed` and `describe_pairs`, one small job for the catalogue, and the two
    joins of `with_pair_features`.
    """
    sources = sources_of(context, ranker)
    retrievers = {name: load_retriever(context, name, cutoff) for name in sources}
    user_features, item_features = features_as_of(context, cutoff)
    queries = users.select("user_idx", "history")
    for name, model in retrievers.items():
        if model.user_encoding is not None:
            queries = with_features(queries, user_features, model.user_encoding).withColumnRenamed(
                "features", f"features_{name}"
            )
    pairs = proposed(lists, sources)
    described_pairs = describe_pairs(
        pairs if sample is None else sample(pairs),
        queries,
        retrievers,
        Catalogue.of(item_features),
        micros(cutoff),
        context.config.examples.features,
    )
    return with_pair_features(described_pairs, sources, user_features, item_features)
