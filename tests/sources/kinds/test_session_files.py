"""Session files: keys, order and made-up times."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import MadeUpTimes, Source
from recspark.data.event_checks import check_events, count_verdicts
from recspark.errors import SourceError
from recspark.sources import read_landing
from recspark.sources.kinds.session_files import CUT_ANEW
from tests.conftest import spark_conf
from tests.sources.conftest import NIGHT, write_text

pytestmark = pytest.mark.spark

MADE_UP = MadeUpTimes(start=date(2024, 5, 30), session_seconds=43200, event_seconds=2)

MAX_BYTES, OPEN_COST = "spark.sql.files.maxPartitionBytes", "spark.sql.files.openCostInBytes"


def clicks(path: Path, **settings: Any) -> Source:
    return Source(
        name="clicks", kind="session_files", path=str(path), **{"made_up": MADE_UP, **settings}
    )


def test_sessions_keep_their_order_and_say_that_times_are_made_up(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_text(tmp_path / "train.txt.gz", "7 8  7\n\n9 \n")
    write_text(tmp_path / "test.txt", b"5\n6\n" + b"\xff 4\n")
    rows = checked(clicks(tmp_path, files=("train.txt.gz", "test.txt")), date(2024, 6, 30))
    found = sorted(
        (r["event_at"], r["event_id"], r["session_key"], r["item_id"], r["reason"]) for r in rows
    )
    assert found == [
        (datetime(2024, 5, 30, 0, 0, 0), "train.txt.gz:1:0", "train.txt.gz:1", "7", None),
        (datetime(2024, 5, 30, 0, 0, 2), "train.txt.gz:1:1", "train.txt.gz:1", "8", None),
        (datetime(2024, 5, 30, 0, 0, 4), "train.txt.gz:1:2", "train.txt.gz:1", "7", None),
        (datetime(2024, 5, 30, 12), "train.txt.gz:2:0", "train.txt.gz:2", None, "empty session"),
        (datetime(2024, 5, 31, 0), "train.txt.gz:3:0", "train.txt.gz:3", "9", None),
        (datetime(2024, 5, 31, 12), "test.txt:1:0", "test.txt:1", "5", None),
        (datetime(2024, 6, 1, 0), "test.txt:2:0", "test.txt:2", "6", None),
        (datetime(2024, 6, 1, 12), "test.txt:3:0", "test.txt:3", "\ufffd", "bad encoding: item"),
        (datetime(2024, 6, 1, 12, 0, 2), "test.txt:3:1", "test.txt:3", "4", None),
    ]
    assert {(row["event_type"], row["user_id"], row["attributes"]["time"]) for row in rows} == {
        ("click", None, "made up")
    }
    # An archive gives everything up to the night, every night: ingest knows what came before.
    day_before = NIGHT - timedelta(days=1)
    first, second = (
        {row["event_id"] for row in checked(clicks(tmp_path, files=("train.txt.gz",)), *night)}
        for night in ((day_before,), (NIGHT,))
    )
    assert second - first == {"train.txt.gz:3:0"}
    assert first < second


def test_line_numbers_are_right_in_a_file_that_spark_splits(
    spark: SparkSession, tmp_path: Path
) -> None:
    write_text(tmp_path / "a.txt", "".join(f"{i} {i}\n" for i in range(1, 20_001)))
    source = clicks(tmp_path, made_up=MadeUpTimes(start=date(2024, 5, 30), session_seconds=1))
    with spark_conf(spark, {MAX_BYTES: "20000", OPEN_COST: "0"}):
        events = read_landing(spark, source, NIGHT, initial=True).events
        assert events.rdd.getNumPartitions() > 3
        wrong = events.where(
            (F.concat(F.lit("a.txt:"), "item_id") != F.col("session_key"))
            | (F.unix_seconds("event_at") - 1717027200 + 1 < F.col("item_id").cast("int"))
        )
        assert (events.count(), wrong.count()) == (40_000, 0)
        assert events.select("session_key").distinct().count() == 20_000


@pytest.mark.parametrize(
    ("counted", "later"), [("20000", "10000"), ("20000", "90000"), ("900000", "20000")]
)
def test_a_file_that_spark_cuts_anew_is_not_numbered_wrongly(
    spark: SparkSession, tmp_path: Path, counted: str, later: str
) -> None:
    write_text(tmp_path / "a.txt", "".join(f"{i} {i}\n" for i in range(1, 20_001)))
    # The split size is at most a core's share of the file, unless opening one costs more.
    with spark_conf(spark, {MAX_BYTES: counted, OPEN_COST: counted}):
        events = read_landing(spark, clicks(tmp_path), NIGHT, initial=True).events
    checked = check_events(events, run_date=NIGHT, max_late_days=7, initial=True)
    with spark_conf(spark, {MAX_BYTES: later, OPEN_COST: "0"}), pytest.raises(SourceError) as error:
        count_verdicts(checked, events)
    assert f"a.txt {CUT_ANEW}" in str(error.value)


def test_a_nights_landing_starts_at_its_midnight(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_text(tmp_path / "2024-05-31/a.txt", "1 2\n3\n")
    rows = checked(clicks(tmp_path / "{run_date}", archive=False, made_up=MadeUpTimes()))
    found = {row["item_id"]: row["event_at"] for row in rows if row["verdict"] == "clean"}
    assert found == {
        "1": datetime(2024, 5, 31),
        "2": datetime(2024, 5, 31, 0, 0, 1),
        "3": datetime(2024, 5, 31, 0, 0, 0, 10000),
    }


def test_ids_of_two_nights_and_of_two_folders_differ(spark: SparkSession, tmp_path: Path) -> None:
    nights = [date(2024, 5, 30), date(2024, 5, 31)]
    for night in nights:
        for hour in ("hour=00", "hour=01"):
            write_text(tmp_path / f"{night}/{hour}/part-0[1]", f"1 2 {night.day}\n3\n")
    source = clicks(tmp_path / "{run_date}", archive=False, made_up=MadeUpTimes())
    both = reduce(
        DataFrame.union,
        [read_landing(spark, source, night, initial=False).events for night in nights],
    )
    rows = both.select("event_id", "session_key", "item_id").collect()
    assert len(rows) == len({row["event_id"] for row in rows}) == 16
    assert {row["session_key"] for row in rows} == {
        f"{night}/{hour}/part-0[1]:{line}"
        for night in nights
        for hour in ("hour=00", "hour=01")
        for line in (1, 2)
    }
    archive = clicks(tmp_path, made_up=MadeUpTimes(start=nights[0], session_seconds=1))
    keys = read_landing(spark, archive, nights[1], initial=True).events.select("session_key")
    assert {row[0] for row in keys.collect()} == {row["session_key"] for row in rows}
    again = read_landing(spark, source, nights[0], initial=True).events.select("event_id")
    assert {row[0] for row in again.collect()} < {row["event_id"] for row in rows}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.xz", b"1 2\n", r"a\.txt\.xz is compressed or packed as '\.xz'"),
        ("a.txt", b"\x1f\x8b\x08\x00", r"a\.txt is no text: it holds gzip"),
        ("a.txt.gz", b"1 2\n", r"a\.txt\.gz is not what its name says"),
        ("1:2.txt", b"1 2\n", r"1:2\.txt: Spark cannot read a file of a local disk"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    spark: SparkSession, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_landing(spark, clicks(tmp_path), NIGHT, initial=True)


def test_options_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "1\n")
    with pytest.raises(SourceError, match=r"source\.options \['encoding'\]: kind 'session_files'"):
        read_landing(spark, clicks(tmp_path, options={"encoding": "x"}), NIGHT, initial=True)


def test_a_named_file_must_be_there(spark: SparkSession, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "1\n")
    with pytest.raises(SourceError, match=r"source\.files names \['b\.txt'\], which are not in"):
        read_landing(spark, clicks(tmp_path, files=("a.txt", "b.txt")), NIGHT, initial=True)


@pytest.mark.usefixtures("generated_code")
def test_diginetica(spark: SparkSession, shared: Path) -> None:
    source = clicks(
        shared / "diginetica",
        files=("train_sessions.txt.gz", "test_sessions.txt.gz"),
        made_up=MadeUpTimes(start=date(2016, 1, 1), session_seconds=64),
    )
    events = read_landing(spark, source, date(2016, 6, 30), initial=True).events
    is_train = F.col("session_key").startswith("train")
    row = events.agg(
        F.count_if(is_train).alias("train"),
        F.count_if(~is_train).alias("test"),
        F.countDistinct("session_key").alias("sessions"),
        F.countDistinct("item_id").alias("items"),
        F.count("reason").alias("refused"),
    ).collect()[0]
    assert row.asDict() == {
        "train": 906_140,
        "test": 76_821,
        "sessions": 186_670 + 15_963,
        "items": 43_097,
        "refused": 0,
    }
