"""Stage build_features: histories merged, then all that models read, as of each cutoff."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial, reduce
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest
from recspark.data import features, histories, sessions
from recspark.data.interactions import before
from recspark.errors import VersionNotFoundError
from recspark.pipeline.changes import changed_events, reflected, reflecting, reopened_events
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import (
    TRAINING,
    USERS_WITH_TRUTH,
    n_files_of,
    training_rows,
    training_tables,
    with_truth,
)
from recspark.session import together
from recspark.tables.catalog import TableCatalog


def build_features(context: RunContext) -> StageResult:
    """Merge `histories`; then features and training sets as of each cutoff of the night.

    A training set is written where a model of tonight reads it, with the settings that it has.
    """
    catalog, config = context.catalog, context.config
    outputs = _update_histories(context)
    all_histories = catalog.read("histories", outputs["histories"])
    asked = training_tables(config)
    tables = [*_FRAMES, *(table for table in TRAINING if table in asked)]
    tested = with_truth(context, all_histories, context.backtest_cutoff)
    (_, n_tested), *written = together(
        context.spark,
        lambda: (0, tested.count()),
        *[partial(_write, context, all_histories, table) for table in tables],
    )
    outputs.update({table: version for table, (version, _) in zip(tables, written, strict=True)})
    return StageResult(
        outputs,
        catalog.count("histories", outputs["histories"]),
        sum(rows for _, rows in written),
        {USERS_WITH_TRUTH: n_tested},
    )


def _write(context: RunContext, all_histories: DataFrame, table: str) -> tuple[int, int]:
    """Write one table as of all cutoffs of the night; return its version and the rows.

    In one commit: in several, a version in between may be another run's, and this run would read its rows.
    """
    cutoffs = context.cutoffs
    rows_of = _FRAMES.get(table, partial(training_rows, table=table))
    ratings = context.config.features.explicit
    rows = [rows_of(context, before(all_histories, c, ratings=ratings), c) for c in cutoffs]
    n_files = None if table in _FRAMES else len(cutoffs) * n_files_of(context)
    written = context.catalog.replace_slice(
        table, reduce(DataFrame.unionByName, rows), {"cutoff": cutoffs}, n_files=n_files
    )
    context.progress(f"  {table}")
    return written.version, written.rows


def _user_features(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    return features.user_features(histories, cutoff)


def _item_features(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    items = features.items_as_of(context.read("items"), cutoff)
    return features.item_features(histories, items, cutoff)


# table -> its rows as of a cutoff, from the histories before it; training sets are apart
_FRAMES: dict[str, Callable[[RunContext, DataFrame, datetime], DataFrame]] = {
    "user_features": _user_features,
    "item_features": _item_features,
}


_DICTIONARIES = ("user_ids", "item_ids")


def _update_histories(context: RunContext) -> dict[str, int]:
    """Bring `histories` up to date with `events`; return its version and those of the dictionaries.

    The dictionaries are read as they are now, not as this run's ingest left them: `events` may hold
    the landing of a night that runs beside this one, and its ids came before its events. They only
    grow, so who was there keeps the integer.
    """
    catalog, config = context.catalog, context.config
    to = context.version("events")
    assert to is not None
    settings = digest(
        {
            "features": config.features.model_dump(
                include={"event_weights", "other_weight", "explicit", "history_buckets"}
            ),
            "sessions": config.sessions.model_dump(),
        }
    )
    current = catalog.version("histories")
    done = catalog.note("histories", current)
    ids = {table: catalog.identity(table, catalog.version(table)) for table in _DICTIONARIES}
    outputs = {table: version for table, (version, _) in ids.items() if version is not None}
    _check_dictionaries(catalog, done)
    base = reflected(catalog, done, settings)
    if base is None or base < to:
        note = {**reflecting(catalog, to), **ids, "settings": settings}
        current = _merge(context, current, base, to, note, outputs)
    if current is None:  # no event, no history
        catalog.create("histories")
        current = 0
    return {"histories": current, **outputs}


def _check_dictionaries(catalog: TableCatalog, done: Mapping[str, Any]) -> None:
    """Raise VersionNotFoundError where a dictionary is not the one that `histories` were made with."""
    for table in _DICTIONARIES:
        then = done.get(table, [None, None])
        if not catalog.extends(table, catalog.version(table), then):
            raise VersionNotFoundError(
                f"table '{table}': histories were made with its version {then[0]}, and what is there now "
                "has not come about from that (restored, or made again): its integers may stand for "
                f"others. RESTORE it to version {then[0]}: ids without events do no harm; or restore "
                "histories and items too, to what they were at that time"
            )


def _merge(
    context: RunContext,
    current: int | None,
    base: int | None,
    to: int,
    note: dict[str, Any],
    ids: Mapping[str, int],
) -> int | None:
    """Write the histories whose events changed between versions `base` and `to`; return the version."""
    catalog, config = context.catalog, context.config
    changes, base = changed_events(catalog, base, to)
    made = context.read("sessions") if base is not None else context.read("sessions").limit(0)
    from_where = sessions.reopened(
        changes.where("user_id IS NOT NULL"), made, config.sessions
    ).persist(StorageLevel.MEMORY_AND_DISK)
    user_ids, item_ids = (catalog.read(table, ids.get(table)) for table in _DICTIONARIES)
    labelled = reopened_events(context, from_where, to)
    new = histories.suffixes(labelled, user_ids, item_ids, config.features).persist(
        StorageLevel.MEMORY_AND_DISK
    )
    changed = (
        from_where.join(
            user_ids.select(F.col("user_id").alias("owner"), "user_idx"), on="owner", how="inner"
        )
        .select("user_idx", "changed_at")
        .persist(StorageLevel.MEMORY_AND_DISK)
    )
    try:
        n_buckets = config.features.history_buckets
        old = catalog.read("histories", current)
        if base is not None:
            touched = changed.select(histories.bucket(n_buckets).alias("b")).distinct().collect()
            buckets = sorted(r[0] for r in touched)
        else:
            # Also those of a larger number of buckets before: their users have moved.
            written = {r[0] for r in old.select("bucket").distinct().collect()}
            old, buckets = old.limit(0), sorted(written | set(range(n_buckets)))
        if not buckets:
            return current
        rows = histories.merged(
            old.where(F.col("bucket").isin(buckets)), changed, new.drop("changed_at"), n_buckets
        )
        return catalog.replace_slice(
            "histories", rows, {"bucket": buckets}, note=note, expected=current
        ).version
    finally:
        for frame in (from_where, new, changed):
            frame.unpersist()
