"""Stage build_features: histories merged, then all that models read, as of both cutoffs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest
from recspark.data import features, histories, impressions, sessions, texts, windows
from recspark.data.interactions import before, interactions
from recspark.models.registry import make
from recspark.pipeline.run import RunContext, StageResult
from recspark.pipeline.sessionize import reopened_events
from recspark.session import together
from recspark.tables.catalog import TableVersion
from recspark.tables.snapshot import changed_rows

TRAINING = (*windows.TRAINING_TABLES, *impressions.TABLES, texts.TABLE)


def build_features(context: RunContext) -> StageResult:
    """Merge `histories`; then interactions, features and training sets as of both cutoffs.

    A training set is written where a model of tonight reads it, with the settings that it has.
    """
    catalog, config = context.catalog, context.config
    outputs = {"histories": _update_histories(context)}
    all_histories = catalog.read("histories", outputs["histories"])
    settings = config.model_settings
    asked = {make(name, settings.get(name, {})).training_table for name in config.models}
    tables = [*_FRAMES, *(table for table in TRAINING if table in asked)]
    written = together(
        context.spark, *[partial(_write, context, all_histories, table) for table in tables]
    )
    outputs.update({table: version for table, (version, _) in zip(tables, written, strict=True)})
    return StageResult(
        outputs,
        catalog.count("histories", outputs["histories"]),
        sum(rows for _, rows in written),
    )


def _write(context: RunContext, all_histories: DataFrame, table: str) -> tuple[int, int]:
    """Write one table as of both cutoffs; return its version and the rows."""
    rows = 0
    for cutoff in (context.backtest_cutoff, context.cutoff):
        mine = before(all_histories, cutoff, ratings=context.config.features.explicit)
        if table in _FRAMES:
            frame = _FRAMES[table](context, mine, cutoff)
            written = context.catalog.replace_slice(table, frame, {"cutoff": cutoff})
        else:
            written = write_training(context, table, mine, cutoff)
        rows += written.rows
    context.progress(f"  {table}")
    return written.version, rows


def write_training(
    context: RunContext, table: str, histories: DataFrame, cutoff: datetime
) -> TableVersion:
    """Write the training set of one cutoff, the same number of files for each rank."""
    config = context.config
    n_files = windows.n_training_files(config.train.ranks)
    if table == texts.TABLE:
        items = features.items_as_of(context.read("items"), cutoff)
        acted = histories.select(F.explode("history.item_idx").alias("item_idx")).distinct()
        mine = acted.join(items, on="item_idx", how="left")
        rows = texts.training_texts(mine, cutoff, config.features, n_files)
    elif table in impressions.TABLES:
        dictionaries = context.read("user_ids"), context.read("item_ids")
        shown = impressions.impressions(context.read("sessions"), *dictionaries, cutoff)
        unit = impressions.TABLES[table]
        rows = impressions.training_impressions(
            histories, shown, cutoff, config.features, n_files, unit=unit
        )
    else:
        rows = windows.TRAINING_TABLES[table](histories, cutoff, config.features, n_files)
    return context.catalog.replace_slice(table, rows, {"cutoff": cutoff}, n_files=n_files)


def _interactions(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    return interactions(histories, cutoff, context.config.features.half_life_days)


def _user_features(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    return features.user_features(histories, cutoff)


def _item_features(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    items = features.items_as_of(context.read("items"), cutoff)
    return features.item_features(histories, items, cutoff)


# table -> its rows as of a cutoff, from the histories before it; training sets are apart
_FRAMES: dict[str, Callable[[RunContext, DataFrame, datetime], DataFrame]] = {
    "interactions": _interactions,
    "user_features": _user_features,
    "item_features": _item_features,
}


def _update_histories(context: RunContext) -> int:
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
    note = {"events": to, "settings": settings}
    current = catalog.version("histories")
    done = catalog.note("histories", current)
    same_settings = done.get("settings") == settings
    if not (same_settings and done["events"] >= to):
        base = done["events"] if same_settings else None
        changes = changed_rows(catalog, "events", base, to).where("user_id IS NOT NULL")
        made = context.read("sessions") if same_settings else context.read("sessions").limit(0)
        from_where = sessions.reopened(changes, made, config.sessions).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        user_ids, item_ids = context.read("user_ids"), context.read("item_ids")
        labelled = reopened_events(context, from_where, to)
        new = histories.suffixes(labelled, user_ids, item_ids, config.features).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        changed = (
            from_where.join(
                user_ids.select(F.col("user_id").alias("owner"), "user_idx"),
                on="owner",
                how="inner",
            )
            .select("user_idx", "changed_at")
            .persist(StorageLevel.MEMORY_AND_DISK)
        )
        try:
            n_buckets = config.features.history_buckets
            old = catalog.read("histories", current)
            if same_settings:
                buckets = sorted(
                    r[0]
                    for r in changed.select(histories.bucket(n_buckets).alias("b"))
                    .distinct()
                    .collect()
                )
            else:
                # Also those of a larger number of buckets before: their users have moved.
                written = {r[0] for r in old.select("bucket").distinct().collect()}
                old, buckets = old.limit(0), sorted(written | set(range(n_buckets)))
            if buckets:
                rows = histories.merged(
                    old.where(F.col("bucket").isin(buckets)),
                    changed,
                    new.drop("changed_at"),
                    n_buckets,
                )
                current = catalog.replace_slice(
                    "histories", rows, {"bucket": buckets}, note=note
                ).version
        finally:
            for frame in (from_where, new, changed):
                frame.unpersist()
    if current is None:  # no event, no history
        catalog.create("histories")
        current = 0
    return current
