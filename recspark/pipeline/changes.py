"""Which events changed since a table was last brought up to date with `events`.

The tables `sessions` and `histories` are derived from `events`. The note of their last commit says
which version of `events` they reflect. The stages that write them compare that version with the
version of `events` that this run reads, and process only the events that changed in between.
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


def reflecting_note(catalog: TableCatalog, events_version: int) -> dict[str, Any]:
    """Return the part of a note that says which version of `events` a table reflects.

    The note also holds the id of the commit that made the version. After a folder was put back from
    a backup, a version may have the same number but a different commit.
    """
    version, commit = catalog.identity("events", events_version)
    return {"events": version, "events_commit": commit}


def reflected_version(catalog: TableCatalog, note: Mapping[str, Any], settings: str) -> int | None:
    """Return the version of `events` that a table with the note `note` reflects.

    Return None where no row of the table can stay: the table was made with other `settings`, or
    `events` is no longer the table that it was then (restored to an older version, or put back from
    a backup). None is also the answer for an empty note, that is for a table without a commit.
    """
    latest = catalog.version("events")
    if note.get("settings") != settings or latest is None or note["events"] > latest:
        return None
    version, commit = catalog.identity("events", note["events"])
    return int(version) if note.get("events_commit") in (None, commit) else None


def changed_events(
    catalog: TableCatalog, base: int | None, events_version: int
) -> tuple[DataFrame, int | None]:
    """Return the events that changed between two versions, and the base of the comparison.

    Parameters
    ----------
    base : the older version of `events`; None = count every event as changed
    events_version : the newer version

    The second part of the result is `base` where the changes could be found. It is None where files
    of version `base` are gone (vacuumed): all events then count as changed.
    """
    try:
        return changed_rows(catalog, "events", base, events_version), base
    except VersionNotFoundError:
        return changed_rows(catalog, "events", None, events_version), None


def reopened_events(
    context: RunContext, reopened_owners: DataFrame, events_version: int
) -> DataFrame:
    """Return the events that need a session again, with `session_id` and `changed_at`.

    Parameters
    ----------
    reopened_owners : owner, changed_at, anchor, as `sessions.reopened` gives them
    events_version : the version of `events` to read

    Of each reopened owner the events from the owner's anchor on are returned. One small job finds
    the earliest anchor of all owners, so that older days of `events` are not read.
    """
    # Spark computes both values: the time in microseconds, and the day. `collect` would turn a
    # timestamp into the driver's time zone, where one hour of the year is ambiguous.
    earliest_anchor = F.min("anchor")
    start_micros, start_day = reopened_owners.agg(
        F.unix_micros(earliest_anchor), F.to_date(earliest_anchor)
    ).collect()[0]
    events = context.catalog.read("events", events_version)
    if start_micros is None:
        events = events.limit(0)
    else:
        events = events.where(
            (F.col("event_at") >= F.timestamp_micros(F.lit(start_micros)))
            & (F.col("event_date") >= F.lit(start_day))
        )
    events_of_owners = (
        events.withColumn("owner", sessions.owner())
        .join(reopened_owners, on="owner", how="inner")
        .where(F.col("event_at") >= F.col("anchor"))
    )
    return sessions.with_session_id(events_of_owners, context.config.sessions)
