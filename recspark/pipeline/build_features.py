"""Stage build_features: histories merged, then all that models read, as of both cutoffs."""

from __future__ import annotations

from datetime import datetime
from functools import partial

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest
from recspark.data import features, histories, sessions, windows
from recspark.data.interactions import before, interactions
from recspark.models.registry import model_spec
from recspark.pipeline.run import RunContext, StageResult
from recspark.pipeline.sessionize import reopened_events
from recspark.session import together
from recspark.tables.snapshot import changed_rows


def build_features(context: RunContext) -> StageResult:
    """Merge `histories`; then interactions, features and training sets as of both cutoffs."""
    catalog, config = context.catalog, context.config
    outputs = {"histories": _update_histories(context)}
    all_histories = catalog.read("histories", outputs["histories"])
    tables = ["interactions", "user_features", "item_features"]
    if any("neural" in model_spec(name).tags for name in config.models):
        tables.append("training_bags")
    written = together(
        context.spark, *[partial(_write, context, all_histories, table) for table in tables]
    )
    outputs.update({table: version for table, (version, _) in zip(tables, written, strict=True)})
    return StageResult(outputs, all_histories.count(), sum(rows for _, rows in written))


def _write(context: RunContext, all_histories: DataFrame, table: str) -> tuple[int, int]:
    """Write one table as of both cutoffs; return its version and the rows."""
    rows = 0
    for cutoff in (context.backtest_cutoff, context.cutoff):
        mine = before(all_histories, cutoff)
        if table == "training_bags":
            version = write_training_bags(context, mine, cutoff)
            continue
        if table == "interactions":
            frame = interactions(mine, cutoff, context.config.features.half_life_days)
        elif table == "user_features":
            frame = features.user_features(mine, cutoff)
        else:
            as_of = features.items_as_of(context.read("items"), cutoff)
            frame = features.item_features(mine, as_of, cutoff)
        written = context.catalog.replace_slice(table, frame, {"cutoff": cutoff})
        version = written.version
        rows += written.rows
    context.progress(f"  {table}")
    return version, rows


def write_training_bags(context: RunContext, histories: DataFrame, cutoff: datetime) -> int:
    """Write the training set of one cutoff, the same number of files for each rank; its version."""
    config = context.config
    n_files = windows.n_training_files(config.train.ranks)
    bags = windows.training_bags(histories, cutoff, config.features, n_files)
    return context.catalog.replace_slice(
        "training_bags", bags, {"cutoff": cutoff}, n_files=n_files
    ).version


def _update_histories(context: RunContext) -> int:
    catalog, config = context.catalog, context.config
    to = context.version("events")
    assert to is not None
    settings = digest(
        {
            "features": config.features.model_dump(
                include={"event_weights", "other_weight", "history_buckets"}
            ),
            "sessions": config.sessions.model_dump(),
        }
    )
    note = {"events": to, "settings": settings}
    catalog.create("histories")
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
                old, buckets = old.limit(0), list(range(n_buckets))
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
    assert current is not None
    return current
