"""Verdicts: what every source may lack, duplicates, and that no row is lost."""

from __future__ import annotations

from collections import Counter
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.event_checks import (
    Counts,
    Period,
    check_events,
    clean_of,
    count_verdicts,
    event_types,
    oldest_day,
    quarantine_of,
    with_late_rows,
)
from recspark.errors import ConservationError, SchemaError

pytestmark = pytest.mark.spark

NIGHT = date(2024, 5, 31)
NOON = datetime(2024, 5, 31, 12)


def an_event(**changes: Any) -> dict[str, Any]:
    event = dict.fromkeys(schema.RAW_EVENTS.names) | {
        "event_id": "e1",
        "user_id": "u1",
        "item_id": "i1",
        "event_type": "click",
        "event_at": NOON,
        "attributes": {"page": "x"},
        "row": '{"raw": 1}',
    }
    return {**event, **changes}


def raw(spark: SparkSession, events: list[dict[str, Any]]) -> DataFrame:
    rows = [tuple(event[name] for name in schema.RAW_EVENTS.names) for event in events]
    return spark.createDataFrame(rows, schema.RAW_EVENTS)


def check(spark: SparkSession, events: list[dict[str, Any]], **settings: Any) -> DataFrame:
    settings = {"run_date": NIGHT, "max_late_days": 7, "initial": False, **settings}
    return check_events(raw(spark, events), **settings)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"event_id": None, "user_id": None}, "no event id"),
    ({"event_id": " "}, "no event id"),
    ({"user_id": None, "item_id": None}, "no user"),
    ({"user_id": "", "session_key": ""}, "no user"),
    ({"item_id": None, "event_type": None}, "no item"),
    ({"item_id": "  "}, "no item"),
    ({"event_type": None, "event_at": None}, "no event type"),
    ({"event_at": None, "value": float("nan")}, "no time"),
    ({"event_at": datetime(1970, 1, 1, 23)}, "event before 1970-01-02"),
    ({"event_at": datetime(2024, 6, 1), "value": float("inf")}, "event in the future"),
    ({"event_at": datetime(2024, 5, 23, 23, 59, 59)}, "event too late"),
    ({"value": float("nan"), "quantity": -1.0}, "value not finite"),
    ({"value": float("-inf")}, "value not finite"),
    ({"quantity": float("inf")}, "value not finite"),
    ({"quantity": 0.0}, "quantity not positive"),
    ({"quantity": -1.0}, "quantity not positive"),
    ({"reason": "the source says no", "item_id": None}, "the source says no"),
]
GOOD: list[dict[str, Any]] = [
    {"event_id": "g0"},
    {"event_id": "g1", "user_id": None, "session_key": "s"},
    {"event_id": "g2", "event_at": datetime(2024, 5, 24)},
    {"event_id": "g3", "event_at": datetime(2024, 5, 31, 23, 59, 59, 999999)},
    {"event_id": "g4", "value": -1.0, "quantity": 0.5},
]


@pytest.mark.parametrize("unique_ids", [True, False])
def test_every_reason(spark: SparkSession, unique_ids: bool) -> None:
    events = [an_event(**{"event_id": f"b{i}", **bad}) for i, (bad, _) in enumerate(BAD)]
    for i, event in enumerate(events):
        event["row"] = str(i)
    events += [an_event(**good) for good in GOOD]
    checked = check(spark, events, unique_ids=unique_ids)
    counts = count_verdicts(checked, raw(spark, events))
    counts.check()
    assert (counts.n_in, counts.n_clean, counts.n_quarantined) == (22, 5, 17)
    period = Period.of(NIGHT, 7, initial=False, timezone="UTC")
    quarantine = quarantine_of(with_late_rows(checked, raw(spark, events), period), NIGHT, "shop")
    assert quarantine.schema.names == schema.QUARANTINE.names
    found = {int(row["row"]): row["reason"] for row in quarantine.collect()}
    assert found == {i: reason for i, (_, reason) in enumerate(BAD)}
    clean = clean_of(checked, NIGHT)
    assert clean.schema.simpleString() == schema.EVENTS.simpleString()
    assert {row["event_id"] for row in clean.collect()} == {good["event_id"] for good in GOOD}
    assert {row["ingest_date"] for row in clean.collect()} == {NIGHT}


def test_quarantine_holds_no_date_that_others_cannot_read(spark: SparkSession) -> None:
    at = F.timestamp_micros(F.lit(9 * 10**18))
    frame = raw(spark, [an_event()]).withColumn("event_at", at)
    checked = check_events(frame, run_date=NIGHT, max_late_days=7, initial=True)
    [row] = quarantine_of(checked, NIGHT, "shop").collect()
    assert (row["reason"], row["event_date"]) == ("event in the future", None)


def test_nothing_is_too_late_for_the_first_landing(spark: SparkSession) -> None:
    old = an_event(event_at=datetime(2001, 1, 1))
    assert [row["verdict"] for row in check(spark, [old], initial=True).collect()] == ["clean"]
    assert [row["reason"] for row in check(spark, [old]).collect()] == ["event too late"]


def test_of_equal_ids_the_earliest_stays_whatever_the_order(spark: SparkSession) -> None:
    events = [
        an_event(item_id="late", event_at=NOON + timedelta(seconds=1)),
        an_event(item_id="early"),
        an_event(item_id="bad", event_at=None),
        an_event(item_id="twin", event_id="e2"),
        an_event(item_id="twin", event_id="e2"),
        an_event(item_id="alone", event_id="e3"),
    ]
    answers = []
    for order in (events, events[::-1]):
        rows = check(spark, order).collect()
        answers.append(
            sorted((r["event_id"], r["item_id"], r["verdict"], str(r["reason"])) for r in rows)
        )
    assert answers[0] == answers[1]
    assert answers[0] == [
        ("e1", "bad", "quarantined", "no time"),
        ("e1", "early", "clean", "None"),
        ("e1", "late", "duplicate", "twice in this landing"),
        ("e2", "twin", "clean", "None"),
        ("e2", "twin", "duplicate", "twice in this landing"),
        ("e3", "alone", "clean", "None"),
    ]


def test_of_equal_ids_at_the_same_time_the_choice_is_fixed(spark: SparkSession) -> None:
    events = [an_event(item_id=str(i), attributes={"n": str(i)}) for i in range(6)]
    kept = [
        check(spark, order).where("verdict = 'clean'").collect()[0]["item_id"]
        for order in (events, events[::-1], events[3:] + events[:3])
    ]
    assert len(set(kept)) == 1


@pytest.mark.parametrize("unique_ids", [True, False])
def test_an_event_of_another_landing_is_a_duplicate(spark: SparkSession, unique_ids: bool) -> None:
    """Whatever time it has now, and where it would be too late by now."""
    # Twice should not be; it must not double the row.
    existing = spark.createDataFrame([("known",), ("known",), ("old",)], "event_id string")
    late = NOON - timedelta(days=30)
    events = [an_event(event_id=name) for name in ("known", "new")]
    events += [an_event(event_id=name, event_at=late) for name in ("old", "late")]
    events.append(an_event(event_id="known", event_at=None))
    checked = check(spark, events, existing=existing, unique_ids=unique_ids)
    found = sorted(
        (row["event_id"], row["verdict"], str(row["reason"])) for row in checked.collect()
    )
    assert found == [
        ("known", "duplicate", "already ingested"),
        ("known", "quarantined", "no time"),
        ("late", "quarantined", "event too late"),
        ("new", "clean", "None"),
        ("old", "duplicate", "already ingested"),
    ]


@pytest.mark.parametrize("unique_ids", [True, False])
def test_what_was_refused_before_is_not_refused_twice(
    spark: SparkSession, unique_ids: bool
) -> None:
    """A late event is known by its id, any other row by its columns and its fault; a row without an
    id by its text; a mended row is new."""
    late = NOON - timedelta(days=30)
    bad = [
        an_event(event_id="a", item_id=None, row="a, exported on Monday"),
        an_event(event_id="b", event_at=late),
        an_event(event_id=None, row="a line"),
    ]
    refused = quarantine_of(check(spark, bad), NIGHT - timedelta(days=1), "shop").select("row_id")
    again = [
        *bad,
        an_event(event_id="a", item_id=None, row="a, exported on Tuesday"),
        an_event(event_id="a", item_id=None, user_id="u2"),
        an_event(event_id="a", user_id=None),
        an_event(event_id="a"),
        an_event(event_id="b", event_at=late, item_id="told otherwise"),
        an_event(event_id=None, row="another line"),
        an_event(event_id="c", event_at=late),
    ]
    checked = check(spark, again, refused=refused, unique_ids=unique_ids)
    found = sorted(
        (row["event_id"] or "", row["verdict"], str(row["reason"])) for row in checked.collect()
    )
    assert found == [
        ("", "duplicate", "already refused"),
        ("", "quarantined", "no event id"),
        ("a", "clean", "None"),
        ("a", "duplicate", "already refused"),
        ("a", "duplicate", "already refused"),
        ("a", "quarantined", "no item"),
        ("a", "quarantined", "no user"),
        ("b", "duplicate", "already refused"),
        ("b", "duplicate", "already refused"),
        ("c", "quarantined", "event too late"),
    ]
    # Now it is in time: what was too late for one night may be taken by another.
    taken = check(spark, bad, refused=refused, unique_ids=unique_ids, max_late_days=60)
    assert count_verdicts(taken).by_repeat == {"already refused": 2}
    assert count_verdicts(taken).n_clean == 1


def test_a_late_twin_does_not_push_out_the_event_in_time(spark: SparkSession) -> None:
    events = [an_event(event_at=NOON - timedelta(days=30)), an_event()]
    found = {str(row["reason"]): row["verdict"] for row in check(spark, events).collect()}
    assert found == {"event too late": "quarantined", "None": "clean"}


def test_too_late_rows_keep_their_text(spark: SparkSession) -> None:
    """It is read again for those alone, so that a dump does not send the text of all its rows."""
    late = NOON - timedelta(days=30)
    events = [
        an_event(event_id="e1", event_at=late, row="first"),
        an_event(event_id="e1", event_at=late, row="twin"),
        an_event(event_id="e1", row="in time"),
        an_event(event_id="e1", item_id=None, row="no item"),
        an_event(event_id="known", event_at=late, row="known"),
    ]
    existing = spark.createDataFrame([("known",)], "event_id string")
    checked = check(spark, events, existing=existing)
    period = Period.of(NIGHT, 7, initial=False, timezone="UTC")
    rows = quarantine_of(with_late_rows(checked, raw(spark, events), period), NIGHT, "shop")
    assert sorted((row["row"], row["reason"], row["input"]) for row in rows.collect()) == [
        ("first", "event too late", "events"),
        ("no item", "no item", "events"),
        ("twin", "event too late", "events"),
    ]


def test_types_and_days_of_a_landing(spark: SparkSession) -> None:
    events = [an_event(event_type=kind) for kind in ("click", "buy", "click", "view")]
    assert event_types(raw(spark, events), most=2) == {"click": 2, "buy": 1}
    unset = an_event(event_at=datetime(1970, 1, 1))
    assert oldest_day(raw(spark, [an_event(), unset, an_event(event_at=None)])) == NIGHT
    assert oldest_day(raw(spark, [unset])) is None


def test_counts_are_by_verdict_and_reason(spark: SparkSession) -> None:
    events = [an_event(), an_event(), an_event(event_id="x", item_id=None)]
    events += [an_event(event_id=str(i), user_id=None) for i in range(2)]
    counts = count_verdicts(check(spark, events), raw(spark, events))
    assert counts == Counts(
        n_in=5,
        n_clean=1,
        n_quarantined=3,
        n_duplicates=1,
        by_reason={"no user": 2, "no item": 1},
        by_repeat={"twice in this landing": 1},
    )
    counts.check()


@pytest.mark.parametrize("change", ["lost", "doubled", "unlabelled"])
def test_a_lost_or_invented_row_is_noticed(spark: SparkSession, change: str) -> None:
    events = [an_event(event_id=str(i)) for i in range(3)]
    checked = check(spark, events)
    broken = {
        "lost": checked.where("event_id <> '1'"),
        "doubled": checked.union(checked.where("event_id = '1'")),
        "unlabelled": checked.withColumn("verdict", F.lit(None).cast("string")),
    }[change]
    with pytest.raises(ConservationError, match="3 rows in, but"):
        count_verdicts(broken, raw(spark, events)).check()


def test_clean_rows_carry_no_raw_text_and_cost_no_needless_shuffle(spark: SparkSession) -> None:
    events = [an_event(), an_event(event_id="x", item_id=None)]
    rows = {row["event_id"]: row["row"] for row in check(spark, events).collect()}
    assert rows == {"e1": None, "x": '{"raw": 1}'}
    existing = spark.createDataFrame([], "event_id string")
    refused = spark.createDataFrame([], "row_id string")
    assert n_exchanges(check(spark, events, unique_ids=True)) == 0
    assert n_exchanges(check(spark, events)) == 1
    # The landing by its ids once, for both checks; the known ids once.
    assert n_exchanges(check(spark, events, existing=existing)) <= 2
    assert n_exchanges(check(spark, events, existing=existing, refused=refused)) <= 2


def n_exchanges(frame: DataFrame) -> int:
    plan = frame._jdf.queryExecution().executedPlan().toString()  # type: ignore[operator]
    return plan.count("Exchange hashpartitioning")


def test_a_source_that_breaks_the_schema_is_told(spark: SparkSession) -> None:
    frame = raw(spark, [an_event()]).withColumn("value", F.lit("1")).drop("item_id")
    with pytest.raises(SchemaError) as error:
        check_events(frame, run_date=NIGHT, max_late_days=7, initial=True)
    assert "item_id string, found none" in str(error.value)
    assert "value double, found string" in str(error.value)


def test_a_day_west_of_greenwich_keeps_its_evening(spark: SparkSession) -> None:
    """New York's 31 May ends at 04:00 UTC; Tokyo's ended at 15:00, but the night ends with UTC."""
    at = {"evening": datetime(2024, 6, 1, 3, 59), "next": datetime(2024, 6, 1, 4)}
    events = [an_event(event_id=name, event_at=when) for name, when in at.items()]
    for zone, clean in (("America/New_York", {"evening"}), ("Asia/Tokyo", set()), ("UTC", set())):
        rows = check(spark, events, timezone=zone).where("verdict = 'clean'").collect()
        assert {row["event_id"] for row in rows} == clean, zone


class ByHand:
    """The verdicts in plain Python: what is known, and which rows were refused."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.texts: set[str] = set()  # of refused rows
        self.late: set[str] = set()  # event_id

    def verdicts(self, landing: list[dict[str, Any]], night: date) -> Counter[Any]:
        found: Counter[Any] = Counter()
        clean, texts, late = set(), set(), set()
        for event in landing:
            name, day = event["event_id"], event["event_at"].date()
            reason = None if event["item_id"] else "no item"
            reason = reason or ("event in the future" if day > night else None)
            if reason and event["row"] in self.texts:
                found["duplicate", "already refused"] += 1
            elif reason:
                found["quarantined", reason] += 1
                texts.add(event["row"])
            elif name in self.ids:
                found["duplicate", "already ingested"] += 1
            elif day < night - timedelta(days=2):
                found[
                    ("duplicate", "already refused")
                    if name in self.late
                    else ("quarantined", "event too late")
                ] += 1
                late.add(name)
            elif name in clean:
                found["duplicate", "twice in this landing"] += 1
            else:
                found["clean", None] += 1
                clean.add(name)
        self.ids, self.texts, self.late = self.ids | clean, self.texts | texts, self.late | late
        return found


def test_any_deliveries_night_after_night(spark: SparkSession) -> None:
    """Rows that are fine, broken, late or of days to come, some twice, and any of them again."""
    rng = np.random.default_rng(5)
    universe = [
        an_event(
            event_id=f"e{n % 25}",  # some ids are of two rows
            item_id=None if n % 7 == 0 else f"i{n}",
            event_at=datetime(2024, 5, 24 + int(rng.integers(8)), n % 24),
            row=f"row {n}",
        )
        for n in range(40)
    ]
    known = spark.createDataFrame([], "event_id string")
    refused = spark.createDataFrame([], "row_id string")
    by_hand, seen = ByHand(), set()
    for day in (25, 27, 29, 31):
        night = date(2024, 5, day)
        landing = [universe[n] for n in rng.integers(0, len(universe), 60)]
        settings: dict[str, Any] = {"run_date": night, "max_late_days": 2}
        rows = check(spark, landing, existing=known, refused=refused, **settings).collect()
        found = Counter((row["verdict"], row["reason"]) for row in rows)
        assert found == by_hand.verdicts(landing, night)
        seen |= set(found)
        clean = [(row["event_id"],) for row in rows if row["verdict"] == "clean"]
        bad = [(row["row_id"],) for row in rows if row["verdict"] == "quarantined"]
        known = known.union(spark.createDataFrame(clean, "event_id string"))
        refused = refused.union(spark.createDataFrame(bad, "row_id string"))
        assert {row["event_id"] for row in known.collect()} == by_hand.ids
    assert len(seen) == 7  # every verdict there is
