"""Stage ingest: the landing of the night into events, quarantine, dictionaries and catalogue."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import date
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import Config
from recspark.data import catalogue, features, ids
from recspark.data import events as raw
from recspark.errors import SourceError
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import StageResult
from recspark.session import together
from recspark.sources import Landing, read_landing
from recspark.tables.catalog import TableCatalog, retried

log = logging.getLogger(__name__)


def ingest(context: RunContext) -> StageResult:
    """Landing to `events` and `quarantine`, the id dictionaries and the catalogue.

    Everything is judged and counted before the first write. Items get their ids when they are
    described, not when they are first bought: the catalogue is kept for nights to come.
    """
    config, run_date = context.config, context.run_date
    # The newest version, not the pinned one: a night run after a later one must know what that one
    # landed. A night's own rows do not count, so that a retry finds what the first try found.
    version = context.catalog.version("events")
    known = context.catalog.read("events", version)
    first = known.agg(F.min("ingest_date")).collect()[0][0]
    initial = first is None or run_date <= first
    landing = read_landing(context.spark, config.source, run_date, initial=initial)
    refused = _refused(context)
    period = raw.Period.of(
        run_date, config.ingest.max_late_days, initial=initial, timezone=config.source.timezone
    )
    checked = raw.check_events(
        landing.events,
        run_date=run_date,
        max_late_days=config.ingest.max_late_days,
        initial=initial,
        existing=None if first is None else _existing(context, landing, known),
        refused=None if refused is None else refused.where(F.col("input") == "events"),
        unique_ids=landing.unique_ids,
        timezone=config.source.timezone,
    ).persist(StorageLevel.MEMORY_AND_DISK)
    described = _checked_items(landing, refused)
    try:
        counts, item_counts = together(
            context.spark,
            lambda: raw.count_verdicts(checked, landing.events),
            lambda: None if described is None else raw.count_verdicts(described, landing.items),
        )
        assert counts is not None
        check_share(config, run_date, "events", counts)
        if item_counts is not None:
            check_share(config, run_date, "catalogue", item_counts)
        bad = checked
        if raw.TOO_LATE in counts.by_reason:
            bad = raw.with_late_rows(checked, landing.events, period)
        clean = raw.clean_of(checked, run_date)
        outputs = _write(context, clean, bad, landing.items, described, version)
        types = raw.event_types(clean)
    finally:
        checked.unpersist()
        if described is not None:
            described.unpersist()
    warnings = type_warnings(config, types, known)
    context.progress(f"  {_told(counts)}")
    for warning in warnings:
        log.warning(warning)
    detail = {
        "landing": landing.digest,
        "initial": initial,
        **_detail(counts),
        "warnings": warnings,
    }
    if item_counts is not None:
        detail["catalogue"] = {"in": item_counts.n_in, **_detail(item_counts)}
    return StageResult(outputs, counts.n_in, counts.n_clean, detail)


def _write(
    context: RunContext,
    clean: DataFrame,
    bad: DataFrame,
    items: DataFrame | None,
    described: DataFrame | None,
    version: int | None,
) -> dict[str, int]:
    """Write the night's slices; return table -> version.

    `clean` and `bad` events, judged by the events of `version`; `items` of the landing, and
    `described`: the same with verdicts, None where they are of the events and need none.
    """
    catalog, run_date, source = context.catalog, context.run_date, context.config.source.name
    night = {"ingest_date": run_date}
    named = clean.select("item_id")
    quarantine = raw.quarantine_of(bad, run_date, source)
    if described is not None:
        items = catalogue.clean_items(described)
        named = named.unionByName(items.select("item_id"))
        bad_items = raw.quarantine_of(described, run_date, source, "catalogue")
        quarantine = quarantine.unionByName(bad_items)
    # Events last: were they there without their ids, a later night would leave them out.
    user_ids, item_ids, quarantined = together(
        context.spark,
        lambda: _assign(context, clean, "user_ids", "user_id", "user_idx"),
        lambda: _assign(context, named, "item_ids", "item_id", "item_idx"),
        lambda: catalog.replace_slice("quarantine", quarantine, night).version,
    )
    return {
        "quarantine": quarantined,
        "user_ids": user_ids,
        "item_ids": item_ids,
        "items": _write_items(context, items, item_ids),
        # From what was known: another night's landing may hold the same events, and be quicker.
        "events": catalog.replace_slice("events", clean, night, expected=version).version,
    }


def type_warnings(config: Config, types: dict[str, int], events: DataFrame) -> list[str]:
    """Return what a person should know of tonight's event types; ingest logs it, and `runs` keeps it.

    Those that are neither weighted nor impressions (a misspelt one counts `features.other_weight`),
    and those that the settings name although no event ever had them. Parameters: `types` as
    `events.event_types` gives them, `events` of the nights before. Cost: none where every type that
    is named in the settings came tonight, else one job that reads one column of `events`.
    """
    weighted, shown = config.features.event_weights, config.sessions.impression_types
    other = {kind: n for kind, n in types.items() if kind not in {*weighted, *shown}}
    warnings = []
    if other:
        counted = ", ".join(f"'{kind}' ({n:,})" for kind, n in other.items())
        warnings.append(
            f"event types that are neither in features.event_weights nor in "
            f"sessions.impression_types, and weigh {config.features.other_weight:g}: {counted}"
        )
    named: set[str] = set()
    if "event_weights" in config.features.model_fields_set:
        named |= {*weighted}
    if "impression_types" in config.sessions.model_fields_set:
        named |= {*shown}
    absent = named - {*types}
    if absent:
        came = events.where(F.col("event_type").isin(sorted(absent))).select("event_type")
        absent -= {row["event_type"] for row in came.distinct().collect()}
    if absent:
        warnings.append(
            f"no event was ever of the type {', '.join(map(repr, sorted(absent)))}, which "
            "features.event_weights or sessions.impression_types names; is it spelt as in the source?"
        )
    return warnings


def _existing(context: RunContext, landing: Landing, events: DataFrame) -> DataFrame:
    """Return the event_id of the events that other nights gave, as far as the landing may hold
    them.

    Ids that the source made hold the time, so there only the days since the landing's oldest event
    matter: one small job finds it. An archive holds every day.
    """
    others = events.where(F.col("ingest_date") != F.lit(context.run_date))
    if landing.unique_ids and not context.config.source.archive:
        since = raw.oldest_day(landing.events)
        others = others.where(F.lit(since is not None))
        if since is not None:
            others = others.where(F.col("event_date") >= F.lit(since))
    return others.select("event_id")


def _refused(context: RunContext) -> DataFrame | None:
    """Return input and row_id of what other nights refused of this source; None = nothing."""
    version = context.catalog.version("quarantine")
    if version is None:
        return None
    rows = context.catalog.read("quarantine", version)
    others = (F.col("ingest_date") != F.lit(context.run_date)) & (
        F.col("source") == context.config.source.name
    )
    return rows.where(others).select("input", "row_id")


def _checked_items(landing: Landing, refused: DataFrame | None) -> DataFrame | None:
    """Return the catalogue with its verdicts, to be kept; None where it needs none."""
    if landing.items is None or landing.items_of_events:
        return None
    before = None if refused is None else refused.where(F.col("input") == "catalogue")
    return catalogue.check_items(landing.items, before).persist(StorageLevel.MEMORY_AND_DISK)


def check_share(config: Config, run_date: date, landed: raw.Input, counts: raw.Counts) -> None:
    """Raise ConservationError where rows are lost, SourceError where too many new ones are bad.

    Rows that came before say nothing of tonight's: of a rolling window nearly all did.
    """
    counts.check()
    if counts.n_clean < config.ingest.min_clean_fraction * counts.n_new:
        raise SourceError(
            f"source '{config.source.name}', night {run_date}: of its {landed} only "
            f"{counts.n_clean:,} of {counts.n_new:,} new rows are clean (quarantined "
            f"{counts.by_reason}); nothing was written. Mend the landing, or lower "
            "ingest.min_clean_fraction if this is right"
        )


def _told(counts: raw.Counts) -> str:
    repeats = "".join(f", {n:,} {why}" for why, n in counts.by_repeat.items())
    return f"{counts.n_clean:,} new events, {counts.n_quarantined:,} rows quarantined{repeats}"


def _detail(counts: raw.Counts) -> dict[str, Any]:
    return {
        "clean": counts.n_clean,
        "quarantined": counts.by_reason,
        "duplicates": counts.n_duplicates,
        "repeats": counts.by_repeat,
    }


def _write_items(context: RunContext, items: DataFrame | None, item_ids: int) -> int:
    """Replace what this night's landing said of items by what it says now; return the version.

    Read again where another night was quicker: what is new of an item goes by all that is known.
    """
    catalog, night = context.catalog, {"ingest_date": context.run_date}

    def write() -> int:
        version = catalog.version("items")
        if items is None and version is None:
            catalog.create("items")
            return 0
        known = catalog.read("items", version)
        rows = known.limit(0)
        if items is not None:
            dictionary = catalog.read("item_ids", item_ids).select("item_id", "item_idx")
            landed = items.join(dictionary, on="item_id", how="inner").withColumn(
                "ingest_date", F.lit(context.run_date)
            )
            others = known.where(F.col("ingest_date") != F.lit(context.run_date))
            rows = features.changed_items(landed, others)
        return catalog.replace_slice("items", rows, night, expected=version).version

    return retried(write)


def _assign(
    context: RunContext, names: DataFrame, table: str, id_column: str, idx_column: str
) -> int:
    return _insert(
        context.catalog,
        table,
        lambda known: ids.new_ids(names, known, id_column, idx_column, context.run_date),
    )


def _insert(catalog: TableCatalog, table: str, rows: Callable[[DataFrame], DataFrame]) -> int:
    """Insert rows computed from the table's newest version; read again when somebody else was
    quicker.
    """

    def insert() -> int:
        version = catalog.version(table)
        return catalog.insert_new(table, rows(catalog.read(table, version)), version).version

    return retried(insert)
