"""Stage examples: the examples that one ranker learns from, for each cutoff of the grid."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, datetime
from functools import reduce
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import digest
from recspark.data import examples as pair_examples
from recspark.data.feature_encoding import Encoding
from recspark.data.interactions import before, hash_sample, queries
from recspark.errors import ConcurrentWriteError, EmptyDataError, VersionNotFoundError
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    ENCODING,
    EXAMPLE_CUTOFFS,
    SLICES,
    artifact_key,
    load_retriever,
    slice_recipe,
    sources_of,
    with_user_features,
)
from recspark.pipeline.pairs import pairs_with_features
from recspark.pipeline.plan import vector_models_of
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import features_as_of, with_truth
from recspark.tables.row_checks import Slice, slice_condition
from recspark.tables.snapshot import active_files

_DICTIONARIES = ("user_ids", "item_ids")
# Key in the detail of the stage's row in `runs`: table -> identity of the two dictionaries.
_IDS = "ids"
_MAX_COMMITS = 5  # of one stage, while other runs change its slices


@dataclass(frozen=True)
class MadeSlice:
    """The examples of one cutoff, as they lie in the table.

    `key` : digest of what decides them. `n_rows` : their number. `encoding` : the text of their
    encoding. `files` : the files that hold them.
    """

    key: str
    n_rows: int
    encoding: str
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return what the stage's row in `runs` keeps of the slice."""
        return {"key": self.key, "rows": self.n_rows, ENCODING: self.encoding}


def examples(context: RunContext, model: str) -> StageResult:
    """Write one ranker's slices of `examples`, one for each cutoff of the grid.

    The examples of a cutoff are pairs of a user and an item. The ranker's retrievers, fitted on the
    events before the cutoff, propose items to the users who acted again in the horizon after it, in
    each mode of `examples.modes`. The label of a pair says what the user then did with the item.

    A slice that an earlier night has made stays, if it would be made in the same way by the same
    fitted retrievers (see `_kept_slice`). So most nights make one slice or none. All slices that
    this run makes are one commit, and the row in `runs` names a version in which every slice is the
    one that this run made or kept. If another run replaces a kept slice before that commit, this
    run makes the slice anew and commits once more.

    A cutoff has no examples where it lies before the shop's first events, or where one of the
    retrievers had too little data. In a young shop no cutoff may have any; then stage train does not
    fit the ranker. Raises LeakError where a feature tells the label, before anything is committed.
    Raises ConcurrentWriteError if other runs replace slices of this ranker again and again.
    """
    keys = _keys(context, model)
    version = context.catalog.version("examples")
    slices: dict[datetime, MadeSlice] = {}
    for cutoff, key in keys.items():
        if kept_slice := _kept_slice(context, model, cutoff, key, version):
            context.progress(f"  examples as of {cutoff:%Y-%m-%d}: those of an earlier night")
            slices[cutoff] = kept_slice
    for _ in range(_MAX_COMMITS):
        missing = {cutoff: key for cutoff, key in keys.items() if cutoff not in slices}
        if not missing:
            break
        version, new_slices = _write_slices(context, model, missing)
        slices = {
            cutoff: kept_slice
            for cutoff, kept_slice in slices.items()
            if _files(context, model, cutoff, version) == kept_slice.files
        } | new_slices
    else:
        raise ConcurrentWriteError(
            f"table 'examples': another run replaced slices of {model} {_MAX_COMMITS} times while "
            "this run made its own; let one run of the night end, then run this stage again"
        )
    return _result(context, slices, version)


def _keys(context: RunContext, model: str) -> dict[datetime, str]:
    """Return cutoff -> key of its slice, for the cutoffs that can have examples, ascending.

    The key follows from the settings, the code, the names of the features and the fitted
    retrievers. It holds nothing of other cutoffs.
    """
    sources, keys = sources_of(context, model), {}
    vector_models = vector_models_of(context.config, model)
    names = pair_examples.feature_names(sources, context.config.examples.features, vector_models)
    for cutoff in context.cutoffs.examples:
        try:
            artifacts = [
                artifact_key(context, name, cutoff)
                for name in dict.fromkeys((*sources, *vector_models))
            ]
        except EmptyDataError as error:
            context.progress(f"  no examples as of {cutoff:%Y-%m-%d}: {error}")
            continue
        keys[cutoff] = digest([slice_recipe(context.config), artifacts, names])
    return keys


def _result(
    context: RunContext, slices: Mapping[datetime, MadeSlice], version: int | None
) -> StageResult:
    """Return the stage's result. `version` : of `examples`; None = no slice was ever written.

    A cutoff may have no row: its retrievers proposed nothing to the users who came back.
    """
    in_order = {cutoff: slices[cutoff] for cutoff in sorted(slices)}
    encodings = [made.encoding for made in in_order.values()]
    detail = {
        EXAMPLE_CUTOFFS: [cutoff.isoformat() for cutoff, made in in_order.items() if made.n_rows],
        ENCODING: encodings[0] if encodings else None,
        SLICES: {cutoff.isoformat(): made.to_dict() for cutoff, made in in_order.items()},
        _IDS: {t: context.catalog.identity(t, context.version(t)) for t in _DICTIONARIES},
    }
    outputs = {} if version is None else {"examples": version}
    n_examples = sum(made.n_rows for made in in_order.values())
    return StageResult(outputs, context.count("histories"), n_examples, detail)


def _kept_slice(
    context: RunContext, model: str, cutoff: datetime, key: str, version: int | None
) -> MadeSlice | None:
    """Return a slice that is in `examples` at `version` already; None if tonight has to make it.

    The slice stays if the run that recorded it last made it under the same `key`, if the integers of
    users and items still stand for the same ids, and if its files are the same and in place. Like a
    model of an earlier cutoff, a slice does not change with events that arrived late. With
    `--force` nothing stays.
    """
    if context.force or version is None:
        return None
    first_night = min(context.cutoffs.examples).date()
    for row in context.runlog.ended("examples", first_night, date.max, model):
        made = row.detail.get(SLICES, {}).get(cutoff.isoformat())
        if made is None:
            continue  # a run with other cutoffs
        has_same_ids = all(
            context.catalog.extends(table, context.version(table), row.detail[_IDS][table])
            for table in _DICTIONARIES
        )
        if made["key"] != key or not has_same_ids:
            return None
        n_rows, where = int(made["rows"]), _slice(cutoff, model)
        if context.catalog.lost("examples", version, where, must_have_rows=n_rows > 0):
            return None
        try:
            files = _files(context, model, cutoff, row.outputs["examples"])
        except VersionNotFoundError:  # the recorded version is too old to be read
            return None
        # A run that failed may have written the slice without leaving a row in `runs`.
        is_rewritten = files != _files(context, model, cutoff, version)
        return None if is_rewritten else MadeSlice(key, n_rows, made[ENCODING], files)
    return None


def _files(context: RunContext, model: str, cutoff: datetime, version: int) -> list[str]:
    condition = slice_condition(_slice(cutoff, model))
    return active_files(context.catalog, "examples", version, condition)


def _slice(cutoff: datetime | list[datetime], model: str) -> Slice:
    return {"cutoff": cutoff, "model": model}


def _write_slices(
    context: RunContext, model: str, keys: Mapping[datetime, str]
) -> tuple[int, dict[datetime, MadeSlice]]:
    """Write the examples of the cutoffs in `keys` in one commit; return its version, and cutoff ->
    slice.

    The examples are made cutoff by cutoff, and kept (memory, then disk) until all are there. Raises
    LeakError, see `examples`.
    """
    config = context.config
    frames: list[DataFrame] = []
    encodings: dict[datetime, Encoding] = {}
    n_rows: dict[datetime, int] = {}
    with ExitStack() as cleanup:
        for cutoff in keys:
            encodings[cutoff] = pair_examples.make_pair_encoding(
                sources_of(context, model),
                config.examples.features,
                *features_as_of(context, cutoff),
                vectors=vector_models_of(config, model),
            )
            users = _users_of(context, cutoff).persist(StorageLevel.MEMORY_AND_DISK)
            try:  # each retriever reads the users once for each mode
                rows = _rows_of(context, model, cutoff, users, encodings[cutoff])
                rows.persist(StorageLevel.MEMORY_AND_DISK)
                cleanup.callback(rows.unpersist)
                n_rows[cutoff] = rows.count()
            finally:
                users.unpersist()
            pair_examples.check_no_leak(
                rows, encodings[cutoff], config.train.seed, config.examples.honest_features
            )
            frames.append(rows)
        where = _slice([*keys], model)
        notes = {f"{cutoff:%Y-%m-%d}": encoding.to_dict() for cutoff, encoding in encodings.items()}
        written = context.catalog.replace_slice(
            "examples",
            reduce(DataFrame.unionByName, frames),
            where,
            note={model: notes},
            is_persisted=True,
        )
    slices = {
        cutoff: MadeSlice(
            key,
            n_rows[cutoff],
            encodings[cutoff].to_text(),
            _files(context, model, cutoff, written.version),
        )
        for cutoff, key in keys.items()
    }
    return written.version, slices


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


def _rows_of(
    context: RunContext, model: str, cutoff: datetime, users: DataFrame, encoding: Encoding
) -> DataFrame:
    """Return the examples of one cutoff, as `schema.EXAMPLES`.

    Labels and the sample need no feature, so they come first, and only the pairs that stay are
    described, joined with the features of their users and items, and encoded.
    """
    config = context.config
    truths = pair_examples.truths_of(
        with_truth(context, context.read("histories"), cutoff), cutoff, config.evaluate.horizon_days
    )

    def sample(pairs: DataFrame) -> DataFrame:
        labelled_pairs = pair_examples.labelled(pairs, truths)
        return pair_examples.sampled(labelled_pairs, config.examples, config.train.seed)

    lists = _lists_of(context, model, cutoff, users)
    described_pairs = pairs_with_features(context, model, cutoff, lists, users, sample=sample)
    keys = ("mode", "user_idx", "item_idx", "label", "sources")
    return encoding.encode(described_pairs, keys).select(
        F.lit(cutoff).alias("cutoff"),
        F.lit(model).alias("model"),
        *[name for name in schema.EXAMPLES.names if name not in ("cutoff", "model")],
    )
