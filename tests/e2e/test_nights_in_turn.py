"""Night after night: incremental equals rebuilt, row for row; an older night run again loses
nothing."""

from __future__ import annotations

import shutil
from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import functions as F

from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, night, open_night
from tests.conftest import small_settings
from tests.e2e.test_small_night import content

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1800)]
DERIVED = ("sessions", "histories", "user_features", "item_features")


def settings_of(root: Path, source: Path, *more: str) -> list[str]:
    # Days of a tenth of the customers: on one of them hardly a row names its customer.
    return [*small_settings(root, source), "ingest.min_clean_fraction=0.05", *more]


def prepare(root: Path, source: Path, day: date, *more: str, **options: bool) -> RunContext:
    """Run the stages up to the features of one night."""
    context = open_night("test", day, settings_of(root, source, *more), **options)
    for stage in STAGES[:3]:
        execute(context, stage)
    return context


def of_night(context: RunContext, table: str) -> list[str]:
    rows = context.catalog.read(table, context.catalog.version(table))
    if "cutoff" in rows.columns:
        rows = rows.where(F.col("cutoff") == F.lit(context.cutoffs.tonight))
    return sorted(str(r) for r in rows.collect())


def rebuilt(context: RunContext, root: Path, source: Path, day: date, *more: str) -> RunContext:
    """The same night on a copy of events, dictionaries and catalogue, everything else made
    again."""
    shutil.copytree(Path(context.catalog.root).parent, root)
    for table in DERIVED:
        shutil.rmtree(root / "tables" / table)
    again = open_night("test", day, settings_of(root, source, *more), force=True)
    for stage in STAGES[1:3]:
        execute(again, stage)
    return again


def test_nights_in_turn_equal_a_rebuild(spark: object, retail_slice: Path, tmp_path: Path) -> None:
    days = [date(2010, 12, 1) + timedelta(days=n) for n in range(9)]
    for day in days:
        context = prepare(tmp_path / "turn", retail_slice, day)
    again = rebuilt(context, tmp_path / "again", retail_slice, days[-1])
    for table in DERIVED:
        assert of_night(context, table) == of_night(again, table), table
    files = {
        t: context.catalog.size(t)["files"] for t in ("events", "histories", "user_ids", "items")
    }
    assert files["events"] <= len(days)
    assert files["histories"] <= context.config.features.history_buckets
    assert files["user_ids"] <= len(days)


def test_late_events_and_an_older_night_run_again(
    spark: object, retail_slice: Path, tmp_path: Path
) -> None:
    """Landings of their own: day 2 brings two late lines of day 1; then day 1 is corrected."""
    rows = pd.read_parquet(retail_slice)
    rows = rows[rows["InvoiceDate"] >= "2010-12-01"]
    day = pd.to_datetime(rows["InvoiceDate"]).dt.date
    days = [date(2010, 12, d) for d in (5, 6, 7)]
    first = rows[day <= days[0]]
    second, third = rows[day == days[1]], rows[day == days[2]]
    customers = second["Customer ID"].notna() & (second["Quantity"] > 0)
    late = second[customers].iloc[:2]
    landings = {
        days[0]: first,
        days[1]: second.drop(late.index),
        days[2]: pd.concat([third, late]),
    }
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for when, landed in landings.items():
        landed.to_parquet(inbox / f"{when}.parquet")
    source = inbox / "{run_date}.parquet"
    settings = ("source.archive=false", "evaluate.horizon_days=1", "ingest.max_late_days=7")
    for when in days:
        context = prepare(tmp_path / "turn", source, when, *settings)
    events = content(context, "events", drop=("ingest_date",))
    assert len(events) == len(set(events))

    # Day 1 runs again, plain and forced: nothing that came later is lost.
    before = {t: content(context, t) for t in ("events", "sessions", "histories")}
    prepare(tmp_path / "turn", source, days[0], *settings)
    prepare(tmp_path / "turn", source, days[0], *settings, force=True)
    assert {t: content(context, t) for t in before} == before

    # Day 1's landing is corrected: one line less. The new run takes it in, and only that.
    gone = first[first["Customer ID"].notna() & (first["Quantity"] > 0)].index[0]
    first.drop(gone).to_parquet(inbox / f"{days[0]}.parquet")
    prepare(tmp_path / "turn", source, days[0], *settings, repin=True)
    after = content(context, "events")
    assert len(after) == len(before["events"]) - 1
    latest = prepare(tmp_path / "turn", source, days[2], *settings, repin=True)

    # All at once gives the same sessions and histories.
    whole = rebuilt(latest, tmp_path / "again", source, days[2], *settings)
    for table in ("sessions", "histories"):
        assert content(latest, table) == content(whole, table), table


def test_an_empty_landing_is_a_night_too(spark: object, retail_slice: Path, tmp_path: Path) -> None:
    rows = pd.read_parquet(retail_slice)
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    rows[rows["InvoiceDate"] < "2010-12-06"].to_parquet(inbox / "2010-12-05.parquet")
    rows.iloc[:0].to_parquet(inbox / "2010-12-06.parquet")
    source = inbox / "{run_date}.parquet"
    context = None
    for day in (date(2010, 12, 5), date(2010, 12, 6)):
        context = open_night(
            "test", day, settings_of(tmp_path / "t", source, "source.archive=false")
        )
        night(context)
    assert context is not None
    lists = context.catalog.read("recommendations", context.catalog.version("recommendations"))
    per_night = {
        str(r["run_date"]): r["count"] for r in lists.groupBy("run_date").count().collect()
    }
    assert per_night.keys() == {"2010-12-05", "2010-12-06"}
    assert per_night["2010-12-06"] == per_night["2010-12-05"]
