"""Stage sessionize: make the sessions again of the owners and days whose events changed."""

from __future__ import annotations

from pyspark import StorageLevel
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import digest
from recspark.data import sessions
from recspark.pipeline.changes import (
    changed_events,
    reflected_version,
    reflecting_note,
    reopened_events,
)
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import StageResult


def sessionize(context: RunContext) -> StageResult:
    """Bring `sessions` up to date with `events`.

    Only what changed is made again: the sessions of owners with a changed event, from the start of
    the session chain that reaches the change. Only the days that these sessions start on are
    rewritten. An owner is a user, or the session key of a visitor without a user id.

    Where the settings of sessions changed, or `events` was restored or replaced, all sessions are
    made again.
    """
    catalog, settings = context.catalog, context.config.sessions
    events_version = context.version("events")
    assert events_version is not None
    note = {**reflecting_note(catalog, events_version), "settings": digest(settings.model_dump())}
    current = catalog.version("sessions")
    # The version of `events` that the table reflects; None where no session of the table can stay.
    base_version = reflected_version(catalog, catalog.note("sessions", current), note["settings"])
    if base_version is None or base_version < events_version:
        old_sessions = catalog.read("sessions", current)
        changes, base_version = changed_events(catalog, base_version, events_version)
        # `base_version` is None as well where the old files of `events` are gone.
        earlier_sessions = old_sessions if base_version is not None else old_sessions.limit(0)
        reopened_owners = sessions.reopened(changes, earlier_sessions, settings).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        try:
            # The sessions as they are now, of the reopened owners from their anchor on.
            events_in_sessions = reopened_events(context, reopened_owners, events_version)
            new_sessions = sessions.sessions(events_in_sessions).persist(
                StorageLevel.MEMORY_AND_DISK
            )
            # The sessions that the new ones replace.
            replaced_sessions = (
                old_sessions
                if base_version is None
                else old_sessions.withColumn("owner", sessions.owner())
                .join(reopened_owners, on="owner", how="inner")
                .where(F.col("started_at") >= F.col("anchor"))
                .select(*schema.SESSIONS.names)
            )
            # A day is a slice of the table; whole days are replaced.
            days = sorted(
                row[0]
                for row in new_sessions.select("started_date")
                .union(replaced_sessions.select("started_date"))
                .distinct()
                .collect()
            )
            if days:
                other_sessions_of_days = old_sessions.where(F.col("started_date").isin(days)).join(
                    replaced_sessions.select("session_id"), on="session_id", how="left_anti"
                )
                current = catalog.replace_slice(
                    "sessions",
                    other_sessions_of_days.unionByName(new_sessions),
                    {"started_date": days},
                    note=note,
                    expected=current,
                ).version
            new_sessions.unpersist()
        finally:
            reopened_owners.unpersist()
    if current is None:  # there are no events yet: create an empty table
        catalog.create("sessions")
        current = 0
    return StageResult(
        {"sessions": current},
        catalog.count("events", events_version),
        catalog.count("sessions", current),
    )
