"""Stage ingest: write the landing of the night to events, quarantine, dictionaries and items."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import date
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import Config
from recspark.data import catalogue_checks, event_checks, features, ids
from recspark.errors import SourceError
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import StageResult
from recspark.session import together
from recspark.sources import Landing, read_landing
from recspark.tables.catalog import TableCatalog, retried

log = logging.getLogger(__name__)


def ingest(context: RunContext) -> StageResult:
    """Write the night's landing to `events`, `quarantine`, the two id dictionaries and `items`.

    Every row is judged and counted before the first write. An item gets its id when it is first
    described, not when somebody first acts on it: the catalogue is kept for nights to come.

    Where nothing was ingested on an earlier night (`initial`), no event is too late.
    """
    config, run_date = context.config, context.run_date
    # Read the newest version of `events`, not the pinned one: where a night is run after a later
    # night, it must know the events of that later night. Rows of this night itself are left out
    # below, so a second try sees the same events as the first.
    events_version = context.catalog.version("events")
    known_events = context.catalog.read("events", events_version)
    first_night = known_events.agg(F.min("ingest_date")).collect()[0][0]
    initial = first_night is None or run_date <= first_night
    landing = read_landing(context.spark, config.source, run_date, initial=initial)
    refused = _refused_row_ids(context)
    allowed_period = event_checks.Period.of(
        run_date, config.ingest.max_late_days, initial=initial, timezone=config.source.timezone
    )
    checked_events = event_checks.check_events(
        landing.events,
        run_date=run_date,
        max_late_days=config.ingest.max_late_days,
        initial=initial,
        existing=None
        if first_night is None
        else _existing_event_ids(context, landing, known_events),
        refused=None if refused is None else refused.where(F.col("input") == "events"),
        unique_ids=landing.unique_ids,
        timezone=config.source.timezone,
    ).persist(StorageLevel.MEMORY_AND_DISK)
    checked_items = _checked_items(landing, refused)
    try:
        event_counts, item_counts = together(
            context.spark,
            lambda: event_checks.count_verdicts(checked_events, landing.events),
            lambda: (
                None
                if checked_items is None
                else event_checks.count_verdicts(checked_items, landing.items)
            ),
        )
        assert event_counts is not None
        check_share(config, run_date, "events", event_counts)
        if item_counts is not None:
            check_share(config, run_date, "catalogue", item_counts)
        bad_events = checked_events
        if event_checks.TOO_LATE in event_counts.by_reason:
            bad_events = event_checks.with_late_rows(checked_events, landing.events, allowed_period)
        clean_events = event_checks.clean_of(checked_events, run_date)
        outputs = _write(
            context, clean_events, bad_events, landing.items, checked_items, events_version
        )
        rows_by_type = event_checks.event_types(clean_events)
    finally:
        checked_events.unpersist()
        if checked_items is not None:
            checked_items.unpersist()
    warnings = type_warnings(config, rows_by_type, known_events)
    context.progress(f"  {_counts_text(event_counts)}")
    for warning in warnings:
        log.warning(warning)
    detail = {
        "landing": landing.digest,
        "initial": initial,
        **_counts_detail(event_counts),
        "warnings": warnings,
    }
    if item_counts is not None:
        detail["catalogue"] = {"in": item_counts.n_in, **_counts_detail(item_counts)}
    return StageResult(outputs, event_counts.n_in, event_counts.n_clean, detail)


def _write(
    context: RunContext,
    clean_events: DataFrame,
    bad_events: DataFrame,
    items: DataFrame | None,
    checked_items: DataFrame | None,
    events_version: int | None,
) -> dict[str, int]:
    """Write the night's slice of each table; return table -> version.

    Parameters
    ----------
    clean_events, bad_events : the events of the landing, judged against the events of
        `events_version`; `bad_events` holds the rows to quarantine, among others
    items : the items that the landing describes; None = it describes none
    checked_items : the same items with their verdicts; None where they need no check, since they
        were made from the events
    events_version : the version of `events` that the landing was compared with; None = no table yet
    """
    catalog, run_date, source = context.catalog, context.run_date, context.config.source.name
    night = {"ingest_date": run_date}
    item_names = clean_events.select("item_id")
    present_items = None
    quarantine = event_checks.quarantine_of(bad_events, run_date, source)
    if checked_items is not None:
        items = catalogue_checks.clean_items(checked_items)
        if context.config.source.items_complete:
            # An item whose row was refused is there all the same.
            present_items = checked_items.select("item_id").distinct()
        item_names = item_names.unionByName(items.select("item_id"))
        bad_items = event_checks.quarantine_of(checked_items, run_date, source, "catalogue")
        quarantine = quarantine.unionByName(bad_items)
    # Events are written last. Should the process be killed in between, there are ids without
    # events, which do no harm. Events without ids would be left out by later nights.
    user_ids_version, item_ids_version, quarantine_version = together(
        context.spark,
        lambda: _assign_ids(context, clean_events, "user_ids", "user_id", "user_idx"),
        lambda: _assign_ids(context, item_names, "item_ids", "item_id", "item_idx"),
        lambda: catalog.replace_slice("quarantine", quarantine, night).version,
    )
    return {
        "quarantine": quarantine_version,
        "user_ids": user_ids_version,
        "item_ids": item_ids_version,
        "items": _write_items(context, items, item_ids_version, present_items),
        # Refused where another night has committed since `events_version`: it may have landed the
        # same events. The stage is then run again.
        "events": catalog.replace_slice(
            "events", clean_events, night, expected=events_version
        ).version,
    }


def type_warnings(config: Config, types: dict[str, int], events: DataFrame) -> list[str]:
    """Return warnings about tonight's event types. Ingest logs them, and `runs` keeps them.

    The first warning names types that have neither a weight nor are impressions; a misspelt type
    counts `features.other_weight`. The second names types that the settings mention although no
    event ever had them.

    Parameters
    ----------
    types : event type -> number of rows tonight, as `events.event_types` returns them
    events : the events of the nights before

    Cost: no job where every type that the settings name came tonight; otherwise one job that reads
    one column of `events`.
    """
    weighted, impression_types = config.features.event_weights, config.sessions.impression_types
    unnamed_types = {
        event_type: n_rows
        for event_type, n_rows in types.items()
        if event_type not in {*weighted, *impression_types}
    }
    warnings = []
    if unnamed_types:
        listed = ", ".join(
            f"'{event_type}' ({n_rows:,})" for event_type, n_rows in unnamed_types.items()
        )
        warnings.append(
            f"event types that are neither in features.event_weights nor in "
            f"sessions.impression_types, and weigh {config.features.other_weight:g}: {listed}"
        )
    types_in_settings: set[str] = set()
    if "event_weights" in config.features.model_fields_set:
        types_in_settings |= {*weighted}
    if "impression_types" in config.sessions.model_fields_set:
        types_in_settings |= {*impression_types}
    absent_types = types_in_settings - {*types}
    if absent_types:
        events_of_absent_types = events.where(
            F.col("event_type").isin(sorted(absent_types))
        ).select("event_type")
        absent_types -= {row["event_type"] for row in events_of_absent_types.distinct().collect()}
    if absent_types:
        warnings.append(
            f"no event was ever of the type {', '.join(map(repr, sorted(absent_types)))}, which "
            "features.event_weights or sessions.impression_types names; is it spelt as in the source?"
        )
    return warnings


def _existing_event_ids(context: RunContext, landing: Landing, events: DataFrame) -> DataFrame:
    """Return the event_id of the events of other nights that tonight's landing may bring again.

    Where recspark made the ids, an id is made of the whole row, its time included. The same id then
    has the same time, so only the days since the landing's oldest event matter; one small job finds
    that day. A source that is an archive brings every day again, so all days are returned.
    """
    events_of_other_nights = events.where(F.col("ingest_date") != F.lit(context.run_date))
    if landing.unique_ids and not context.config.source.archive:
        oldest_day = event_checks.oldest_day(landing.events)
        events_of_other_nights = events_of_other_nights.where(F.lit(oldest_day is not None))
        if oldest_day is not None:
            events_of_other_nights = events_of_other_nights.where(
                F.col("event_date") >= F.lit(oldest_day)
            )
    return events_of_other_nights.select("event_id")


def _refused_row_ids(context: RunContext) -> DataFrame | None:
    """Return `input, row_id` of the rows of this source that other nights quarantined.

    Return None where there is no table `quarantine` yet.
    """
    version = context.catalog.version("quarantine")
    if version is None:
        return None
    rows = context.catalog.read("quarantine", version)
    is_of_other_night = (F.col("ingest_date") != F.lit(context.run_date)) & (
        F.col("source") == context.config.source.name
    )
    return rows.where(is_of_other_night).select("input", "row_id")


def _checked_items(landing: Landing, refused: DataFrame | None) -> DataFrame | None:
    """Return the items of the landing with their verdicts, persisted.

    Return None where the landing has no catalogue, or one that was made from its events, which
    needs no check.
    """
    if landing.items is None or landing.items_of_events:
        return None
    refused_items = None if refused is None else refused.where(F.col("input") == "catalogue")
    return catalogue_checks.check_items(landing.items, refused_items).persist(
        StorageLevel.MEMORY_AND_DISK
    )


def check_share(
    config: Config, run_date: date, landed: event_checks.Input, counts: event_checks.Counts
) -> None:
    """Raise ConservationError where rows were lost, SourceError where too few new rows are clean.

    Rows that came before are not counted, since they say nothing about the quality of tonight's
    rows: of a rolling window, nearly all rows came before.
    """
    counts.check()
    if counts.n_clean < config.ingest.min_clean_fraction * counts.n_new:
        raise SourceError(
            f"source '{config.source.name}', night {run_date}: of its {landed} only "
            f"{counts.n_clean:,} of {counts.n_new:,} new rows are clean (quarantined "
            f"{counts.by_reason}); nothing was written. Mend the landing, or lower "
            "ingest.min_clean_fraction if this is right"
        )


def _counts_text(counts: event_checks.Counts) -> str:
    repeats = "".join(f", {n_rows:,} {reason}" for reason, n_rows in counts.by_repeat.items())
    return f"{counts.n_clean:,} new events, {counts.n_quarantined:,} rows quarantined{repeats}"


def _counts_detail(counts: event_checks.Counts) -> dict[str, Any]:
    return {
        "clean": counts.n_clean,
        "quarantined": counts.by_reason,
        "duplicates": counts.n_duplicates,
        "repeats": counts.by_repeat,
    }


def _write_items(
    context: RunContext,
    items: DataFrame | None,
    item_ids_version: int,
    present_items: DataFrame | None,
) -> int:
    """Replace the rows of `items` that this night wrote before, if any; return the version.

    `present_items` : item_id of a complete delivery. Every other item gets a row that says it is
    not available from this night on. None = the delivery is not complete.

    A night writes only what is new about an item compared with what other nights wrote. Where
    another night commits first, `items` is read again and compared again.
    """
    catalog, night = context.catalog, {"ingest_date": context.run_date}

    def write() -> int:
        version = catalog.version("items")
        if items is None and version is None:
            catalog.create("items")
            return 0
        known_items = catalog.read("items", version)
        rows = known_items.limit(0)
        if items is not None:
            dictionary = catalog.read("item_ids", item_ids_version).select("item_id", "item_idx")
            landed_items = items.join(dictionary, on="item_id", how="inner").withColumn(
                "ingest_date", F.lit(context.run_date)
            )
            if present_items is not None:
                landed_items = landed_items.unionByName(
                    _absent_items(context, item_ids_version, present_items),
                    allowMissingColumns=True,
                )
            items_of_other_nights = known_items.where(
                F.col("ingest_date") != F.lit(context.run_date)
            )
            rows = features.changed_items(landed_items, items_of_other_nights)
        return catalog.replace_slice("items", rows, night, expected=version).version

    return retried(write)


def _absent_items(
    context: RunContext, item_ids_version: int, present_items: DataFrame
) -> DataFrame:
    """Return rows of `items` for the items of this night's dictionary that are not in
    `present_items`: not available from the night on.
    """
    dictionary = context.catalog.read("item_ids", item_ids_version)
    known_tonight = dictionary.where(F.col("run_date") <= F.lit(context.run_date))
    absent = known_tonight.join(present_items, on="item_id", how="left_anti")
    return absent.select(
        "item_id",
        "item_idx",
        F.lit(False).alias("available"),
        F.lit(context.run_date.isoformat()).cast("timestamp").alias("valid_from"),
        F.lit(context.run_date).alias("ingest_date"),
    )


def _assign_ids(
    context: RunContext, names: DataFrame, table: str, id_column: str, idx_column: str
) -> int:
    return _insert_new(
        context.catalog,
        table,
        lambda known_ids: ids.new_ids(names, known_ids, id_column, idx_column, context.run_date),
    )


def _insert_new(
    catalog: TableCatalog, table: str, new_rows: Callable[[DataFrame], DataFrame]
) -> int:
    """Insert rows that are computed from the newest version of a table; return the new version.

    Where another writer commits first, the table is read again and the rows are computed again.
    """

    def insert() -> int:
        version = catalog.version(table)
        return catalog.insert_new(table, new_rows(catalog.read(table, version)), version).version

    return retried(insert)
