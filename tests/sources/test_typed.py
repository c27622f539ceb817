"""Raw columns to what they mean: every spelling, every type, and any split over files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import Column, SparkSession
from pyspark.sql.types import StringType

from recspark.config import Source
from recspark.sources import read_landing
from recspark.sources.spelling import BLANKS, Spelling
from recspark.sources.values import identity, moment, number
from tests.sources.conftest import NIGHT, rows_of, write_parquet, write_text

pytestmark = pytest.mark.spark


def of_texts(
    spark: SparkSession, texts: Sequence[str | None], read: Callable[[Column], Sequence[Column]]
) -> dict[str | None, Any]:
    """What `read` makes of each text: its first column, or all as a tuple. One Spark job."""
    from pyspark.sql import functions as F

    frame = spark.createDataFrame([(text,) for text in texts], "text string")
    columns = [column.alias(f"c{i}") for i, column in enumerate(read(F.col("text")))]
    rows = frame.select("text", *columns).collect()
    return {row[0]: row[1] if len(columns) == 1 else tuple(row[1:]) for row in rows}


def instants(
    spark: SparkSession, texts: Sequence[str], zone: str, **spelling: Any
) -> dict[str | None, datetime | None]:
    def read(text: Column) -> Sequence[Column]:
        found = moment(text, StringType(), "at", zone, Spelling(**spelling))
        assert found is not None
        return found[:1]

    return of_texts(spark, texts, read)


def utc(local: datetime, zone: str) -> datetime:
    """The instant of a wall-clock time, as Python knows it: an independent reading."""
    return local.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC).replace(tzinfo=None)


CLOCKS = {
    "2024-05-30": datetime(2024, 5, 30),
    "2024-05-30T10": datetime(2024, 5, 30, 10),
    "2024-05-30T10:07": datetime(2024, 5, 30, 10, 7),
    "2024-05-30 10:07": datetime(2024, 5, 30, 10, 7),
    "2024-05-30T10:07:09": datetime(2024, 5, 30, 10, 7, 9),
    "2024-05-30  10:07:09": datetime(2024, 5, 30, 10, 7, 9),
    "2024-05-30T10:07:09.5": datetime(2024, 5, 30, 10, 7, 9, 500_000),
    "2024-05-30t10:07:09,123": datetime(2024, 5, 30, 10, 7, 9, 123_000),
    "2024-05-30 10:07:09.123456": datetime(2024, 5, 30, 10, 7, 9, 123_456),
    "2024-05-30T10:07:09.123456789": datetime(2024, 5, 30, 10, 7, 9, 123_456),
    "2024-5-3 9:07": datetime(2024, 5, 3, 9, 7),
}
HOURS = {
    "Z": 0,
    "z": 0,
    "UTC": 0,
    "GMT": 0,
    "+02": 2,
    "-2": -2,
    "+0230": 2.5,
    "+02:30": 2.5,
    "-05:00": -5,
}
HOURS |= {"+02:00:00": 2, "UTC+2": 2, "GMT+0200": 2}
ZONES = ("Europe/Berlin", "America/Argentina/Buenos_Aires", "Asia/Kolkata", "Etc/GMT+3")


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
def test_every_time_of_the_grammar(spark: SparkSession, zone: str) -> None:
    wanted: dict[str, datetime] = {}
    for text, clock in CLOCKS.items():
        wanted[text] = utc(clock, zone)
        for blank, (suffix, hours) in itertools.product(("", " "), HOURS.items()):
            wanted[text + blank + suffix] = clock - timedelta(hours=hours)
        for name in ZONES:
            wanted[f"{text}[{name}]"] = wanted[f"{text} {name}"] = utc(clock, name)
            wanted[f"{text} [{name}]"] = utc(clock, name)
        wanted[f"{text}+02:00[Europe/Berlin]"] = clock - timedelta(hours=2)
        wanted[f"{text}Z[UTC]"] = clock
    assert len(wanted) > 400
    assert instants(spark, list(wanted), zone) == wanted


NO_TIMES = [
    "2024-05-30 10:00:00 CET", "2024-05-30 10:00:00 BST", "2024-05-30 10:00:00 Europe/Nowhere",
    "2024-05-30 10:00:00 Berlin", "2024-05-30 10:00Europe/Berlin", "2024-05-30T10:00+200",
    "2024-05-30T10:00+19:00", "2024-05-30T10:00+02:60", "2024-05-30T10:00 +", "2024-05-30T10:00ZZ",
    "2024-05-30T24:00:00", "2024-05-30T10:60", "2024-02-30", "2024-13-01", "2024-05-30T10:00:00x",
 "T10:00", "10:00", "now", "today", "30.05.2024", "2024-05",
    "05/30/2024", "2024-W22-4", "2024-151", "1e400", "12:30:00 2024-05-30", "+2024-05-30", "1d", "NaN",
]  # fmt: skip


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_what_is_no_time_is_none(spark: SparkSession, zone: str) -> None:
    assert instants(spark, NO_TIMES, zone) == dict.fromkeys(NO_TIMES)


def test_hours_that_a_zone_leaves_out_or_has_twice(spark: SparkSession) -> None:
    wanted = {
        "2024-03-31 02:30": datetime(2024, 3, 31, 1, 30),  # left out: read as 03:30
        "2024-10-27 02:30": datetime(2024, 10, 27, 0, 30),  # twice: the first
        "2024-10-27 02:30+01:00": datetime(2024, 10, 27, 1, 30),  # the second says so
    }
    assert instants(spark, list(wanted), "Europe/Berlin") == wanted
    named = {f"{text}[Europe/Berlin]": at for text, at in wanted.items()}
    assert instants(spark, list(named), "Asia/Tokyo") == named


NUMBERS_AS_TIMES = {
    "20240530": datetime(2024, 5, 29, 22),
    "202405301015": datetime(2024, 5, 30, 8, 15),
    "20240530101559": datetime(2024, 5, 30, 8, 15, 59),
    "1717149600": datetime(2024, 5, 31, 10),
    "1717149600.25": datetime(2024, 5, 31, 10, 0, 0, 250_000),
    "1717149600000": datetime(2024, 5, 31, 10),
    "1717149600000000": datetime(2024, 5, 31, 10),
    "978300760": datetime(2000, 12, 31, 22, 12, 40),  # MovieLens
    "978300760000": datetime(2000, 12, 31, 22, 12, 40),
    "631152000": datetime(1990, 1, 1),
    "631151999": None,
    "19891231": datetime(1989, 12, 30, 23),  # a date is a date
    "202405": None,
    "2024": None,
    "0": None,
    "-1717149600": None,
    "20240230": None,
    "202413301015": None,
    "20240530101560": None,
}


def test_numbers_as_times_of_every_type(spark: SparkSession, tmp_path: Path) -> None:
    assert instants(spark, list(NUMBERS_AS_TIMES), "Europe/Berlin") == NUMBERS_AS_TIMES
    whole = [text for text in NUMBERS_AS_TIMES if "." not in text]
    table = pa.table(
        {
            "text": whole,
            "integer": pa.array(map(int, whole), pa.int64()),
            "float": pa.array(map(float, whole), pa.float64()),
            "decimal": pa.array(map(Decimal, whole), pa.decimal128(20, 2)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for name in table.column_names:
        source = shop(
            tmp_path / "a.parquet", columns={**COLUMNS, "event_at": name, "item_id": "text"}
        )
        rows = rows_of(read_landing(spark, source, NIGHT, initial=True).events)
        assert {row["item_id"]: row["event_at"] for row in rows} == {
            text: NUMBERS_AS_TIMES[text] for text in whole
        }, name
        reasons = {row["item_id"]: row["reason"] for row in rows if row["reason"]}
        small = f"wrong type: {name} (a number that would lie before 1990-01-01)"
        assert reasons.pop("20240230") == reasons.pop("202413301015") == f"wrong type: {name}"
        assert reasons.pop("20240530101560") == f"wrong type: {name}"
        assert reasons == dict.fromkeys(("631151999", "202405", "2024", "0", "-1717149600"), small)


def test_the_earliest_number_is_a_setting(spark: SparkSession) -> None:
    found = instants(spark, ["2024", "86400"], "UTC", earliest=date(1970, 1, 2))
    assert found == {"2024": None, "86400": datetime(1970, 1, 2)}


COLUMNS = {"user_id": "text", "item_id": "text", "event_at": "text"}


def shop(path: Path | str, **settings_: Any) -> Source:
    defaults: dict[str, Any] = {
        "name": "shop",
        "kind": "mapping",
        "format": "parquet",
        "columns": COLUMNS,
        "constants": {"event_type": "buy"},
        "timezone": "Europe/Berlin",
    }
    return Source(path=str(path), **{**defaults, **settings_})


PLAIN = {"12": 12.0, "-1.5": -1.5, "+.5": 0.5, "7.": 7.0, "1.25E7": 12_500_000.0}
PLAIN |= dict.fromkeys(
    ("", "12,99", "€12.99", "1,234.50", "1d", "5f", "0x1F", "1_0", "a dozen", "1 2")
)
GERMAN = {"12,99": 12.99, "1.234,50": 1234.5, "1.234.567": 1234567.0, "1234,5": 1234.5, "-3": -3.0}
GERMAN |= {
    "€ 12,99": 12.99,
    "12,99 €": 12.99,
    "-€12,99": -12.99,
    "€-12,99": -12.99,
    "12,99EUR": 12.99,
}
GERMAN |= {"12,99\u00a0€": 12.99}
GERMAN |= dict.fromkeys(("12.99", "1.23,5", "12,99$", "€", "1.2345", "12,9,9", "EUR 1 EUR €"))
SWISS = {"1'234.50": 1234.5, "Fr. 5": 5.0, "12,99": None}
FRENCH = {"1 234,50": 1234.5, "1\u202f234,50": 1234.5, "1\u00a0234": 1234.0, "1.5": None}


@pytest.mark.parametrize(
    ("spelling", "wanted"),
    [
        (Spelling(), PLAIN),
        (Spelling(decimal=",", thousands=".", currency=("€", "EUR")), GERMAN),
        (Spelling(thousands="'", currency=("Fr.",)), SWISS),
        (Spelling(decimal=",", thousands=" "), FRENCH),
    ],
)
def test_numbers_as_they_are_spelt(
    spark: SparkSession, spelling: Spelling, wanted: dict[str, float | None]
) -> None:
    def read(text: Column) -> Sequence[Column]:
        found = number(text, StringType(), "price", spelling)
        assert found is not None
        return found

    found = of_texts(spark, list(wanted), read)
    assert {text: value for text, (value, _) in found.items()} == wanted
    assert {text for text, (_, given_) in found.items() if not given_} == {"", *()} & set(wanted)


def test_ids_as_they_are_spelt(spark: SparkSession) -> None:
    wanted = {
        "U1": "U1",
        **{f"{blank}U1{blank}": "U1" for blank in BLANKS},
        "U1        ": "U1",  # CHAR(10)
        "u1": "u1",
        "U 1": "U 1",
        "00123": "00123",
        "13085.0": "13085.0",
        "Cafe\u0301": "Cafe\u0301",  # no normalisation
        **dict.fromkeys(
            ("", " \t\u3000", "NULL", "null", "\\N", "nan", "NaN", "None", "undefined")
        ),
        **dict.fromkeys(("<NA>", "(null)", " NULL ", "GUEST", "0")),
        "guest": "guest",
        "nanna": "nanna",
    }
    spelling = Spelling(null_values={"user": ("GUEST", "0")})

    def read(text: Column) -> Sequence[Column]:
        plain = identity(text, StringType(), "user", spelling)
        whole = identity(text, StringType(), "user", Spelling(whole_numbers=frozenset({"user"})))
        assert plain is not None
        assert whole is not None
        return plain, whole

    found = of_texts(spark, [*wanted, "1.2345678E7", "13085.50", "007.0"], read)
    assert {text: found[text][0] for text in wanted} == wanted
    as_whole = {text: found[text][1] for text in ("13085.0", "1.2345678E7", "13085.50", "007.0")}
    assert as_whole == {
        "13085.0": "13085",
        "1.2345678E7": "12345678",
        "13085.50": "13085.50",
        "007.0": "007",
    }
    assert found["00123"][1] == "00123"


def test_an_id_is_one_in_files_of_different_types(spark: SparkSession, tmp_path: Path) -> None:
    at = [1717149600] * 3
    pq.write_table(
        pa.table({"user": pa.array([13085, 12345678, 9]), "at": at}), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.table({"user": pa.array([13085.0, None, 12345678.0]), "at": at}), tmp_path / "b.parquet"
    )
    columns = {"user_id": "user", "item_id": "at", "event_at": "at"}
    landing = read_landing(spark, shop(tmp_path, columns=columns), NIGHT, initial=True)
    rows = rows_of(landing.events)
    assert sorted(str(row["user_id"]) for row in rows) == sorted(
        ["13085", "12345678", "9", "13085", "None", "12345678"]
    )
    # The same row twice, once in either type: numbered as identical ones.
    ids = sorted(row["event_id"] for row in rows if row["user_id"] == "13085")
    assert ids[0][:-1] == ids[1][:-1]
    assert [event_id[-2:] for event_id in ids] == ["-1", "-2"]


# --- any split over files, types and formats -----------------------------------------------------

WHOLE = st.integers(min_value=0, max_value=2**31)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.one_of(st.none(), WHOLE),
            "item": st.sampled_from([1, 7, 13085, 12345678]),
            "at": st.one_of(
                st.none(), st.integers(1_600_000_000, 1_717_000_000), st.just(20240530)
            ),
            "amount": st.one_of(st.none(), st.integers(-400, 4000).map(lambda n: n / 4)),
            "n": st.one_of(st.none(), st.integers(1, 9)),
        }
    ),
    min_size=1,
    max_size=8,
)
NUMERIC_TYPES: dict[str, list[pa.DataType]] = {
    "user": [pa.int64(), pa.float64(), pa.decimal128(20, 4), pa.string(), pa.uint32()],
    "item": [pa.int32(), pa.float32(), pa.float64(), pa.decimal128(12, 0), pa.string()],
    "at": [pa.int64(), pa.float64(), pa.decimal128(20, 0), pa.string()],
    "amount": [pa.float64(), pa.float32(), pa.decimal128(18, 2), pa.string()],
    "n": [pa.int8(), pa.float64(), pa.string()],
}


def typed_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return pa.array([None if v is None else str(v) for v in values], kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if v is None else Decimal(str(v)) for v in values], kind)
    return pa.array(values, pa.float64() if kind == pa.float32() else kind).cast(kind)


def write_part(path: Path, rows: list[dict[str, Any]], kinds: dict[str, pa.DataType]) -> None:
    columns = {
        name: typed_column([row[name] for row in rows], kind) for name, kind in kinds.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_lines(path: Path, rows: list[dict[str, Any]], kind: str) -> None:
    if kind == "jsonl":
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return
    values = [[row[name] for name in NUMERIC_TYPES] for row in rows]
    lines = [",".join("" if v is None else str(v) for v in row) for row in values]
    write_text(path, "\n".join([",".join(NUMERIC_TYPES), *lines, ""]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    base, numbers = tmp_path_factory.mktemp("splits"), itertools.count()
    return lambda: base / str(next(numbers))


@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), rows=ROWS)
def test_any_split_gives_the_same_events(
    spark: SparkSession,
    folders: Callable[[], Path],
    data: st.DataObject,
    rows: list[dict[str, Any]],
) -> None:
    columns = {
        "user_id": "user", "item_id": "item", "event_at": "at", "value": "amount", "quantity": "n",
    }  # fmt: skip
    whole = {name: kinds[0] for name, kinds in NUMERIC_TYPES.items()}
    folder = folders()
    write_part(folder / "whole/a.parquet", rows, whole)
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=2)))
    for i, (start, end) in enumerate(itertools.pairwise([0, *cuts, len(rows)])):
        part = [rows[j] for j in order[start:end]]
        kinds = {name: data.draw(st.sampled_from(k)) for name, k in NUMERIC_TYPES.items()}
        write_part(folder / f"split/{i}.parquet", part, kinds)
    for kind in ("csv", "jsonl"):
        write_lines(folder / f"a.{kind}", [rows[j] for j in order], kind)
    frames = [
        read_landing(spark, shop(path, columns=columns, format=kind), NIGHT, initial=True).events
        for path, kind in [
            (folder / "whole", "parquet"),
            (folder / "split", "parquet"),
            (folder / "a.csv", "csv"),
            (folder / "a.jsonl", "jsonl"),
        ]
    ]
    from functools import reduce

    from pyspark.sql import DataFrame
    from pyspark.sql import functions as F

    tagged = [frame.drop("row").withColumn("way", F.lit(i)) for i, frame in enumerate(frames)]
    found = reduce(DataFrame.union, tagged).collect()
    ways = [sorted(str(row[:-1]) for row in found if row["way"] == i) for i in range(len(frames))]
    assert len(ways[0]) == len(rows)
    assert ways[1] == ways[0]
    assert ways[2] == ways[0]
    assert ways[3] == ways[0]


def test_a_refused_row_does_not_number_a_clean_one(spark: SparkSession, tmp_path: Path) -> None:
    """Rows of equal content, of which one has an unreadable value, whatever their order."""
    record = {"user": "u", "item": "A", "at": "2024-05-31", "amount": None}
    columns = {"user_id": "user", "item_id": "item", "event_at": "at", "value": "amount"}
    found = []
    for i, amounts in enumerate(itertools.permutations([None, "x", None, "y"], 4)):
        if i % 6:
            continue
        rows = [{**record, "amount": amount} for amount in amounts]
        path = write_parquet(tmp_path / f"{i}.parquet", rows)
        events = read_landing(spark, shop(path, columns=columns), NIGHT, initial=True).events
        found.append(sorted(r["event_id"] for r in events.collect() if r["reason"] is None))
    assert all(ids == found[0] for ids in found)
    assert [event_id[-2:] for event_id in found[0]] == ["-1", "-2"]
