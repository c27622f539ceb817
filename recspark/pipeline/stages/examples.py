"""Stage examples: the examples that one ranker learns from, for each cutoff of the grid."""

from __future__ import annotations

from datetime import date, datetime
from functools import reduce
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import digest
from recspark.data import examples as pairs
from recspark.data.feature_encoding import Encoding
from recspark.data.interactions import before, hash_sample, queries
from recspark.errors import EmptyDataError, VersionNotFoundError
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    ENCODING,
    EXAMPLE_CUTOFFS,
    artifact_key,
    examples_recipe,
    load_retriever,
    sources_of,
    with_user_features,
)
from recspark.pipeline.pairs import pairs_with_features
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import features_as_of, with_truth
from recspark.tables.row_checks import Slice, slice_condition
from recspark.tables.snapshot import active_files

_DICTIONARIES = ("user_ids", "item_ids")
# Keys in the detail of the stage's row in `runs`: cutoff -> key and rows of its slice, and table ->
# identity of the two dictionaries.
_SLICES, _IDS = "slices", "ids"


def examples(context: RunContext, model: str) -> StageResult:
    """Write one ranker's slices of `examples`, one for each cutoff of the grid.

    The examples of a cutoff are pairs of a user and an item. The ranker's retrievers, fitted on the
    events before the cutoff, propose items to the users who acted again in the horizon after it, in
    each mode of `examples.modes`. The label of a pair says what the user then did with the item.

    A slice that an earlier night has made stays, if it would be made in the same way by the same
    fitted retrievers (see `_kept_slice`). So most nights make one slice or none.

    A cutoff has no examples where it lies before the shop's first events, or where one of the
    retrievers had too little data. In a young shop no cutoff may have any; then stage train does not
    fit the ranker. Raises LeakError where a feature tells the label.

    The vocabularies of the encoding are those of the oldest cutoff with examples, so that they hold
    nothing that happened after any of the cutoffs.
    """
    encoding: Encoding | None = None
    slices: dict[str, dict[str, Any]] = {}  # cutoff -> its key and number of rows
    for cutoff in context.cutoffs.examples:
        try:
            artifacts = [artifact_key(context, s, cutoff) for s in sources_of(context, model)]
            if encoding is None:
                encoding = pairs.make_pair_encoding(
                    sources_of(context, model),
                    context.config.examples.features,
                    *features_as_of(context, cutoff),
                )
        except EmptyDataError as error:
            context.progress(f"  no examples as of {cutoff:%Y-%m-%d}: {error}")
            continue
        key = digest([examples_recipe(context.config), artifacts, encoding.to_text()])
        n_rows = _kept_slice(context, model, cutoff, key)
        if n_rows is None:
            n_rows = _write_slice(context, model, cutoff, encoding)
        else:
            context.progress(f"  examples as of {cutoff:%Y-%m-%d}: those of an earlier night")
        slices[cutoff.isoformat()] = {"key": key, "rows": n_rows}
    # A cutoff may have no row: its retrievers proposed nothing to the users who came back.
    detail = {
        EXAMPLE_CUTOFFS: [cutoff for cutoff, made in slices.items() if made["rows"]],
        ENCODING: None if encoding is None else encoding.to_text(),
        _SLICES: slices,
        _IDS: {t: context.catalog.identity(t, context.version(t)) for t in _DICTIONARIES},
    }
    version = context.catalog.version("examples")
    outputs = {} if version is None else {"examples": version}  # None: no slice was ever written
    n_examples = sum(made["rows"] for made in slices.values())
    return StageResult(outputs, context.count("histories"), n_examples, detail)


def _kept_slice(context: RunContext, model: str, cutoff: datetime, key: str) -> int | None:
    """Return the number of rows of a slice of `examples` that is there already; None if tonight has
    to make it.

    The slice stays if the run that recorded it last made it under the same `key`, if the integers of
    users and items still stand for the same ids, and if its files are the same and in place. The key follows
    from the settings, the code, the encoding and the fitted retrievers. Like a model of an earlier
    cutoff, a slice does not change with events that arrived late. With `--force` nothing stays.
    """
    if context.force:
        return None
    first_night = min(context.cutoffs.examples).date()
    for row in context.runlog.ended("examples", first_night, date.max, model):
        made = row.detail.get(_SLICES, {}).get(cutoff.isoformat())
        if made is None:
            continue  # a run with other cutoffs
        has_same_ids = all(
            context.catalog.extends(table, context.version(table), row.detail[_IDS][table])
            for table in _DICTIONARIES
        )
        version = context.catalog.version("examples")
        if made["key"] != key or not has_same_ids or version is None:
            return None
        n_rows = int(made["rows"])
        where = _slice(cutoff, model)
        is_lost = context.catalog.lost("examples", version, where, must_have_rows=n_rows > 0)
        recorded = row.outputs["examples"]
        return None if is_lost or _is_rewritten(context, where, recorded, version) else n_rows
    return None


def _is_rewritten(context: RunContext, where: Slice, recorded: int, version: int) -> bool:
    """Return whether a slice has other files at `version` than at the version that a run recorded.

    A run that failed may have written the slice without leaving a row in `runs`.
    """
    condition = slice_condition(where)
    try:
        files_then, files_now = (
            active_files(context.catalog, "examples", v, condition) for v in (recorded, version)
        )
    except VersionNotFoundError:  # the recorded version is too old to be read
        return True
    return files_then != files_now


def _slice(cutoff: datetime, model: str) -> Slice:
    return {"cutoff": cutoff, "model": model}


def _write_slice(context: RunContext, model: str, cutoff: datetime, encoding: Encoding) -> int:
    """Write the examples of one cutoff and return their number. Raises LeakError, see `examples`."""
    where = _slice(cutoff, model)
    users = _users_of(context, cutoff).persist(StorageLevel.MEMORY_AND_DISK)
    try:  # each retriever reads the users once for each mode
        lists = _lists_of(context, model, cutoff, users)
        described_pairs = pairs_with_features(context, model, cutoff, lists, users)
        rows = _examples_of(context, model, cutoff, described_pairs, encoding)
        note = {model: encoding.to_dict()}
        written = context.catalog.replace_slice("examples", rows, where, note=note)
    finally:
        users.unpersist()
    stored = context.catalog.read("examples", written.version).where(slice_condition(where))
    pairs.check_no_leak(stored, encoding, context.config.train.seed)
    return written.rows


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
