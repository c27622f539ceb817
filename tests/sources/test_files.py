"""Missing, empty, torn and hidden files."""

from __future__ import annotations

import random
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark.config import Source
from recspark.data.events import check_events, count_verdicts
from recspark.errors import MissingLandingError, SourceError
from recspark.sources import landing_digest, read_landing
from recspark.sources.files import csv_header, find_place
from tests.sources.conftest import NIGHT, write_parquet, write_text

pytestmark = pytest.mark.spark


def shop(path: Path | str, **settings: Any) -> Source:
    defaults: dict[str, Any] = {
        "name": "shop",
        "kind": "mapping",
        "format": "csv",
        "columns": {"user_id": "user", "item_id": "item", "event_at": "at"},
        "constants": {"event_type": "click"},
    }
    return Source(path=str(path), **{**defaults, **settings})


@pytest.mark.parametrize("archive", [True, False])
def test_missing_landing_is_an_error_that_says_what_to_do(
    spark: SparkSession, tmp_path: Path, archive: bool
) -> None:
    source = shop(tmp_path / "{run_date}", archive=archive)
    with pytest.raises(MissingLandingError) as error:
        read_landing(spark, source, NIGHT, initial=False)
    assert f"nothing is at {tmp_path}/2024-05-31" in str(error.value)
    advice = "point source.path" if archive else "make an empty folder there"
    assert advice in str(error.value)
    assert landing_digest(source, NIGHT) is None


def test_empty_landing_of_any_format_has_no_rows(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "file.csv", "")
    write_text(tmp_path / "in/a.csv", "")
    write_text(tmp_path / "header.csv", "user,item,at\n")
    write_text(tmp_path / "hidden/_SUCCESS", "x")
    # What pandas writes for an empty frame: columns of no type.
    write_parquet(tmp_path / "a.parquet", [], pa.schema([("user", pa.null())]))
    sources = [
        shop(tmp_path / name) for name in ("folder", "file.csv", "in", "header.csv", "hidden")
    ]
    sources.append(shop(tmp_path / "a.parquet", format="parquet"))
    sources += [shop(tmp_path / "folder", format=kind) for kind in ("parquet", "jsonl", "delta")]
    landings = [read_landing(spark, source, NIGHT, initial=True) for source in sources]
    events = reduce(DataFrame.union, [landing.events for landing in landings])
    counts = count_verdicts(
        check_events(events, run_date=NIGHT, max_late_days=7, initial=True), events
    )
    counts.check()
    assert counts.n_in == 0


def test_wrong_format_and_torn_files_are_named(spark: SparkSession, tmp_path: Path) -> None:
    text = write_text(tmp_path / "a.parquet", "user,item,at\n")
    with pytest.raises(SourceError, match=r"a\.parquet is not a Parquet file, or not all of it"):
        read_landing(spark, shop(text, format="parquet"), NIGHT, initial=True)
    with pytest.raises(SourceError, match=r"is no Delta table \(it has no _delta_log\)"):
        read_landing(spark, shop(tmp_path, format="delta"), NIGHT, initial=True)
    lines = "user,item,at\n" + "".join(f"u{i},{i * 7919},2024-05-31\n" for i in range(400_000))
    whole = write_text(tmp_path / "b.csv.gz", lines)
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(
        SourceError, match=r"b\.csv\.gz cannot be read: .* was it delivered in full"
    ):
        read_landing(spark, shop(whole), NIGHT, initial=True)


def test_times_in_nanoseconds_are_named(spark: SparkSession, tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": ["u"], "item": ["i"], "at": [pd.Timestamp("2024-05-31 10:00")]})
    frame["at"] = frame["at"].astype("datetime64[ns]")
    frame.to_parquet(tmp_path / "a.parquet", version="2.6", coerce_timestamps=None)
    source = shop(tmp_path / "a.parquet", format="parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: column 'at' counts nanoseconds"):
        read_landing(spark, source, NIGHT, initial=True)
    frame.to_parquet(tmp_path / "a.parquet", coerce_timestamps="us")
    assert read_landing(spark, source, NIGHT, initial=True).events.count() == 1


def test_a_file_without_rows_may_count_nanoseconds(spark: SparkSession, tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": ["u"], "item": ["i"], "at": [pd.Timestamp("2024-05-31 10:00")]})
    (tmp_path / "in").mkdir()
    empty = frame[:0].astype({"at": "datetime64[ns]"})
    empty.to_parquet(tmp_path / "in/a.parquet", version="2.6", coerce_timestamps=None)
    source = shop(tmp_path / "in", format="parquet")
    assert read_landing(spark, source, NIGHT, initial=True).events.isEmpty()
    frame.to_parquet(tmp_path / "in/b.parquet", coerce_timestamps="us")
    assert read_landing(spark, source, NIGHT, initial=True).events.count() == 1


def test_file_torn_behind_its_head_is_named_when_rows_are_read(
    spark: SparkSession, tmp_path: Path
) -> None:
    dice = random.Random(1)
    lines = "user,item,at\n" + "".join(
        f"{dice.random()},{dice.random()},2024-05-31\n" for _ in range(60_000)
    )
    whole = write_text(tmp_path / "b.csv.gz", lines)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) - 1000])
    landing = read_landing(spark, shop(whole), NIGHT, initial=True)
    checked = check_events(landing.events, run_date=NIGHT, max_late_days=7, initial=True)
    with pytest.raises(SourceError, match=r"b\.csv\.gz cannot be read to its end"):
        count_verdicts(checked)


def test_row_with_more_fields_than_the_parser_takes_is_named(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = write_text(tmp_path / "c.csv", "user,item,at\nu,1,2024-05-31\n" + "," * (1 << 20) + "\n")
    landing = read_landing(spark, shop(path), NIGHT, initial=True)
    checked = check_events(landing.events, run_date=NIGHT, max_late_days=7, initial=True)
    with pytest.raises(SourceError, match=r"c\.csv cannot be read to its end"):
        count_verdicts(checked)


def test_digest_knows_every_file_and_no_hidden_one(tmp_path: Path) -> None:
    source = shop(tmp_path)
    write_text(tmp_path / "a.csv", "user,item,at\nu,1,2024-05-31\n")
    one = landing_digest(source, NIGHT)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".a.csv.crc").write_text("x")
    assert landing_digest(source, NIGHT) == one
    write_text(tmp_path / "b.csv", "user,item,at\n")
    two = landing_digest(source, NIGHT)
    write_text(tmp_path / "b.csv", "user,item,at\nu,1,2024-05-31\n")
    assert len({one, two, landing_digest(source, NIGHT)}) == 3


def test_header_is_read_as_spark_reads_it(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.csv.gz", '\ufeff"a,b";c\td\r\n1;2\n')
    assert csv_header(str(path), {"sep": ";"}) == ["a,b", "c\td"]
    assert csv_header(str(path), {"sep": "\\t", "quote": ""}) == ['"a,b";c', "d"]
    assert csv_header(str(write_text(tmp_path / "b.csv", "a::b\n")), {"sep": "::"}) == ["a", "b"]


def test_relative_path_with_dots_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    write_text(tmp_path / "there/x/a.csv", "user\n")
    monkeypatch.chdir(tmp_path / "here")
    place = find_place(shop("../there"), "../there", NIGHT)
    assert place.files == [str(tmp_path / "there/x/a.csv")]
