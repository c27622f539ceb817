"""The pairs that a ranker learns from and scores, with all their features as of a cutoff."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pyspark.sql import DataFrame

from recspark.data.blocks import micros
from recspark.data.examples import proposed, score_names, source_features, with_pair_features
from recspark.data.feature_encoding import with_features
from recspark.data.pair_features import Catalogue, names
from recspark.data.pair_similarity import ItemVectors, similarity_names
from recspark.hybrid.pairs import describe_pairs
from recspark.models.base import RetrieverModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever, sources_of
from recspark.pipeline.item_vectors import vectors_of
from recspark.pipeline.plan import vector_models_of
from recspark.pipeline.training_sets import features_as_of


def pairs_with_features(
    context: RunContext,
    ranker: str,
    cutoff: datetime,
    lists: DataFrame,
    users: DataFrame,
    read: Collection[str] | None = None,
    sample: Callable[[DataFrame], DataFrame] | None = None,
) -> DataFrame:
    """Return `mode, user_idx, item_idx, sources` and a column for each feature of a pair.

    Parameters
    ----------
    lists : mode, model, user_idx, item_idx, rank, score: what the ranker's retrievers list
    users : user_idx, history: at least the users in `lists`, with their events before `cutoff`
    read : names of the features that are read; None = all. What none of them asks for is not
        computed, and its columns may be missing: scores of a retriever, a group of features, and
        the features of users and of items
    sample : adds to the pairs of `recspark.data.examples.proposed` the columns `label` and
        `is_kept`. Only kept pairs are returned; the others have their part in `NAME_relative` only.
        None = all pairs are returned. Only with all features

    The examples and tonight's lists both come from here, so a feature means the same in both. Cost:
    the shuffles of `proposed`; for scores, groups and vectors those of `describe_pairs`, and a small
    job for the catalogue and for each encoder; a join for features of users, and one for those of items.
    """
    sources = sources_of(context, ranker)
    user_features, item_features = features_as_of(context, cutoff)
    vector_models = vector_models_of(context.config, ranker)
    to_compute = parts_read(read, sources, context.config.examples.features, vector_models)
    pairs = proposed(lists, sources)
    if sample is not None:
        pairs = sample(pairs)
    if to_compute.scores or to_compute.groups or to_compute.vectors:
        retrievers = {name: load_retriever(context, name, cutoff) for name in to_compute.scores}
        queries = queries_of_retrievers(context, retrievers, cutoff, users)
        catalogue = Catalogue.of(item_features if to_compute.groups else item_features.limit(0))
        vectors = {
            name: ItemVectors.of(*vectors_of(context, name, cutoff)) for name in to_compute.vectors
        }
        pairs = describe_pairs(
            pairs, queries, retrievers, catalogue, micros(cutoff), to_compute.groups, vectors
        )
    return with_pair_features(
        pairs,
        sources,
        user_features if to_compute.users else None,
        item_features if to_compute.items else None,
    )


@dataclass(frozen=True)
class Parts:
    """What is computed of the features of pairs.

    Parameters
    ----------
    scores : the retrievers whose scores of pairs are computed
    groups : the groups of `recspark.data.pair_features.FEATURES`
    vectors : the models whose vectors are compared (`recspark.data.pair_similarity`)
    users, items : whether the features of users and of items are joined
    """

    scores: tuple[str, ...]
    groups: tuple[str, ...]
    vectors: tuple[str, ...]
    users: bool
    items: bool


def parts_read(
    read: Collection[str] | None,
    sources: Sequence[str],
    groups: Sequence[str],
    vectors: Sequence[str] = (),
) -> Parts:
    """Return what has to be computed for the features `read` of pairs; None = all.

    `sources`, `groups`, `vectors` : the retrievers, the groups of features, and the models with
    vectors that there are.

    >>> parts_read(["user_knn_rank", "ease_score", "mode"], ["user_knn", "ease"], ["orders"])
    Parts(scores=('ease',), groups=(), vectors=(), users=False, items=False)
    """
    if read is None:
        return Parts(tuple(sources), tuple(groups), tuple(vectors), users=True, items=True)
    of_models = {name for source in sources for name in source_features(source)}
    of_models.update(similarity_names(vectors))
    others = set(read) - of_models
    return Parts(
        tuple(name for name in sources if not set(score_names(name)).isdisjoint(read)),
        tuple(group for group in groups if not set(names([group])).isdisjoint(read)),
        tuple(name for name in vectors if not set(similarity_names([name])).isdisjoint(read)),
        users=any(name.startswith("user_") for name in others),
        items=any(name.startswith("item_") for name in others),
    )


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
