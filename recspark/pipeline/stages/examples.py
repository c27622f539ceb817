"""Stage examples: what one ranker learns from, as of each cutoff of the grid."""

from __future__ import annotations

from datetime import datetime
from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import examples as pairs
from recspark.data.encoded import Encoding
from recspark.data.interactions import before, hash_sample, queries
from recspark.errors import EmptyDataError
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    ENCODING,
    MADE,
    load_retriever,
    sources_of,
    with_what_it_reads,
)
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import features_as_of, with_truth


def examples(context: RunContext, model: str) -> StageResult:
    """Write one ranker's slices of `examples`: at each cutoff what its retrievers, as fitted on what
    came before, propose to users who came back in the horizon after it, and what those acted on.

    A cutoff before a shop's beginning, or with too little for one of the retrievers, has none; where
    no cutoff has any, raises EmptyDataError. Vocabularies are those of the oldest cutoff, so that they
    say nothing of what came after any.
    """
    made: dict[datetime, DataFrame] = {}
    encoding: Encoding | None = None
    for cutoff in context.example_cutoffs:
        try:
            proposed = _proposed(context, model, cutoff)
        except EmptyDataError as error:
            context.progress(f"  no examples as of {cutoff:%Y-%m-%d}: {error}")
            continue
        users, items = features_as_of(context, cutoff)
        if encoding is None:
            encoding = pairs.learn_encoding(sources_of(context, model), users, items)
        made[cutoff] = _examples_of(context, model, cutoff, proposed, encoding)
    if encoding is None:
        raise EmptyDataError(
            f"{model}: no cutoff of the grid has examples: "
            f"{', '.join(f'{c:%Y-%m-%d}' for c in context.example_cutoffs)}; the shop is too young for a "
            "ranker, or its retrievers find too little"
        )
    written = context.catalog.replace_slice(
        "examples",
        reduce(DataFrame.unionByName, made.values()),
        {"cutoff": tuple(made), "model": model},
        note={model: encoding.to_dict()},
    )
    mine = F.col("cutoff").isin(list(made)) & (F.col("model") == F.lit(model))
    rows = context.catalog.read("examples", written.version).where(mine)
    found = {row[0] for row in rows.select(F.unix_seconds("cutoff")).distinct().collect()}
    with_rows = [c for c in made if int(c.timestamp()) in found]
    if not with_rows:
        raise EmptyDataError(
            f"{model}: nobody who came back after {', '.join(f'{c:%Y-%m-%d}' for c in made)} was proposed "
            "anything: there is nothing to learn from"
        )
    detail = {MADE: [c.isoformat() for c in with_rows], ENCODING: encoding.to_text()}
    return StageResult(
        {"examples": written.version}, context.count("histories"), written.rows, detail
    )


def _proposed(context: RunContext, model: str, cutoff: datetime) -> DataFrame:
    """Return the pairs that the ranker's retrievers propose to users who act in the horizon."""
    config = context.config
    came_back = with_truth(context, context.read("histories"), cutoff)
    users = before(came_back, cutoff, ratings=config.features.explicit)
    kept = hash_sample(users, config.examples.max_users, config.train.seed)
    asked = queries(users.where(kept), config.publish.mode)
    sources = sources_of(context, model)
    lists = []
    for source in sources:
        fitted = load_retriever(context, source, cutoff)
        of_source = fitted.recommend(
            with_what_it_reads(context, fitted, asked), config.n_candidates
        )
        lists.append(of_source.withColumn("model", F.lit(source)))
    return pairs.proposed(reduce(DataFrame.unionByName, lists), sources)


def _examples_of(
    context: RunContext, model: str, cutoff: datetime, proposed: DataFrame, encoding: Encoding
) -> DataFrame:
    """Return the rows of one cutoff, as `schema.EXAMPLES`."""
    config = context.config
    histories = context.read("histories")
    truths = pairs.truths_of(histories, cutoff, config.evaluate.horizon_days)
    kept = pairs.sample(pairs.labelled(proposed, truths), config.examples, config.train.seed)
    users, items = features_as_of(context, cutoff)
    described = pairs.with_pair_features(kept, sources_of(context, model), users, items)
    coded = encoding.encode(described, ("user_idx", "item_idx", "label", "sources"))
    return coded.select(
        F.lit(cutoff).alias("cutoff"),
        F.lit(model).alias("model"),
        *[name for name in schema.EXAMPLES.names if name not in ("cutoff", "model")],
    )
