"""Stage ingest: the landing of the night into events, quarantine, dictionaries and catalogue."""

from __future__ import annotations

from collections.abc import Callable

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data import events as raw
from recspark.data import features, ids
from recspark.errors import SourceError
from recspark.pipeline.run import RunContext, StageResult
from recspark.session import together
from recspark.sources import read_landing
from recspark.tables.catalog import TableCatalog, retried


def ingest(context: RunContext) -> StageResult:
    """Landing to `events` and `quarantine`, the id dictionaries and the catalogue."""
    config, catalog, run_date = context.config, context.catalog, context.run_date
    # The newest version, not the pinned one: a night run after a later one must know what that one
    # landed. A night's own rows do not count, so that a retry finds what the first try found.
    version = catalog.version("events")
    known = catalog.read("events", version)
    landing = read_landing(
        context.spark, config.source, run_date, initial=is_first_landing(context, known)
    )
    elsewhere = known.where(F.col("ingest_date") != F.lit(run_date)).select(
        "event_id", "event_date"
    )
    checked = raw.check_events(
        landing.events,
        run_date=run_date,
        max_late_days=config.ingest.max_late_days,
        initial=landing.initial,
        existing=elsewhere,
        unique_ids=landing.unique_ids,
        timezone=config.source.timezone,
    ).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        counts = raw.count_verdicts(checked, landing.events)
        counts.check()
        if counts.n_in and counts.n_clean < config.ingest.min_clean_fraction * counts.n_in:
            raise SourceError(
                f"source '{config.source.name}', night {run_date}: only {counts.n_clean:,} of {counts.n_in:,} "
                f"rows are clean (quarantined {counts.by_reason}, duplicates {counts.by_repeat}); nothing "
                f"was written. {_advice(counts)}"
            )
        night = {"ingest_date": run_date}
        clean = raw.clean_of(checked, run_date)
        # Events last: were they there without their ids, a later night would leave them out.
        user_ids, item_ids, quarantine = together(
            context.spark,
            lambda: _assign(context, clean, "user_ids", "user_id", "user_idx"),
            lambda: _assign(context, clean, "item_ids", "item_id", "item_idx"),
            lambda: (
                catalog.replace_slice(
                    "quarantine", raw.quarantine_of(checked, run_date, config.source.name), night
                ).version
            ),
        )
        outputs = {
            "quarantine": quarantine,
            # From what was known: another night's landing may hold the same events, and be quicker.
            "events": catalog.replace_slice("events", clean, night, expected=version).version,
            "user_ids": user_ids,
            "item_ids": item_ids,
        }
        if landing.items is not None:
            dictionary = catalog.read("item_ids", outputs["item_ids"]).select("item_id", "item_idx")
            landed = landing.items.join(F.broadcast(dictionary), on="item_id", how="inner").select(
                *schema.ITEMS.names
            )
            outputs["items"] = _insert(
                catalog, "items", lambda now: features.changed_items(landed, now)
            )
        else:
            catalog.create("items")
            outputs["items"] = catalog.version("items") or 0
    finally:
        checked.unpersist()
    detail = {
        "landing": landing.digest,
        "initial": landing.initial,
        "clean": counts.n_clean,
        "quarantined": counts.by_reason,
        "duplicates": counts.n_duplicates,
    }
    return StageResult(outputs, counts.n_in, counts.n_clean, detail)


def _advice(counts: raw.Counts) -> str:
    known = counts.by_repeat.get(raw.KNOWN, 0)
    if known > counts.n_quarantined:
        return (
            "Most rows were ingested on another night already: does an archive's first night lie after "
            "this one? Then its events are there, and there is nothing to do"
        )
    return "Mend the landing, or lower ingest.min_clean_fraction if this is right"


def is_first_landing(context: RunContext, events: DataFrame) -> bool:
    """Return whether no earlier night has landed: then an archive source gives everything up to
    D.
    """
    first = events.agg(F.min("ingest_date")).collect()[0][0]
    return first is None or context.run_date <= first


def _assign(
    context: RunContext, clean: DataFrame, table: str, id_column: str, idx_column: str
) -> int:
    return _insert(
        context.catalog,
        table,
        lambda known: ids.new_ids(clean, known, id_column, idx_column, context.run_date),
    )


def _insert(catalog: TableCatalog, table: str, rows: Callable[[DataFrame], DataFrame]) -> int:
    """Insert rows computed from the table's newest version; read again when somebody else was
    quicker.
    """

    def insert() -> int:
        version = catalog.version(table)
        return catalog.insert_new(table, rows(catalog.read(table, version)), version).version

    return retried(insert)
