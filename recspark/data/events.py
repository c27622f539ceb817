"""Raw events to clean events, quarantine and duplicates: every row of a landing gets one
verdict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import cutoff_of
from recspark.errors import ConservationError, SchemaError, SourceError
from recspark.tables import damage

CLEAN, QUARANTINED, DUPLICATE = "clean", "quarantined", "duplicate"

NO_EVENT_ID = "no event id"
NO_USER = "no user"
NO_ITEM = "no item"
NO_EVENT_TYPE = "no event type"
NO_TIME = "no time"
TOO_EARLY = "event before 1970-01-02"
IN_THE_FUTURE = "event in the future"
TOO_LATE = "event too late"
NOT_FINITE = "value not finite"
QUANTITY = "quantity not positive"
# Of duplicates; they are not quarantined.
TWICE = "twice in this landing"
KNOWN = "already ingested"
# As `raise_error` ends a job.
_RAISED = re.compile(r"\[USER_RAISED_EXCEPTION\]\s*(.+?)\s*SQLSTATE", re.DOTALL)


def check_events(
    raw: DataFrame,
    *,
    run_date: date,
    max_late_days: int,
    initial: bool,
    existing: DataFrame | None = None,
    unique_ids: bool = False,
    timezone: str = "UTC",
) -> DataFrame:
    """Return `raw` with `event_date` and `verdict`: `clean`, `quarantined` or `duplicate`.

    Parameters
    ----------
    raw : `schema.RAW_EVENTS`
    run_date : the night D; an event after its end is in the future
    max_late_days : an event of a day before D - max_late_days is too late, but for the initial
        landing
    initial : the first landing of an installation
    existing : event_id, event_date of the events that other landings gave; None = there are none
    unique_ids : no event_id occurs twice in `raw` (`Landing.unique_ids`), which saves the shuffle
    timezone : of the source: D ends with the later of its own midnight and that of UTC, so that a
        landing of a day west of Greenwich keeps its evening (training takes it in the night after)

    A quarantined row keeps the source's `reason`, else gets the first of: no event id, no user (nor
    session), no item, no event type, no time, event before 1970-01-02 (an unset time), in the
    future, too late, value not finite, quantity not positive. Only quarantined rows keep `row`. Of
    clean rows with the same event_id one stays (earliest, then smallest hash), the others are
    duplicates with the reason `twice in this landing`; one whose id is in `existing`, on a day that
    this landing may hold, is a duplicate `already ingested`. Raises SchemaError. Cost: lazy; no
    shuffle for `unique_ids` without `existing`, else one by event_id, which both checks share, and
    one of the existing ids.
    """
    _check_schema(raw)
    oldest = None if initial else run_date - timedelta(days=max_late_days)
    end = end_of_day(run_date, timezone)
    reasons = F.coalesce("reason", _reason(oldest, end))
    # What only depends on the row comes first, so that no raw text of a clean row is shuffled.
    rows = raw.select(
        *[F.col(name) for name in schema.RAW_EVENTS.names if name not in ("reason", "row")],
        F.to_date("event_at").alias("event_date"),
        reasons.alias("reason"),
        F.when(reasons.isNotNull(), F.col("row")).alias("row"),
    )
    repeats: list[tuple[Column, str]] = []
    if not unique_ids or existing is not None:
        # Quarantined rows take no part; by their own hash, rows without an id do not meet in one
        # task.
        alone = F.concat(F.lit("\x00"), F.xxhash64("row").cast("string"))
        key = F.when(F.col("reason").isNull(), F.col("event_id")).otherwise(alone)
        rows = rows.withColumn("_key", key)
    if existing is not None:
        rows = rows.join(_known_ids(existing, end, oldest), on="_key", how="left")
        repeats.append((F.col("_is_known"), KNOWN))
    if not unique_ids:
        content = F.xxhash64(
            *("user_id", "session_key", "order_id", "item_id", "event_type", "value", "quantity"),
            F.array_sort(F.map_entries("attributes")),
        )
        same_id = Window.partitionBy("_key").orderBy("event_at", content)
        rows = rows.withColumn("_n", F.row_number().over(same_id))
        repeats.append((F.col("_n") > 1, TWICE))
    repeat = F.coalesce(*[F.when(condition, F.lit(why)) for condition, why in repeats], F.lit(None))
    verdict = (
        F.when(F.col("reason").isNotNull(), QUARANTINED)
        .when(repeat.isNotNull(), DUPLICATE)
        .otherwise(CLEAN)
    )
    return rows.select(
        *[F.col(name) for name in schema.RAW_EVENTS.names if name not in ("reason", "row")],
        F.coalesce("reason", repeat).alias("reason"),
        F.col("row"),
        F.col("event_date"),
        verdict.alias("verdict"),
    )


def clean_of(checked: DataFrame, run_date: date) -> DataFrame:
    """Return the clean rows of `check_events` as `schema.EVENTS`, ingested on `run_date`."""
    rows = checked.where(F.col("verdict") == CLEAN)
    return rows.withColumn("ingest_date", F.lit(run_date)).select(*schema.EVENTS.names)


def quarantine_of(checked: DataFrame, run_date: date, source: str) -> DataFrame:
    """Return the quarantined rows of `check_events` as `schema.QUARANTINE`."""
    rows = checked.where(F.col("verdict") == QUARANTINED)
    # A year beyond 9999 is for Spark alone; no other reader of the table can show it.
    is_shown = F.year("event_date").between(1, 9999)
    named = rows.withColumns(
        {
            "ingest_date": F.lit(run_date),
            "source": F.lit(source),
            "event_date": F.when(is_shown, F.col("event_date")),
        }
    )
    return named.select(*schema.QUARANTINE.names)


@dataclass(frozen=True)
class Counts:
    """How many rows of a landing got which verdict.

    Parameters
    ----------
    n_in : rows of the landing, counted on their own where `count_verdicts` was given them
    by_reason : reason -> quarantined rows, most frequent first
    by_repeat : `twice in this landing`, `already ingested` -> duplicates
    """

    n_in: int
    n_clean: int
    n_quarantined: int
    n_duplicates: int
    by_reason: dict[str, int]
    by_repeat: dict[str, int]

    def check(self) -> None:
        """Raise ConservationError unless in = clean + quarantined + duplicates."""
        n_out = self.n_clean + self.n_quarantined + self.n_duplicates
        if self.n_in != n_out:
            raise ConservationError(
                f"{self.n_in:,} rows in, but {self.n_clean:,} clean + {self.n_quarantined:,} quarantined "
                f"+ {self.n_duplicates:,} duplicates = {n_out:,}; nothing was written. Did the landing "
                "change while it was read? Run the night again"
            )


def count_verdicts(checked: DataFrame, raw: DataFrame | None = None) -> Counts:
    """Return the rows per verdict and reason of `check_events`, by one action.

    `raw`, the frame that went in, is counted too: by a second scan of one column, which shares
    neither joins nor windows with `checked`, so that a row lost or doubled there is noticed.
    Without it `n_in` is the number of rows that came out. Raises SourceError where a file of the
    landing cannot be read.
    """
    counted = checked.groupBy("verdict", "reason").agg(F.count(F.lit(1)).alias("n"))
    if raw is not None:
        # A count of no column at all would count lines of text, not rows.
        total = raw.agg(F.count(F.lit(1)).alias("n"), F.max(F.length("item_id")).alias("_"))
        counted = counted.unionByName(
            total.select(
                F.lit("in").alias("verdict"), F.lit(None).cast("string").alias("reason"), "n"
            )
        )
    try:
        rows = counted.orderBy(F.desc("n"), "reason").collect()
    except (PySparkException, Py4JJavaError) as error:
        raise _named(error, raw) from error
    of = {
        verdict: {row["reason"]: int(row["n"]) for row in rows if row["verdict"] == verdict}
        for verdict in (CLEAN, QUARANTINED, DUPLICATE, "in")
    }
    n_out = sum(int(row["n"]) for row in rows if row["verdict"] != "in")
    return Counts(
        n_in=n_out if raw is None else sum(of["in"].values()),
        n_clean=sum(of[CLEAN].values()),
        n_quarantined=sum(of[QUARANTINED].values()),
        n_duplicates=sum(of[DUPLICATE].values()),
        by_reason=of[QUARANTINED],
        by_repeat=of[DUPLICATE],
    )


def end_of_day(run_date: date, timezone: str) -> datetime:
    """Return when `run_date` is over, both in `timezone` and in UTC.

    >>> end_of_day(date(2024, 3, 30), "America/New_York").isoformat()
    '2024-03-31T04:00:00+00:00'
    >>> end_of_day(date(2024, 3, 30), "Asia/Tokyo").isoformat()
    '2024-03-31T00:00:00+00:00'
    """
    midnight = datetime.combine(run_date + timedelta(days=1), time(), ZoneInfo(timezone))
    return max(midnight.astimezone(UTC), cutoff_of(run_date))


def _reason(oldest: date | None, end: datetime) -> Column:
    at = F.col("event_at")
    checks = [
        (_is_blank("event_id"), NO_EVENT_ID),
        (_is_blank("user_id") & _is_blank("session_key"), NO_USER),
        (_is_blank("item_id"), NO_ITEM),
        (_is_blank("event_type"), NO_EVENT_TYPE),
        (at.isNull(), NO_TIME),
        (F.to_date(at) < F.lit(date(1970, 1, 2)), TOO_EARLY),
        (at >= F.lit(end), IN_THE_FUTURE),
        (~_is_finite("value") | ~_is_finite("quantity"), NOT_FINITE),
        (F.col("quantity") <= 0, QUANTITY),
    ]
    if oldest is not None:
        checks.insert(7, (F.to_date(at) < F.lit(oldest), TOO_LATE))
    return F.coalesce(*[F.when(condition, F.lit(why)) for condition, why in checks])


def _is_blank(name: str) -> Column:
    return F.coalesce(F.trim(name) == "", F.lit(True))


def _is_finite(name: str) -> Column:
    size = F.abs(F.col(name))
    return F.coalesce(~F.isnan(size) & (size < float("inf")), F.lit(True))


def _known_ids(existing: DataFrame, end: datetime, oldest: date | None) -> DataFrame:
    days = F.col("event_date") < F.lit(end)
    if oldest is not None:
        days &= F.col("event_date") >= F.lit(oldest)
    ids = existing.where(days).select(F.col("event_id").alias("_key")).distinct()
    return ids.withColumn("_is_known", F.lit(True))


def _check_schema(raw: DataFrame) -> None:
    have = {field.name: field.dataType.simpleString() for field in raw.schema}
    want = {field.name: field.dataType.simpleString() for field in schema.RAW_EVENTS}
    wrong = [
        f"{name} {want[name]}, found {have.get(name, 'none')}"
        for name in want
        if have.get(name) != want[name]
    ]
    if wrong:
        raise SchemaError(f"a source must give schema.RAW_EVENTS; expected {'; '.join(wrong)}")


def _named(error: Exception, raw: DataFrame | None) -> Exception:
    """Return a SourceError that names the file of `raw` which could not be read, or says what a
    source's reader raised; else `error` itself: a file of a table is none of the landing's.
    """
    raised = _RAISED.search(str(error))
    if raised is not None:
        return SourceError(f"{raised[1]}; nothing was written")
    failed = damage.failed_file(error)
    if failed is None:
        return error
    uri = unquote(failed[0])
    if raw is not None and uri not in {unquote(file) for file in raw.inputFiles()}:
        return error
    return damage.unread_source(*failed)
