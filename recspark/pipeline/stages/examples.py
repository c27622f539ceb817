"""Stage examples: the examples that one ranker learns from, for each cutoff of the grid."""

from __future__ import annotations

from datetime import datetime
from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import examples as pairs
from recspark.data.feature_encoding import Encoding
from recspark.data.interactions import before, hash_sample, queries
from recspark.errors import EmptyDataError
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    ENCODING,
    EXAMPLE_CUTOFFS,
    load_retriever,
    sources_of,
    with_user_features,
)
from recspark.pipeline.pairs import pairs_with_features
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import features_as_of, with_truth


def examples(context: RunContext, model: str) -> StageResult:
    """Write one ranker's slices of `examples`, one for each cutoff of the grid.

    The examples of a cutoff are pairs of a user and an item. The ranker's retrievers, fitted on the
    events before the cutoff, propose items to the users who acted again in the horizon after it, in
    each mode of `examples.modes`. The label of a pair says what the user then did with the item.

    A cutoff has no examples where it lies before the shop's first events, or where one of the
    retrievers had too little data. Raises EmptyDataError where no cutoff has any, and LeakError where a
    feature tells the label.

    The vocabularies of the encoding are those of the oldest cutoff with examples, so that they hold
    nothing that happened after any of the cutoffs.
    """
    rows_by_cutoff: dict[datetime, DataFrame] = {}
    encoding: Encoding | None = None
    for cutoff in context.cutoffs.examples:
        try:
            users = _users_of(context, cutoff)
            lists = _lists_of(context, model, cutoff, users)
        except EmptyDataError as error:
            context.progress(f"  no examples as of {cutoff:%Y-%m-%d}: {error}")
            continue
        if encoding is None:
            encoding = pairs.make_pair_encoding(
                sources_of(context, model),
                context.config.examples.features,
                *features_as_of(context, cutoff),
            )
        pairs_of_cutoff = pairs_with_features(context, model, cutoff, lists, users)
        rows_by_cutoff[cutoff] = _examples_of(context, model, cutoff, pairs_of_cutoff, encoding)
    if encoding is None:
        raise EmptyDataError(
            f"{model}: no cutoff of the grid has examples: "
            f"{', '.join(f'{c:%Y-%m-%d}' for c in context.cutoffs.examples)}; the shop is too young for a "
            "ranker, or its retrievers find too little"
        )
    written = context.catalog.replace_slice(
        "examples",
        reduce(DataFrame.unionByName, rows_by_cutoff.values()),
        {"cutoff": tuple(rows_by_cutoff), "model": model},
        note={model: encoding.to_dict()},
    )
    # A cutoff may have no row: its retrievers proposed nothing to the users who came back.
    is_of_this_ranker = F.col("cutoff").isin(list(rows_by_cutoff)) & (
        F.col("model") == F.lit(model)
    )
    rows = context.catalog.read("examples", written.version).where(is_of_this_ranker)
    cutoff_seconds = {row[0] for row in rows.select(F.unix_seconds("cutoff")).distinct().collect()}
    cutoffs_with_rows = [c for c in rows_by_cutoff if int(c.timestamp()) in cutoff_seconds]
    if not cutoffs_with_rows:
        raise EmptyDataError(
            f"{model}: nobody who came back after "
            f"{', '.join(f'{c:%Y-%m-%d}' for c in rows_by_cutoff)} was proposed anything: there is "
            "nothing to learn from"
        )
    pairs.check_no_leak(rows, encoding, context.config.train.seed)
    detail = {
        EXAMPLE_CUTOFFS: [c.isoformat() for c in cutoffs_with_rows],
        ENCODING: encoding.to_text(),
    }
    return StageResult(
        {"examples": written.version}, context.count("histories"), written.rows, detail
    )


def _users_of(context: RunContext, cutoff: datetime) -> DataFrame:
    """Return `user_idx, history, seen` of the users who act in the horizon after `cutoff`.

    At most `examples.max_users` users, drawn by a hash; the histories end before `cutoff`.
    """
    config = context.config
    histories_with_truth = with_truth(context, context.read("histories"), cutoff)
    users = before(histories_with_truth, cutoff, ratings=config.features.explicit)
    return users.where(hash_sample(users, config.examples.max_users, config.train.seed))


def _lists_of(context: RunContext, model: str, cutoff: datetime, users: DataFrame) -> DataFrame:
    """Return `mode, model, user_idx, item_idx, rank, score`: what the ranker's retrievers, fitted
    at `cutoff`, list for `users` in each mode of the examples.
    """
    config = context.config
    lists = []
    for source in sources_of(context, model):
        fitted = load_retriever(context, source, cutoff)
        for mode in config.examples.modes:
            user_queries = with_user_features(context, fitted, queries(users, mode))
            lists.append(
                fitted.recommend(user_queries, config.n_candidates).withColumns(
                    {"mode": F.lit(mode), "model": F.lit(source)}
                )
            )
    return reduce(DataFrame.unionByName, lists)


def _examples_of(
    context: RunContext,
    model: str,
    cutoff: datetime,
    pairs_of_cutoff: DataFrame,
    encoding: Encoding,
) -> DataFrame:
    """Return the examples of one cutoff, as `schema.EXAMPLES`."""
    config = context.config
    truths = pairs.truths_of(context.read("histories"), cutoff, config.evaluate.horizon_days)
    sampled_pairs = pairs.sample(
        pairs.labelled(pairs_of_cutoff, truths), config.examples, config.train.seed
    )
    keys = ("mode", "user_idx", "item_idx", "label", "sources")
    return encoding.encode(sampled_pairs, keys).select(
        F.lit(cutoff).alias("cutoff"),
        F.lit(model).alias("model"),
        *[name for name in schema.EXAMPLES.names if name not in ("cutoff", "model")],
    )
