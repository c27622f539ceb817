"""Stage sessionize: the sessions of owners and days that changed, nobody else's."""

from __future__ import annotations

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import digest
from recspark.data import sessions
from recspark.pipeline.run import RunContext, StageResult
from recspark.tables.snapshot import changed_rows


def sessionize(context: RunContext) -> StageResult:
    """Bring `sessions` up to date with `events`: only owners and days that changed are made
    again.
    """
    catalog, settings = context.catalog, context.config.sessions
    to = context.version("events")
    assert to is not None
    note = {"events": to, "settings": digest(settings.model_dump())}
    current = catalog.version("sessions")
    done = catalog.note("sessions", current)
    same_settings = done.get("settings") == note["settings"]
    if not (same_settings and done["events"] >= to):
        old = catalog.read("sessions", current)
        base = done["events"] if same_settings else None
        changes = changed_rows(catalog, "events", base, to)
        earlier = old if same_settings else old.limit(0)
        from_where = sessions.reopened(changes, earlier, settings).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        try:
            labelled = reopened_events(context, from_where, to)
            new = sessions.sessions(labelled).persist(StorageLevel.MEMORY_AND_DISK)
            gone = (
                old
                if not same_settings
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
                    "sessions", kept.unionByName(new), {"started_date": days}, note=note
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


def reopened_events(context: RunContext, from_where: DataFrame, events_version: int) -> DataFrame:
    """Return the events of reopened owners from their anchor on, with session_id and changed_at."""
    first = F.min("anchor")
    # Its day is Spark's, in UTC: Python gives times in the zone of the driver.
    start, day = from_where.agg(first, F.to_date(first)).collect()[0]
    events = context.catalog.read("events", events_version)
    if start is None:
        events = events.limit(0)
    else:
        events = events.where(
            (F.col("event_at") >= F.lit(start)) & (F.col("event_date") >= F.lit(day))
        )
    mine = (
        events.withColumn("owner", sessions.owner())
        .join(from_where, on="owner", how="inner")
        .where(F.col("event_at") >= F.col("anchor"))
    )
    return sessions.with_session_id(mine, context.config.sessions)
