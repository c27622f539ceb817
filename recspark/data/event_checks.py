"""Checks of raw events: each row of a landing is clean, quarantined or a duplicate."""

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
# Reasons of duplicates, which are not quarantined.
TWICE = "twice in this landing"
KNOWN = "already ingested"
# The text of the error when SQL's `raise_error` ends a job; the group is the message.
_RAISED = re.compile(r"\[USER_RAISED_EXCEPTION\]\s*(.+?)\s*SQLSTATE", re.DOTALL)
REFUSED = "already refused"
# The two inputs of a source, as table `quarantine` names them.
Input = Literal["events", "catalogue"]


# The columns that a refused event is known by when it is delivered again; see `row_id`.
_CONTENT = tuple(
    name for name in schema.RAW_EVENTS.names if name not in ("event_id", "reason", "row")
)


@dataclass(frozen=True)
class Period:
    """The times that a landing may hold: from the day `oldest` on (None = any), before `end`."""

    oldest: date | None
    end: datetime

    @classmethod
    def of(cls, run_date: date, max_late_days: int, *, initial: bool, timezone: str) -> Period:
        """Return the period of the night `run_date`; see `check_events` for the arguments."""
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
    run_date : the night D; an event after the end of D is in the future
    max_late_days : an event of a day before D - max_late_days is too late. The initial landing has
        no such limit
    initial : whether this is the first landing of an installation
    existing : event_id of the events that other landings delivered; None = there are none. All ids
        are needed, of whatever day, because an id may come again with another time. Ids that were
        made from the row (`unique_ids`) contain its time, so the ids of the landing's days are
        enough then
    refused : row_id of the rows that other landings refused; None = there are none
    unique_ids : whether no event_id occurs twice in `raw` (`Landing.unique_ids`), which saves the
        shuffle
    timezone : of the source. D ends at midnight in this zone or in UTC, whichever is later, so that
        a landing of a day west of Greenwich keeps its evening (training takes the evening in the
        next night)

    A refused row keeps the `reason` that the source gave. Otherwise the row gets the first reason
    that holds of: no event id, no user (and no session), no item, no event type, no time, event
    before 1970-01-02 (an unset time), in the future, value not finite, quantity not positive, too
    late.

    A row that was delivered before is neither taken nor refused a second time:

    - A row whose event_id is in `existing` is a duplicate `already ingested`, even where the event
      would be too late by now. A rolling window or a full dump delivers events again in this way.
    - A row that was refused before is a duplicate `already refused`. The row is known by its
      `row_id`, which table `quarantine` keeps: a digest of the event's columns and the reason. The
      digest leaves out the rest of the raw row, because its further columns may say when the row
      was exported. A row without an event_id has a digest of the raw row, and an event that was too
      late is known by its event_id.

    Of fine rows with the same event_id one stays (the earliest, then the one with the smallest
    hash), and the others are duplicates `twice in this landing`. Only quarantined rows keep `row`.
    Rows that are too late have no `row` in this result, because nearly all rows of a dump may be
    too late (`with_late_rows` fetches the texts).

    Raises SchemaError where `raw` lacks a column or has one of another type. Cost: lazy. With
    `unique_ids` on a first night there is no shuffle. Otherwise there is one shuffle by event_id,
    which all checks share, and one of the ids in `existing` and `refused`, 40 bytes each. That is
    the dearest part of a night whose source names the ids: no other cost grows with the number of
    all events ever ingested.
    """
    period = Period.of(run_date, max_late_days, initial=initial, timezone=timezone)
    rows = _with_reason(raw, period)
    is_fine = F.col("reason").isNull()
    is_late = F.coalesce(F.col("reason") == TOO_LATE, F.lit(False))
    # The columns that depend on the row alone come first, so that the raw text of a clean row is
    # not shuffled. A row that is refused for another reason than its lateness gets a key different
    # from its event_id: all rows without an event_id would otherwise meet in one task.
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
    rows = join_earlier_verdicts(rows, existing, refused)
    repeats = [(F.col("_was_clean") & (is_fine | is_late), KNOWN)]
    if not unique_ids:
        content_hash = F.xxhash64(
            *("user_id", "session_key", "order_id", "item_id", "event_type", "value", "quantity"),
            F.array_sort(F.map_entries("attributes")),
        )
        rows_of_key = Window.partitionBy("_key").orderBy(~is_fine, "event_at", content_hash)
        rows = rows.withColumn("_n", F.row_number().over(rows_of_key))
        repeats.append((is_fine & (F.col("_n") > 1), TWICE))
    return with_verdict(rows, repeats).select(
        *schema.RAW_EVENTS.names, "event_date", "row_id", "verdict"
    )


def row_id(key: str, content: Sequence[str]) -> Column:
    """Return the id by which a refused row is recognised when the row is delivered again.

    The id is a digest of the columns `key`, `content` and `reason`. Where `key` is blank, the id is
    a digest of the raw text `row`.
    """
    columns_as_json = F.to_json(F.struct(key, *content, "reason"))
    digested = F.when(is_blank(key), F.coalesce("row", F.lit(""))).otherwise(columns_as_json)
    return F.concat(F.lit("row "), F.md5(digested))


def join_earlier_verdicts(
    rows: DataFrame, existing: DataFrame | None, refused: DataFrame | None
) -> DataFrame:
    """Return `rows` with `_was_clean`, boolean: the verdict that `_key` had on another night.

    True: the row was clean (an event_id of `existing`). False: the row was refused (a row_id of
    `refused`). Null: the row is new. Cost: one shuffle of `rows` by `_key` and one of the ids; no
    shuffle where both `existing` and `refused` are None.
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
    # A key that is in both counts as clean.
    earlier_verdicts = (
        reduce(DataFrame.union, keys).groupBy("_key").agg(F.max("_is_event").alias("_was_clean"))
    )
    return rows.join(earlier_verdicts, on="_key", how="left")


def with_verdict(rows: DataFrame, repeats: Sequence[tuple[Column, str]]) -> DataFrame:
    """Return `rows` with `verdict`; a duplicate gets as `reason` the first of `repeats` that holds.

    `repeats` are pairs of a condition and the reason of a duplicate. A row that has a reason to be
    refused and was refused before (`join_earlier_verdicts`) is a duplicate too. Duplicates lose
    `row`.
    """
    was_refused = F.col("reason").isNotNull() & ~F.col("_was_clean")
    repeat = F.coalesce(
        *[
            F.when(condition, F.lit(reason))
            for condition, reason in (*repeats, (was_refused, REFUSED))
        ]
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
    # Only Spark can show a year beyond 9999; other readers of the table cannot.
    is_displayable = F.year("event_date").between(1, 9999)
    quarantine = rows.withColumns(
        {
            "ingest_date": F.lit(run_date),
            "source": F.lit(source),
            "input": F.lit(landed),
            "event_date": F.when(is_displayable, F.col("event_date")),
        }
    )
    return quarantine.select(*schema.QUARANTINE.names)


def with_late_rows(checked: DataFrame, raw: DataFrame, period: Period) -> DataFrame:
    """Return the quarantined rows of `check_events`, the late ones with their raw text `row`.

    `check_events` leaves out the raw text of rows that are too late. This function reads `raw`, the
    input of `check_events`, once more; call it only where some rows are too late. Cost: one shuffle
    of the ids that are too late, or none where they are few enough to be broadcast.
    """
    quarantined = checked.where(F.col("verdict") == QUARANTINED)
    is_late = F.col("reason") == TOO_LATE
    late_ids = quarantined.where(is_late).select("event_id").distinct()
    late_rows = (
        _with_reason(raw, period).where(is_late).join(late_ids, on="event_id", how="left_semi")
    )
    late_rows = late_rows.withColumns({"row_id": F.col("event_id"), "verdict": F.lit(QUARANTINED)})
    return quarantined.where(~is_late).unionByName(late_rows.select(*checked.columns))


@dataclass(frozen=True)
class Counts:
    """How many rows of a landing got which verdict.

    Parameters
    ----------
    n_in : rows of the landing; counted by a separate scan where `count_verdicts` got `raw`
    by_reason : reason -> number of quarantined rows, most frequent first
    by_repeat : `twice in this landing`, `already ingested` or `already refused` -> number of
        duplicates, most frequent first
    """

    n_in: int
    n_clean: int
    n_quarantined: int
    n_duplicates: int
    by_reason: dict[str, int]
    by_repeat: dict[str, int]

    @property
    def n_new(self) -> int:
        """The number of rows that no landing delivered before."""
        return self.n_clean + self.n_quarantined

    def check(self) -> None:
        """Raise ConservationError unless n_in = n_clean + n_quarantined + n_duplicates."""
        n_out = self.n_clean + self.n_quarantined + self.n_duplicates
        if self.n_in != n_out:
            raise ConservationError(
                f"{self.n_in:,} rows in, but {self.n_clean:,} clean + {self.n_quarantined:,} quarantined "
                f"+ {self.n_duplicates:,} duplicates = {n_out:,}; nothing was written. Did the landing "
                "change while it was read? Run the night again"
            )


def count_verdicts(checked: DataFrame, raw: DataFrame | None = None) -> Counts:
    """Return the number of rows per verdict and reason of `check_events`, by one action.

    Where `raw`, the input of `check_events`, is passed, its rows are counted too. The count is a
    second scan of one column, which shares neither joins nor windows with `checked`, so that a row
    lost or doubled there is noticed. Without `raw`, `n_in` is the number of rows of `checked`.
    Raises SourceError where a file of the landing cannot be read.
    """
    counts = checked.groupBy("verdict", "reason").agg(F.count(F.lit(1)).alias("n"))
    if raw is not None:
        # Reads a column because a count that reads none would count lines of text, not rows.
        n_raw = raw.agg(F.count(F.lit(1)).alias("n"), F.max(F.length("item_id")).alias("_"))
        counts = counts.unionByName(
            n_raw.select(
                F.lit("in").alias("verdict"), F.lit(None).cast("string").alias("reason"), "n"
            )
        )
    rows = _collected(counts.orderBy(F.desc("n"), "reason"), raw)
    n_by_reason = {
        verdict: {row["reason"]: int(row["n"]) for row in rows if row["verdict"] == verdict}
        for verdict in (CLEAN, QUARANTINED, DUPLICATE, "in")
    }
    n_out = sum(int(row["n"]) for row in rows if row["verdict"] != "in")
    return Counts(
        n_in=n_out if raw is None else sum(n_by_reason["in"].values()),
        n_clean=sum(n_by_reason[CLEAN].values()),
        n_quarantined=sum(n_by_reason[QUARANTINED].values()),
        n_duplicates=sum(n_by_reason[DUPLICATE].values()),
        by_reason=n_by_reason[QUARANTINED],
        by_repeat=n_by_reason[DUPLICATE],
    )


def event_types(clean: DataFrame, most: int = 50) -> dict[str, int]:
    """Return event type -> number of rows of `clean`, for the `most` most frequent types.

    Of types that are equally frequent, the smaller name comes first. One action.
    """
    counts = clean.groupBy("event_type").agg(F.count(F.lit(1)).alias("n"))
    rows = counts.orderBy(F.desc("n"), "event_type").limit(most).collect()
    return {row["event_type"]: int(row["n"]) for row in rows}


def oldest_day(raw: DataFrame) -> date | None:
    """Return the earliest day (UTC) of an event in `raw`; None where no row has such a day.

    Days before 1970-01-02 (unset times) do not count. One action. Raises SourceError where a file
    of the landing cannot be read.
    """
    day = F.to_date("event_at")
    rows = raw.where(day >= F.lit(date(1970, 1, 2))).agg(F.min(day).alias("day"))
    oldest: date | None = _collected(rows, raw)[0]["day"]
    return oldest


def end_of_day(run_date: date, timezone: str) -> datetime:
    """Return the instant, in UTC, from which `run_date` is over both in `timezone` and in UTC.

    >>> end_of_day(date(2024, 3, 30), "America/New_York").isoformat()
    '2024-03-31T04:00:00+00:00'
    >>> end_of_day(date(2024, 3, 30), "Asia/Tokyo").isoformat()
    '2024-03-31T00:00:00+00:00'
    """
    midnight = datetime.combine(run_date + timedelta(days=1), time(), ZoneInfo(timezone))
    return max(midnight.astimezone(UTC), cutoff_of(run_date))


def _with_reason(raw: DataFrame, period: Period) -> DataFrame:
    """Return `raw` with `event_date` and the `reason` that the row alone gives.

    Narrow: no shuffle, no action.
    """
    check_schema(raw, schema.RAW_EVENTS, "RAW_EVENTS")
    return raw.select(
        *[F.col(name) for name in schema.RAW_EVENTS.names if name != "reason"],
        F.to_date("event_at").alias("event_date"),
        F.coalesce("reason", _reason(period)).alias("reason"),
    )


def _reason(period: Period) -> Column:
    # The first reason to refuse the row; null where there is none.
    event_at = F.col("event_at")
    checks = [
        (is_blank("event_id"), NO_EVENT_ID),
        (is_blank("user_id") & is_blank("session_key"), NO_USER),
        (is_blank("item_id"), NO_ITEM),
        (is_blank("event_type"), NO_EVENT_TYPE),
        (event_at.isNull(), NO_TIME),
        (F.to_date(event_at) < F.lit(date(1970, 1, 2)), TOO_EARLY),
        (event_at >= F.lit(period.end), IN_THE_FUTURE),
        (~is_finite("value") | ~is_finite("quantity"), NOT_FINITE),
        (F.col("quantity") <= 0, QUANTITY),
    ]
    if period.oldest is not None:
        checks.append((F.to_date(event_at) < F.lit(period.oldest), TOO_LATE))
    return F.coalesce(*[F.when(condition, F.lit(reason)) for condition, reason in checks])


def is_blank(name: str) -> Column:
    """Return whether the text column `name` is null, empty or all spaces."""
    return F.coalesce(F.trim(name) == "", F.lit(True))


def is_finite(name: str) -> Column:
    """Return whether the number in column `name` is neither NaN nor infinite; true for null."""
    magnitude = F.abs(F.col(name))
    return F.coalesce(~F.isnan(magnitude) & (magnitude < float("inf")), F.lit(True))


def check_schema(raw: DataFrame, expected: StructType, name: str) -> None:
    """Raise SchemaError where `raw` lacks a column of `expected` or has one of another type.

    `name` is the name of `expected` in module `schema`, for the message.
    """
    actual_types = {field.name: field.dataType.simpleString() for field in raw.schema}
    expected_types = {field.name: field.dataType.simpleString() for field in expected}
    differences = [
        f"{column} {expected_types[column]}, found {actual_types.get(column, 'none')}"
        for column in expected_types
        if actual_types.get(column) != expected_types[column]
    ]
    if differences:
        raise SchemaError(f"a source must give schema.{name}; expected {'; '.join(differences)}")


def _collected(rows: DataFrame, raw: DataFrame | None) -> list[Row]:
    # The rows on the driver. Errors are raised as `_source_error` returns them.
    try:
        return rows.collect()
    except (PySparkException, Py4JJavaError) as error:
        raise _source_error(error, raw) from error


def _source_error(error: Exception, raw: DataFrame | None) -> Exception:
    """Return the error to raise for a Spark job that failed with `error`.

    This is a SourceError with the message of the source's reader where the reader raised one, or a
    SourceError that names the file of `raw` that could not be read. For other errors, also those of
    a file that belongs to a table and not to the landing, it is `error` itself.
    """
    raised = _RAISED.search(str(error))
    if raised is not None:
        return SourceError(f"{raised[1]}; nothing was written")
    unreadable_file = damage.failed_file(error)
    if unreadable_file is None:
        return error
    uri = unquote(unreadable_file[0])
    if raw is not None and uri not in {unquote(file) for file in raw.inputFiles()}:
        return error
    return damage.unreadable_source_error(*unreadable_file)
