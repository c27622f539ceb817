"""Which events changed since a table was last brought up to date with `events`.

`sessions` and `histories` say in the note of their last commit which version of `events` they
reflect. The stages that write them compare it with the version of now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.data import sessions
from recspark.errors import VersionNotFoundError
from recspark.pipeline.context import RunContext
from recspark.tables.catalog import TableCatalog
from recspark.tables.snapshot import changed_rows


def reflecting(catalog: TableCatalog, to: int) -> dict[str, Any]:
    """Return the part of a note that says which version of `events` a table reflects, and which
    commit that was: a folder put back from a backup has another of the same number.
    """
    version, commit = catalog.identity("events", to)
    return {"events": version, "events_commit": commit}


def reflected(catalog: TableCatalog, done: Mapping[str, Any], settings: str) -> int | None:
    """Return the version of `events` that a table with the note `done` reflects; None where nothing
    of the table can stay: other settings, or `events` is no longer the table that it was.
    """
    latest = catalog.version("events")
    if done.get("settings") != settings or latest is None or done["events"] > latest:
        return None
    version, commit = catalog.identity("events", done["events"])
    return int(version) if done.get("events_commit") in (None, commit) else None


def changed_events(
    catalog: TableCatalog, base: int | None, to: int
) -> tuple[DataFrame, int | None]:
    """Return the events that changed between two versions, and the first of them: None, and all
    events, where its files are gone.
    """
    try:
        return changed_rows(catalog, "events", base, to), base
    except VersionNotFoundError:
        return changed_rows(catalog, "events", None, to), None


def reopened_events(context: RunContext, from_where: DataFrame, events_version: int) -> DataFrame:
    """Return the events of reopened owners from their anchor on, with session_id and changed_at."""
    # Microseconds and a day, both Spark's: Python gives times in the zone of the driver, and an hour
    # that a zone has twice is one of them.
    first = F.min("anchor")
    start, day = from_where.agg(F.unix_micros(first), F.to_date(first)).collect()[0]
    events = context.catalog.read("events", events_version)
    if start is None:
        events = events.limit(0)
    else:
        events = events.where(
            (F.col("event_at") >= F.timestamp_micros(F.lit(start)))
            & (F.col("event_date") >= F.lit(day))
        )
    mine = (
        events.withColumn("owner", sessions.owner())
        .join(from_where, on="owner", how="inner")
        .where(F.col("event_at") >= F.col("anchor"))
    )
    return sessions.with_session_id(mine, context.config.sessions)
