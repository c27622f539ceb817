"""Stage sessionize: the sessions of owners and days that changed, nobody else's."""

from __future__ import annotations

from pyspark import StorageLevel
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import digest
from recspark.data import sessions
from recspark.pipeline.changes import changed_events, reflected, reflecting, reopened_events
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import StageResult


def sessionize(context: RunContext) -> StageResult:
    """Bring `sessions` up to date with `events`: only owners and days that changed are made
    again.
    """
    catalog, settings = context.catalog, context.config.sessions
    to = context.version("events")
    assert to is not None
    note = {**reflecting(catalog, to), "settings": digest(settings.model_dump())}
    current = catalog.version("sessions")
    base = reflected(catalog, catalog.note("sessions", current), note["settings"])
    if base is None or base < to:
        old = catalog.read("sessions", current)
        changes, base = changed_events(catalog, base, to)
        earlier = old if base is not None else old.limit(0)
        from_where = sessions.reopened(changes, earlier, settings).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        try:
            labelled = reopened_events(context, from_where, to)
            new = sessions.sessions(labelled).persist(StorageLevel.MEMORY_AND_DISK)
            gone = (
                old
                if base is None
                else old.withColumn("owner", sessions.owner())
                .join(from_where, on="owner", how="inner")
                .where(F.col("started_at") >= F.col("anchor"))
                .select(*schema.SESSIONS.names)
            )
            days = sorted(
                r[0]
                for r in new.select("started_date")
                .union(gone.select("started_date"))
                .distinct()
                .collect()
            )
            if days:
                kept = old.where(F.col("started_date").isin(days)).join(
                    gone.select("session_id"), on="session_id", how="left_anti"
                )
                current = catalog.replace_slice(
                    "sessions",
                    kept.unionByName(new),
                    {"started_date": days},
                    note=note,
                    expected=current,
                ).version
            new.unpersist()
        finally:
            from_where.unpersist()
    if current is None:  # no event, no session
        catalog.create("sessions")
        current = 0
    return StageResult(
        {"sessions": current}, catalog.count("events", to), catalog.count("sessions", current)
    )
