"""Online Retail: the bundled year exactly, and every kind of dirt planted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Source
from recspark.data.event_checks import check_events, clean_of, count_verdicts
from recspark.errors import SourceError
from recspark.sources import read_landing
from tests.sources.conftest import NIGHT, ROOT, rows_of, write_parquet, write_text

pytestmark = pytest.mark.spark

BUNDLED = ROOT / "data/online_retail_ii/online_retail_2009_2010.parquet"
LAST = date(2010, 12, 9)
RAW = pa.schema(
    [
        ("Invoice", pa.string()),
        ("StockCode", pa.string()),
        ("Description", pa.string()),
        ("Quantity", pa.int64()),
        ("InvoiceDate", pa.string()),
        ("Price", pa.float64()),
        ("Customer ID", pa.float64()),
        ("Country", pa.string()),
    ]
)


def a_line(**changes: Any) -> dict[str, Any]:
    line = {
        "Invoice": "489434",
        "StockCode": "79323P",
        "Description": " PINK CHERRY LIGHTS ",
        "Quantity": 12,
        "InvoiceDate": "2024-05-31 07:45:00",
        "Price": 6.75,
        "Customer ID": 13085.0,
        "Country": "United Kingdom",
    }
    return {**line, **{name.replace("_", " "): value for name, value in changes.items()}}


def shop(path: Path | str, **settings: Any) -> Source:
    return Source(name="shop", kind="online_retail", path=str(path), **settings)


def bundled() -> Source:
    return shop(BUNDLED)


def content_sum(frame: DataFrame) -> tuple[int, int]:
    """Rows, and the sum of their hashes: equal for equal multisets."""
    columns = ["event_id", "user_id", "order_id", "item_id", "event_at", "value", "reason"]
    total = F.sum(F.xxhash64(*columns).cast("decimal(38,0)"))
    row = frame.agg(F.count(F.lit(1)), total).collect()[0]
    return int(row[0]), int(row[1] or 0)


@pytest.mark.usefixtures("generated_code")
def test_bundled_year_gives_the_known_figures(spark: SparkSession) -> None:
    landing = read_landing(spark, bundled(), LAST, initial=True)
    checked = check_events(
        landing.events, run_date=LAST, max_late_days=7, initial=True, unique_ids=landing.unique_ids
    ).persist(StorageLevel.MEMORY_AND_DISK)
    counts = count_verdicts(checked, landing.events)
    counts.check()
    sales = clean_of(checked, LAST)
    row = sales.agg(
        F.countDistinct("event_id").alias("events"),
        F.countDistinct("user_id").alias("users"),
        F.countDistinct("item_id").alias("items"),
        F.min("event_at").alias("first"),
        F.max("event_date").alias("last"),
    ).collect()[0]
    checked.unpersist()

    assert (counts.n_in, counts.n_clean, counts.n_duplicates) == (525_461, 406_295, 0)
    assert counts.by_reason == {
        "no user": 102_857,
        "cancelled invoice": 10_206,
        "not a product": 2_472,
        "quantity not positive": 2_102,
        "price not positive": 1_529,
    }
    assert (row["events"], row["users"], row["items"]) == (406_295, 4_285, 4_006)
    assert (row["first"], row["last"]) == (datetime(2009, 12, 1, 7, 45), LAST)


def test_nights_in_turn_give_the_rows_of_one_landing(spark: SparkSession, tmp_path: Path) -> None:
    lately = spark.read.parquet(str(BUNDLED)).where("InvoiceDate >= '2010-12-06'")
    lately.coalesce(1).write.parquet(str(tmp_path / "lately"))
    source = shop(tmp_path / "lately")
    whole = read_landing(spark, source, LAST, initial=True)
    nights = [
        read_landing(spark, source, date(2010, 12, day), initial=day == 7) for day in (7, 8, 9)
    ]
    n_rows, content = content_sum(whole.events)
    assert n_rows > 10_000
    # Each night reads what the ones before it read, and the ids are the same: the last has it all.
    assert content_sum(nights[-1].events) == (n_rows, content)
    taken = nights[0].events
    for night in nights[1:]:
        taken = taken.union(night.events.join(taken, on="event_id", how="left_anti"))
    assert content_sum(taken) == (n_rows, content)
    assert whole.items is not None
    assert nights[-1].items is not None
    assert rows_of(nights[-1].items) == rows_of(whole.items)


def test_digest_depends_on_content_not_on_time_or_place(
    spark: SparkSession, tmp_path: Path
) -> None:
    copy = tmp_path / "clone" / "copy.parquet"
    digests = []
    for price in (1.0, 1.0, 2.0):
        write_parquet(copy, [a_line(Price=price)], RAW)
        digests.append(read_landing(spark, shop(copy), NIGHT, initial=True).digest)
    assert digests[0] == digests[1] != digests[2]


def test_one_line_becomes_one_event_and_one_item(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    source = shop(write_parquet(tmp_path / "a.parquet", [a_line()], RAW))
    [event] = checked(source)
    # The id, worked by hand: fields as text, \x1f between them, \x00 for null (no unreadable text).
    fields = ["489434", "79323P", " PINK CHERRY LIGHTS ", "12", "2024-05-31 07:45:00", "6.75"]
    fields += ["13085.0", "United Kingdom", "\x00"]
    digest = hashlib.sha256("\x1f".join(fields).encode()).hexdigest()
    assert event == {
        "event_id": digest[:32] + "-1",
        "user_id": "13085",
        "session_key": None,
        "order_id": "489434",
        "item_id": "79323P",
        "event_type": "purchase",
        "event_at": datetime(2024, 5, 31, 7, 45),
        "value": 81.0,
        "quantity": 12.0,
        "attributes": {"country": "United Kingdom"},
        "reason": None,
        "row": None,
        "event_date": NIGHT,
        "verdict": "clean",
    }
    landing = read_landing(spark, source, NIGHT, initial=True)
    assert landing.items is not None
    [item] = landing.items.collect()
    assert item.asDict() == {
        "item_id": "79323P",
        "item_name": "PINK CHERRY LIGHTS",
        "category": None,
        "price": 6.75,
        "text": "PINK CHERRY LIGHTS",
        "media": None,
        "valid_from": datetime(2024, 5, 31, 7, 45),
        **dict.fromkeys(schema.AVAILABILITY),  # nothing is said
        "reason": None,
        "row": None,
    }


def test_identical_lines_are_all_kept_and_ids_do_not_depend_on_order(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    lines = [a_line(), a_line(Quantity=1), a_line(), a_line(), a_line(Description=None)]
    ids = [
        row["event_id"] for row in checked(shop(write_parquet(tmp_path / "a.parquet", lines, RAW)))
    ]
    turned = write_parquet(tmp_path / "b.parquet", lines[::-1], RAW)
    assert [row["event_id"] for row in checked(shop(turned))] == ids
    assert len(set(ids)) == 5
    assert sorted(i[-2:] for i in ids) == ["-1", "-1", "-1", "-2", "-3"]


DIRT = [
    ({"InvoiceDate": "yesterday", "Invoice": "C1"}, "wrong type: InvoiceDate"),
    ({"Customer_ID": 130.5, "Invoice": "C1"}, "wrong type: Customer ID"),
    ({"Invoice": "C489449", "Quantity": -12}, "cancelled invoice"),
    ({"Invoice": "c489449"}, "cancelled invoice"),
    ({"StockCode": "POST", "Quantity": -1}, "not a product"),
    ({"StockCode": "1234"}, "not a product"),
    ({"Quantity": 0, "Price": 0.0}, "quantity not positive"),
    ({"Quantity": -3}, "quantity not positive"),
    ({"Quantity": None}, "quantity not positive"),
    ({"Price": 0.0, "Customer_ID": None}, "price not positive"),
    ({"Price": -0.5}, "price not positive"),
    ({"Price": None}, "price not positive"),
    ({"Customer_ID": None}, "no user"),
    ({"Customer_ID": float("nan")}, "no user"),
    ({"StockCode": None}, "no item"),
    ({"StockCode": "   "}, "no item"),
    ({"InvoiceDate": None}, "no time"),
    ({"InvoiceDate": " "}, "no time"),
    ({"InvoiceDate": "1900-01-01 00:00:00"}, "event before 1970-01-02"),
    ({"Price": float("inf")}, "value not finite"),
]


def test_each_kind_of_dirt_is_quarantined_for_its_reason(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    lines = [a_line(Country=str(i), **changes) for i, (changes, _) in enumerate(DIRT)]
    lines.append(a_line(Country="good"))
    rows = checked(shop(write_parquet(tmp_path / "a.parquet", lines, RAW)))
    found = {row["attributes"]["country"]: (row["verdict"], row["reason"]) for row in rows}
    wanted = {str(i): ("quarantined", reason) for i, (_, reason) in enumerate(DIRT)}
    assert found == {**wanted, "good": ("clean", None)}
    kept = {row["attributes"]["country"]: json.loads(row["row"]) for row in rows if row["row"]}
    assert kept["2"] == {**a_line(Country="2", Invoice="C489449", Quantity=-12)}
    assert "good" not in kept


def test_text_columns_are_read_row_by_row(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    head = "Country,Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Extra\n"
    lines = {
        "good": "489434,79323P,PINK,12,2024-05-31 07:45:00,6.75,13085.0,x",
        "quoted": '489434,79323P,"PINK, ""6""",12,2024-05-31,6.75,13085,x',
        "quantity": "489434,79323P,PINK,a dozen,2024-05-31 07:45:00,6.75,13085,x",
        "price": '489434,79323P,PINK,12,2024-05-31 07:45:00,"6,75",13085,x',
        "customer": "489434,79323P,PINK,12,2024-05-31 07:45:00,6.75,Smith,x",
        "no day": "489434,79323P,PINK,12,2024-02-30 07:45:00,6.75,13085,x",
        "only hour": "489434,79323P,PINK,12,T07:45,6.75,13085,x",
    }
    text = head + "".join(f"{name},{line}\n" for name, line in lines.items())
    bad = b"too short,489434,79323P\n"
    bad += b"too long,489434,79323P,PINK,12,2024-05-31 07:45:00,6.75,13085,x,y\n"
    bad += b'quote,489434,79323P,"PINK,12,2024-05-31 07:45:00,6.75,13085,x\n'
    bad += b"latin,489434,79323P,CAF\xc9,12,2024-05-31 07:45:00,6.75,13085,x\n"
    bad += b"many," + b"," * 30_000 + b"\n"
    path = write_text(tmp_path / "a.csv", text.encode() + bad)
    rows = checked(shop(path, format="csv"))
    found = Counter((row["verdict"], row["reason"]) for row in rows)
    assert found == {
        ("clean", None): 2,
        ("quarantined", "wrong type: Quantity"): 1,
        ("quarantined", "wrong type: Price"): 1,
        ("quarantined", "wrong type: Customer ID"): 1,
        ("quarantined", "wrong type: InvoiceDate"): 2,
        ("quarantined", "unreadable row"): 4,
        ("quarantined", "bad encoding: Description"): 1,
    }
    assert {row["user_id"] for row in rows if row["verdict"] == "clean"} == {"13085"}
    raw = [json.loads(row["row"]) for row in rows if row["reason"] == "unreadable row"]
    assert "too short,489434,79323P" in [row["_unreadable"] for row in raw]


def test_item_has_one_row_a_day_with_its_latest_name_and_price(
    spark: SparkSession, tmp_path: Path
) -> None:
    at = "2024-05-{:02d} {:02d}:00:00".format
    lines = [
        a_line(InvoiceDate=at(30, 9), Description="OLD", Price=1.0),
        a_line(InvoiceDate=at(31, 9), Description="NEW", Price=2.0),
        a_line(InvoiceDate=at(31, 11), Description="NEWER", Price=3.0),
        a_line(InvoiceDate=at(31, 11), Description="NEWER", Price=2.5),
        a_line(InvoiceDate=at(31, 12), Description="  ", Price=9.0),
        a_line(InvoiceDate=at(31, 13), Description="damaged", Price=9.0, Quantity=-1),
        a_line(InvoiceDate=at(31, 14), Description="no customer", Customer_ID=None),
        a_line(InvoiceDate=at(31, 15), Description="bank fees", StockCode="BANK"),
    ]
    source = shop(write_parquet(tmp_path / "a.parquet", lines, RAW))
    landing = read_landing(spark, source, NIGHT, initial=True)
    assert landing.items is not None
    found = sorted(tuple(row)[1:4:2] + (row["valid_from"],) for row in landing.items.collect())
    assert found == [
        ("NEWER", 3.0, datetime(2024, 5, 31, 11)),
        ("OLD", 1.0, datetime(2024, 5, 30, 9)),
    ]


def test_times_are_of_the_sources_zone(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    lines = [a_line(InvoiceDate="2024-05-31 00:30:00"), a_line(InvoiceDate="2024-06-01 00:30:00")]
    source = shop(write_parquet(tmp_path / "a.parquet", lines, RAW), timezone="Europe/London")
    [early, late] = sorted(checked(source), key=lambda row: row["event_at"])
    assert early["event_at"] == datetime(2024, 5, 30, 23, 30)
    assert (early["event_date"], late["event_date"]) == (date(2024, 5, 30), date(2024, 5, 31))
    assert checked(source, initial=False) == [early, late]


def test_archive_gives_all_rows_but_later_ones_every_night(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    """Undated ones too, which name no item: what an earlier night took is told by its id."""
    days = [None, "no day", "2024-05-20 10:00:00", "2024-05-31 23:59:59", "2024-06-01 00:00:00"]
    lines = [a_line(InvoiceDate=day, Country=str(day)) for day in days]
    source = shop(write_parquet(tmp_path / "a.parquet", lines, RAW))
    for initial, reason in ((True, None), (False, "event too late")):
        found = {
            row["attributes"]["country"]: row["reason"] for row in checked(source, initial=initial)
        }
        assert found == {
            "None": "no time",
            "no day": "wrong type: InvoiceDate",
            "2024-05-20 10:00:00": reason,
            "2024-05-31 23:59:59": None,
        }
    items = read_landing(spark, source, NIGHT, initial=True).items
    assert items is not None
    assert {str(row["valid_from"])[:10] for row in items.collect()} == {"2024-05-20", "2024-05-31"}


def test_renamed_and_retyped_columns_are_named(spark: SparkSession, tmp_path: Path) -> None:
    line = a_line()
    renamed = {
        ("Quantities" if name == "Quantity" else name): value for name, value in line.items()
    }
    del renamed["Country"]
    path = write_parquet(tmp_path / "a.parquet", [renamed])
    with pytest.raises(SourceError) as error:
        read_landing(spark, shop(path), NIGHT, initial=True)
    assert str(error.value).startswith(
        f"source 'shop': {path} lacks 2 columns: 'Quantity'. Did you mean 'Quantities'? "
    )
    assert " 'Country'. Known: Customer ID, Description, Invoice" in str(error.value)
    path = write_parquet(tmp_path / "b.parquet", [{**line, "Price": [6.75]}])
    with pytest.raises(
        SourceError, match=r"column 'Price' is array<double>, expected a number, or"
    ):
        read_landing(spark, shop(path), NIGHT, initial=True)
    path = write_parquet(tmp_path / "c.parquet", [{**line, "InvoiceDate": True}])
    with pytest.raises(SourceError, match=r"column 'InvoiceDate' is boolean, expected a timestamp"):
        read_landing(spark, shop(path), NIGHT, initial=True)


def test_files_of_one_landing_may_differ_in_types_and_order(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    write_parquet(tmp_path / "in/a.parquet", [a_line()], RAW)
    other = {
        **a_line(),
        "Quantity": "12",
        "Customer ID": "13085.0",
        "InvoiceDate": datetime(2024, 5, 31, 7, 45),
    }
    write_parquet(tmp_path / "in/b.parquet", [{"more": 1, **dict(reversed(other.items()))}])
    write_parquet(tmp_path / "in/c.parquet", [{**a_line(), "Quantity": "dozen"}])
    rows = checked(shop(tmp_path / "in"))
    assert [row["reason"] for row in rows if row["reason"]] == ["wrong type: Quantity"]
    clean = [row for row in rows if row["verdict"] == "clean"]
    assert [(r["user_id"], r["quantity"], r["event_at"]) for r in clean] == [
        ("13085", 12.0, datetime(2024, 5, 31, 7, 45))
    ] * 2
    # Equal lines, whatever their types: ids of the published form, numbered.
    published = write_parquet(tmp_path / "published.parquet", [a_line(), a_line()], RAW)
    wanted = sorted(row["event_id"] for row in checked(shop(published)))
    assert sorted(row["event_id"] for row in clean) == wanted
