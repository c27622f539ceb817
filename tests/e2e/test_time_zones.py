"""Tables are the same wherever the driver stands, on the days too on which its clock goes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, night, open_night
from recspark.report.answers import bought
from recspark.session import together
from recspark.tables.catalog import TableCatalog
from recspark.tables.spark_reader import reader_of
from tests.conftest import ROOT, without_commits
from tests.e2e.test_odd_nights import settings_of

pytestmark = pytest.mark.spark
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata")
# Berlin's clock goes back on 27 October 2024 at 01:00 UTC, New York's on 3 November at 06:00.
NIGHTS = (date(2024, 10, 27), date(2024, 11, 3), date(2024, 11, 4))
MEASURED = {"runs": ("seconds", "peak_memory_mb", "started_at", "ended_at", "config")}


def shop(folder: Path) -> None:
    """Twenty users; each day one event an hour and a half apart, over the hours that come twice."""
    made = [
        (
            f"u{user}",
            f"i{(user * 7 + n) % 11}",
            datetime(day.year, day.month, day.day, hour, minute),
        )
        for user in range(20)
        for day in (NIGHTS[0] - timedelta(days=1), *NIGHTS)
        for n, (hour, minute) in enumerate([(0, 10 + user), (0, 40), (1, 10), (5, 20), (6, user)])
    ]
    columns = ["user", "item", "at"]
    pd.DataFrame(made, columns=columns).to_parquet(folder / "shop.parquet", coerce_timestamps="us")


def tables(spark: SparkSession, folder: Path) -> dict[str, list[str]]:
    """All rows of all tables as JSON that Spark writes, but for times and memory of the stages."""
    catalog = TableCatalog(spark, str(folder / "root" / "tables"))
    out = {}
    for table, version in catalog.versions().items():
        rows = catalog.read(table, version).drop(*MEASURED.get(table, ()))
        texts = rows.select(F.to_json(F.struct("*"))).collect()
        out[table] = sorted(without_commits(r[0].replace(str(folder), "")) for r in texts)
    return out


@contextmanager
def driver_in(zone: str, spark: SparkSession) -> Iterator[None]:
    """Both halves of the driver, Python and the JVM, stand in `zone`."""
    java: Any = spark._jvm.java.util.TimeZone
    python, jvm = os.environ.get("TZ"), java.getDefault()
    try:
        os.environ["TZ"] = zone
        time.tzset()
        java.setDefault(java.getTimeZone(zone))
        yield
    finally:
        os.environ.pop("TZ") if python is None else os.environ.update(TZ=python)
        time.tzset()
        java.setDefault(jvm)


def test_a_cutoff_is_one_instant_in_every_thread(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    """Tables are written side by side; a thread of the JVM has settings of its own at first."""
    cutoff = datetime(2024, 11, 3, tzinfo=UTC)
    rows = spark.createDataFrame([{"cutoff": cutoff, "item_idx": 2}], schema.ITEM_FEATURES)
    with driver_in("America/New_York", spark):
        written = together(
            spark,
            *[
                partial(catalog.replace_slice, "item_features", rows, {"cutoff": cutoff})
                for _ in range(3)
            ],
        )
        assert {w.rows for w in written} == {1}
        found = catalog.read("item_features", catalog.version("item_features"))
        assert found.select(F.unix_seconds("cutoff")).collect()[0][0] == cutoff.timestamp()


@pytest.mark.parametrize(
    ("zone", "day", "hour"), [("Europe/Berlin", NIGHTS[0], 0), ("America/New_York", NIGHTS[1], 5)]
)
def test_no_event_is_lost_where_the_first_lies_in_an_hour_that_comes_twice(
    spark: SparkSession, tmp_path: Path, zone: str, day: date, hour: int
) -> None:
    """The first event of the first night is the anchor from which sessions are made."""
    shop(tmp_path)
    place = tmp_path / "shop.parquet"
    since = datetime(day.year, day.month, day.day, hour, 20)
    rows = pd.read_parquet(place)
    rows[(rows["at"] >= since) & (rows["at"].dt.date == day)].to_parquet(
        place, coerce_timestamps="us"
    )
    with driver_in(zone, spark):
        context = open_night("test", day, settings_of(tmp_path))
        for stage in STAGES[:3]:
            execute(context, stage)
        shown = bought(reader_of(context.catalog), "u19", day, 50, context.config.sessions)
    kept = pd.read_parquet(place)
    made = context.catalog.read("sessions", context.catalog.version("sessions"))
    histories = context.catalog.read("histories", context.catalog.version("histories"))
    counts = (
        made.agg(F.sum("n_events")).collect()[0][0],
        histories.agg(F.sum(F.size("history"))).collect()[0][0],
        context.catalog.count("events", context.catalog.version("events")),
    )
    assert counts == (len(kept),) * 3
    mine = kept[kept["user"] == "u19"].sort_values("at", ascending=False)
    assert [row["event_at"].removesuffix("+00:00") for row in shown] == [str(t) for t in mine["at"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_nights_leave_the_same_tables_under_any_zone(
    spark: SparkSession, tmp_path: Path
) -> None:
    """A driver of its own for each zone, its JVM too."""
    found = {}
    for zone in ZONES:
        folder = tmp_path / zone.replace("/", "_")
        folder.mkdir()
        shop(folder)
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.test_time_zones", str(folder)],
            env={**os.environ, "TZ": zone},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[zone] = json.loads((folder / "tables.json").read_text())
    assert {"recommendations", "metrics", "candidates", "gates"} <= set(found["UTC"])
    for zone, of_zone in found.items():
        for table in found["UTC"]:
            assert of_zone[table] == found["UTC"][table], (zone, table)


def main(folder: Path) -> None:
    """Run the three nights in this process, and write what they left."""
    for day in NIGHTS:
        context = open_night("test", day, settings_of(folder))
        night(context)
    (folder / "tables.json").write_text(json.dumps(tables(context.spark, folder)))
    context.spark.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
