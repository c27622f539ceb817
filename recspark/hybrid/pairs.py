"""Scores of pairs by several retrievers at once, with the features that follow from histories.

One pass over the users: a row holds a user's history and all candidates, so every retriever scores
every candidate, also those that only another retriever lists. No row of all items is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from recspark import schema
from recspark.data.blocks import Array, parse_queries
from recspark.data.examples import score_names
from recspark.data.pair_features import Catalogue, Pairs, names, pair_features
from recspark.data.pair_similarity import ItemVectors, similarities, similarity_names
from recspark.models.base import RetrieverModel
from recspark.models.scoring import topk

# A score is also given relative to the score that is the fifth best among the user's candidates.
REFERENCE_RANK = 5
NO_VECTORS: Mapping[str, ItemVectors] = MappingProxyType({})
_KEYS = ("mode", "user_idx", "item_idx", "sources", "label")


def describe_pairs(
    pairs: DataFrame,
    queries: DataFrame,
    retrievers: Mapping[str, RetrieverModel],
    catalogue: Catalogue,
    as_of: int,
    groups: Sequence[str],
    vectors: Mapping[str, ItemVectors] = NO_VECTORS,
) -> DataFrame:
    """Return `pairs` with the scores of all retrievers, the features of `groups`, and the similarities
    by `vectors`.

    Parameters
    ----------
    pairs : mode, user_idx, item_idx, sources, as `recspark.data.examples.proposed` returns them;
        for examples also label, which is passed through, and is_kept (boolean)
    queries : user_idx, history, a row per user; for a retriever that reads user features also a
        column `features_NAME`
    retrievers : name -> fitted model, all of one cutoff
    catalogue : the items as of the cutoff
    as_of : the cutoff, in microseconds since 1970 UTC
    groups : groups of `recspark.data.pair_features.FEATURES`
    vectors : model -> its vectors of items, as of the cutoff; each executor holds all of them

    A score is null if the retriever does not know the user or the item, or would never recommend
    the item to the user. `NAME_relative` is the score divided by the fifth best score among the
    candidates of the user and the mode; it is null where that is not above 0. Pairs that are not
    kept count among these candidates, but are not returned.

    A user's history is sent to a task once, for all modes. One shuffle by user, of the queries and,
    unless they lie by user already, of the pairs; no action. A task holds the candidates of a batch
    of users.
    """
    kept_columns = [name for name in _KEYS if name in pairs.columns]
    is_sample = "is_kept" in pairs.columns
    of_pair = [name for name in kept_columns if name not in ("mode", "user_idx", "item_idx")]
    candidate = F.struct("mode", "item_idx", *of_pair, *(["is_kept"] if is_sample else []))
    of_user = pairs.groupBy("user_idx").agg(
        F.array_sort(F.collect_list(candidate)).alias("candidates")  # by mode, then by item
    )
    rows = of_user.join(queries, on="user_idx", how="inner").withColumn(
        "seen", F.array().cast(schema.ITEM_IDXS)
    )
    new_names = [name for retriever in retrievers for name in score_names(retriever)]
    new_names += [*names(groups), *similarity_names([*vectors])]
    result = StructType(
        [
            *(pairs.schema[name] for name in kept_columns),
            *(StructField(name, schema.FLOAT) for name in new_names),
        ]
    )
    scorers = {name: (model.items, model.scorer()) for name, model in retrievers.items()}
    reads_features = frozenset(
        name for name, model in retrievers.items() if model.user_encoding is not None
    )
    shared = pairs.sparkSession.sparkContext.broadcast((scorers, catalogue, dict(vectors)))

    def describe(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        scorers, catalogue, vectors = shared.value
        for batch in batches:
            candidates = batch.column("candidates")
            lengths = candidates.value_lengths().to_numpy(zero_copy_only=False)
            row = np.repeat(np.arange(batch.num_rows), lengths)
            proposals = candidates.flatten()
            item_idx = proposals.field("item_idx").to_numpy()
            list_number = numbers_of_lists(row, proposals.field("mode"))
            is_kept = np.ones(len(row), bool)
            if is_sample:
                is_kept = proposals.field("is_kept").to_numpy(zero_copy_only=False)
            block = parse_queries(batch)
            columns: list[Array] = []
            for name, (items, scorer) in scorers.items():
                if name in reads_features:
                    block = replace(block, features=batch.column(f"features_{name}"))
                score, has_score = topk.pair_scores(block, items, scorer, row, item_idx)
                score = np.where(has_score, score, np.nan)
                columns += [score[is_kept], relative(score, list_number)[is_kept]]
            row, item_idx = row[is_kept], item_idx[is_kept]
            of_pairs = Pairs(row, item_idx, block.history, as_of, catalogue)
            columns += pair_features(of_pairs, groups).values()
            for of_model in vectors.values():
                columns += similarities(row, item_idx, block.history, as_of, of_model)
            proposals = proposals.filter(pa.array(is_kept))
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("user_idx").take(pa.array(row))
                    if name == "user_idx"
                    else proposals.field(name)
                    for name in kept_columns
                ]
                + [
                    *(
                        pa.array(c.astype(np.float32), pa.float32(), mask=np.isnan(c))
                        for c in columns
                    ),
                ],
                names=result.names,
            )

    return rows.mapInArrow(describe, result)


def numbers_of_lists(row: Array, mode: pa.Array) -> Array:
    """Return the number of the list that each pair is in, int64 (p,), from 0 on without gaps.

    A list is the pairs of one row and one mode, which stand together. `row` int64 (p,) ascends.

    >>> numbers_of_lists(np.array([0, 0, 0, 1]), pa.array(["novel", "novel", "repeat", "repeat"]))
    array([0, 0, 1, 2])
    """
    codes = mode.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    is_first = np.ones(len(row), bool)
    is_first[1:] = (row[1:] != row[:-1]) | (codes[1:] != codes[:-1])
    return np.asarray(np.cumsum(is_first) - 1)


def relative(score: Array, row: Array) -> Array:
    """Return each score divided by the fifth best score of its row, float64 (p,).

    NaN where the score is NaN, and where the fifth best (or, with fewer scores, the last) is not
    above 0. `row` int64 (p,) ascends.

    >>> relative(np.array([3.0, 2.0, np.nan, 5.0]), np.array([0, 0, 0, 1]))
    array([1.5, 1. , nan, 1. ])
    """
    n_rows = int(row[-1]) + 1 if len(row) else 0
    has_score = ~np.isnan(score)
    scored_row, scored = row[has_score], score[has_score]
    order = np.lexsort((-scored, scored_row))
    start = np.searchsorted(scored_row, np.arange(n_rows + 1))
    lengths = np.diff(start)
    reference = np.full(n_rows, np.nan)
    has_any = lengths > 0
    place = start[:-1] + np.minimum(lengths, REFERENCE_RANK) - 1
    reference[has_any] = scored[order[place[has_any]]]
    divisor = np.where(reference > 0, reference, np.nan)[row]
    return np.asarray(score / divisor)
