"""Raw events to clean events, quarantine and duplicates: every row of a landing gets one
verdict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import reduce
from typing import Literal
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

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
REFUSED = "already refused"
# The two inputs of a source, as table `quarantine` names them.
Input = Literal["events", "catalogue"]


_CONTENT = tuple(
    name for name in schema.RAW_EVENTS.names if name not in ("event_id", "reason", "row")
)


@dataclass(frozen=True)
class Period:
    """The times that a landing may hold: days from `oldest` (None = any), instants before `end`."""

    oldest: date | None
    end: datetime

    @classmethod
    def of(cls, run_date: date, max_late_days: int, *, initial: bool, timezone: str) -> Period:
        """Return that of the night `run_date`; see `check_events`."""
        oldest = None if initial else run_date - timedelta(days=max_late_days)
        return cls(oldest, end_of_day(run_date, timezone))


def check_events(
    raw: DataFrame,
    *,
    run_date: date,
    max_late_days: int,
    initial: bool,
    existing: DataFrame | None = None,
    refused: DataFrame | None = None,
    unique_ids: bool = False,
    timezone: str = "UTC",
) -> DataFrame:
    """Return `raw` with `event_date`, `row_id` and `verdict`: clean, quarantined or duplicate.

    Parameters
    ----------
    raw : `schema.RAW_EVENTS`
    run_date : the night D; an event after its end is in the future
    max_late_days : an event of a day before D - max_late_days is too late, but for the initial
        landing
    initial : the first landing of an installation
    existing : event_id of the events that other landings gave; None = there are none. All of them,
        of whatever day: an id may come again with another time. Ids that were made of the row
        (`unique_ids`) hold its time, so there those of the landing's own days will do
    refused : row_id of the rows that other landings refused; None = there are none
    unique_ids : no event_id occurs twice in `raw` (`Landing.unique_ids`), which saves the shuffle
    timezone : of the source: D ends with the later of its own midnight and that of UTC, so that a
        landing of a day west of Greenwich keeps its evening (training takes it in the night after)

    A refused row keeps the source's `reason`, else gets the first of: no event id, no user (nor
    session), no item, no event type, no time, event before 1970-01-02 (an unset time), in the
    future, value not finite, quantity not positive, too late. Then what came before is told apart,
    so that it is neither taken nor refused a second time:

    - one whose id is in `existing` is a duplicate `already ingested`, also where it would be too
      late by now: what a rolling window or a full dump brings again;
    - one that was refused before is a duplicate `already refused`. It is known by its `row_id`, which
      `quarantine` keeps: a digest of the event's columns and the reason (not of the raw row, whose
      further columns may say when it was exported), of the raw row where it has no event_id; an
      event that was too late is known by its event_id.

    Of fine rows with the same event_id one stays (earliest, then smallest hash), the others are
    duplicates `twice in this landing`. Only quarantined rows keep `row`; those too late have none
    here, as nearly all of a dump would (`quarantine_of` fetches them). Raises SchemaError. Cost:
    lazy; no shuffle for `unique_ids` on a first night, else one by event_id, which all checks
    share, and one of the ids in `existing` and `refused` (40 bytes each, the dearest part of a
    night whose source names its own ids: nothing else follows all events that there are).
    """
    period = Period.of(run_date, max_late_days, initial=initial, timezone=timezone)
    rows = _judged(raw, period)
    is_fine = F.col("reason").isNull()
    is_late = F.coalesce(F.col("reason") == TOO_LATE, F.lit(False))
    # What only depends on the row comes first, so that no raw text of a clean row is shuffled. Other
    # refused rows have a key of their own: without an id they would meet in one task.
    rows = rows.withColumns(
        {
            "row": F.when(~is_fine & ~is_late, F.col("row")),
            "row_id": F.when(is_late, F.col("event_id")).when(
                ~is_fine, row_id("event_id", _CONTENT)
            ),
        }
    )
    if not unique_ids or existing is not None or refused is not None:
        rows = rows.withColumn("_key", F.coalesce("row_id", "event_id"))
    rows = known_rows(rows, existing, refused)
    repeats = [(F.col("_was_clean") & (is_fine | is_late), KNOWN)]
    if not unique_ids:
        content = F.xxhash64(
            *("user_id", "session_key", "order_id", "item_id", "event_type", "value", "quantity"),
            F.array_sort(F.map_entries("attributes")),
        )
        same_id = Window.partitionBy("_key").orderBy(~is_fine, "event_at", content)
        rows = rows.withColumn("_n", F.row_number().over(same_id))
        repeats.append((is_fine & (F.col("_n") > 1), TWICE))
    return with_verdict(rows, repeats).select(
        *schema.RAW_EVENTS.names, "event_date", "row_id", "verdict"
    )


def row_id(key: str, content: Sequence[str]) -> Column:
    """Return what a refused row is known by when it is delivered again: a digest of `key`, the columns
    `content` and `reason`; of the raw text `row` where it has no `key`.
    """
    said = F.to_json(F.struct(key, *content, "reason"))
    known_by = F.when(is_blank(key), F.coalesce("row", F.lit(""))).otherwise(said)
    return F.concat(F.lit("row "), F.md5(known_by))


def known_rows(rows: DataFrame, existing: DataFrame | None, refused: DataFrame | None) -> DataFrame:
    """Return `rows` with `_was_clean` boolean: whether `_key` was clean on another night (event_id
    of `existing`), was refused (row_id of `refused`), or is new (null).

    Cost: one shuffle of `rows` by `_key` and one of the ids; none where both are None.
    """
    keys = []
    if existing is not None:
        keys.append(
            existing.select(F.col("event_id").alias("_key"), F.lit(True).alias("_is_event"))
        )
    if refused is not None:
        keys.append(refused.select(F.col("row_id").alias("_key"), F.lit(False).alias("_is_event")))
    if not keys:
        return rows.withColumn("_was_clean", F.lit(None).cast("boolean"))
    known = (
        reduce(DataFrame.union, keys).groupBy("_key").agg(F.max("_is_event").alias("_was_clean"))
    )
    return rows.join(known, on="_key", how="left")


def with_verdict(rows: DataFrame, repeats: Sequence[tuple[Column, str]]) -> DataFrame:
    """Return `rows` with `verdict`, and the first of `repeats` that holds as `reason` of a duplicate.

    A row with a reason that was refused before is one too (`known_rows`). Duplicates lose `row`.
    """
    was_refused = F.col("reason").isNotNull() & ~F.col("_was_clean")
    repeat = F.coalesce(
        *[F.when(condition, F.lit(why)) for condition, why in (*repeats, (was_refused, REFUSED))]
    )
    verdict = F.when(F.col("_repeat").isNotNull(), DUPLICATE).when(
        F.col("reason").isNotNull(), QUARANTINED
    )
    return rows.withColumn("_repeat", repeat).withColumns(
        {
            "verdict": verdict.otherwise(CLEAN),
            "reason": F.coalesce("_repeat", "reason"),
            "row": F.when(F.col("_repeat").isNull(), F.col("row")),
        }
    )


def clean_of(checked: DataFrame, run_date: date) -> DataFrame:
    """Return the clean rows of `check_events` as `schema.EVENTS`, ingested on `run_date`."""
    rows = checked.where(F.col("verdict") == CLEAN)
    return rows.withColumn("ingest_date", F.lit(run_date)).select(*schema.EVENTS.names)


def quarantine_of(
    checked: DataFrame, run_date: date, source: str, landed: Input = "events"
) -> DataFrame:
    """Return the quarantined rows of `check_events` or `check_items` as `schema.QUARANTINE`."""
    rows = checked.where(F.col("verdict") == QUARANTINED)
    # A year beyond 9999 is for Spark alone; no other reader of the table can show it.
    is_shown = F.year("event_date").between(1, 9999)
    named = rows.withColumns(
        {
            "ingest_date": F.lit(run_date),
            "source": F.lit(source),
            "input": F.lit(landed),
            "event_date": F.when(is_shown, F.col("event_date")),
        }
    )
    return named.select(*schema.QUARANTINE.names)


def with_late_rows(checked: DataFrame, raw: DataFrame, period: Period) -> DataFrame:
    """Return the quarantined rows of `check_events` with the raw text of those that are too late.

    `raw` is what was checked, and read once more here: ask only where there are such rows. Cost: one
    shuffle of the ids that are too late, or none where they are few enough to be broadcast.
    """
    quarantined = checked.where(F.col("verdict") == QUARANTINED)
    is_late = F.col("reason") == TOO_LATE
    late = quarantined.where(is_late).select("event_id").distinct()
    fetched = _judged(raw, period).where(is_late).join(late, on="event_id", how="left_semi")
    fetched = fetched.withColumns({"row_id": F.col("event_id"), "verdict": F.lit(QUARANTINED)})
    return quarantined.where(~is_late).unionByName(fetched.select(*checked.columns))


@dataclass(frozen=True)
class Counts:
    """How many rows of a landing got which verdict.

    Parameters
    ----------
    n_in : rows of the landing, counted on their own where `count_verdicts` was given them
    by_reason : reason -> quarantined rows, most frequent first
    by_repeat : `twice in this landing`, `already ingested`, `already refused` -> duplicates
    """

    n_in: int
    n_clean: int
    n_quarantined: int
    n_duplicates: int
    by_reason: dict[str, int]
    by_repeat: dict[str, int]

    @property
    def n_new(self) -> int:
        """Rows that no landing gave before."""
        return self.n_clean + self.n_quarantined

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
    rows = _collected(counted.orderBy(F.desc("n"), "reason"), raw)
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


def event_types(clean: DataFrame, most: int = 50) -> dict[str, int]:
    """Return event type -> rows of `clean`, the `most` frequent ones (ties by name). One action."""
    counted = clean.groupBy("event_type").agg(F.count(F.lit(1)).alias("n"))
    rows = counted.orderBy(F.desc("n"), "event_type").limit(most).collect()
    return {row["event_type"]: int(row["n"]) for row in rows}


def oldest_day(raw: DataFrame) -> date | None:
    """Return the first day, UTC, of `raw` from 1970-01-02 on; None where no row has one. One action.

    Raises SourceError where a file of the landing cannot be read.
    """
    day = F.to_date("event_at")
    rows = raw.where(day >= F.lit(date(1970, 1, 2))).agg(F.min(day).alias("day"))
    first: date | None = _collected(rows, raw)[0]["day"]
    return first


def end_of_day(run_date: date, timezone: str) -> datetime:
    """Return when `run_date` is over, both in `timezone` and in UTC.

    >>> end_of_day(date(2024, 3, 30), "America/New_York").isoformat()
    '2024-03-31T04:00:00+00:00'
    >>> end_of_day(date(2024, 3, 30), "Asia/Tokyo").isoformat()
    '2024-03-31T00:00:00+00:00'
    """
    midnight = datetime.combine(run_date + timedelta(days=1), time(), ZoneInfo(timezone))
    return max(midnight.astimezone(UTC), cutoff_of(run_date))


def _judged(raw: DataFrame, period: Period) -> DataFrame:
    """Return `raw` with `event_date` and the reason that the row alone gives; narrow."""
    check_schema(raw, schema.RAW_EVENTS, "RAW_EVENTS")
    return raw.select(
        *[F.col(name) for name in schema.RAW_EVENTS.names if name != "reason"],
        F.to_date("event_at").alias("event_date"),
        F.coalesce("reason", _reason(period)).alias("reason"),
    )


def _reason(period: Period) -> Column:
    at = F.col("event_at")
    checks = [
        (is_blank("event_id"), NO_EVENT_ID),
        (is_blank("user_id") & is_blank("session_key"), NO_USER),
        (is_blank("item_id"), NO_ITEM),
        (is_blank("event_type"), NO_EVENT_TYPE),
        (at.isNull(), NO_TIME),
        (F.to_date(at) < F.lit(date(1970, 1, 2)), TOO_EARLY),
        (at >= F.lit(period.end), IN_THE_FUTURE),
        (~is_finite("value") | ~is_finite("quantity"), NOT_FINITE),
        (F.col("quantity") <= 0, QUANTITY),
    ]
    if period.oldest is not None:
        checks.append((F.to_date(at) < F.lit(period.oldest), TOO_LATE))
    return F.coalesce(*[F.when(condition, F.lit(why)) for condition, why in checks])


def is_blank(name: str) -> Column:
    """Return whether the column is null or blank."""
    return F.coalesce(F.trim(name) == "", F.lit(True))


def is_finite(name: str) -> Column:
    """Return whether the number is neither NaN nor infinite; a null is fine."""
    size = F.abs(F.col(name))
    return F.coalesce(~F.isnan(size) & (size < float("inf")), F.lit(True))


def check_schema(raw: DataFrame, wanted: StructType, name: str) -> None:
    """Raise SchemaError where `raw` lacks columns of `schema.<name>`, or has them as other types."""
    have = {field.name: field.dataType.simpleString() for field in raw.schema}
    want = {field.name: field.dataType.simpleString() for field in wanted}
    wrong = [
        f"{column} {want[column]}, found {have.get(column, 'none')}"
        for column in want
        if have.get(column) != want[column]
    ]
    if wrong:
        raise SchemaError(f"a source must give schema.{name}; expected {'; '.join(wrong)}")


def _collected(rows: DataFrame, raw: DataFrame | None) -> list[Row]:
    try:
        return rows.collect()
    except (PySparkException, Py4JJavaError) as error:
        raise _named(error, raw) from error


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
