"""Any format through a column mapping."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config import Source
from recspark.data.catalogue_checks import check_items
from recspark.data.event_checks import count_verdicts
from recspark.errors import SourceError
from recspark.sources import Landing, landing_digest, read_landing
from tests.sources.conftest import NIGHT, rows_of, write_parquet, write_text

pytestmark = pytest.mark.spark

COLUMNS = {
    "user_id": "customer",
    "item_id": "sku",
    "event_type": "what",
    "event_at": "when",
    "value": "amount",
    "quantity": "n",
    "order_id": "basket.no",
}
RECORDS: list[dict[str, Any]] = [
    {"customer": "u1", "sku": "A", "what": "buy", "when": "2024-05-31T10:00:00Z", "amount": 9.5, "n": 1.0},
    {"customer": "u1", "sku": "A", "what": "buy", "when": "2024-05-31T10:00:00Z", "amount": 9.5, "n": 1.0},
    {"customer": "u2", "sku": "b,\"2\"", "what": "view", "when": "2024-05-31T23:59:59Z", "amount": None, "n": 2.0},
    {"customer": None, "sku": "C", "what": "buy", "when": "2024-05-31T11:00:00Z", "amount": 0.25, "n": 1.0},
]  # fmt: skip
for _record in RECORDS:
    _record.update({"basket.no": "o1", "page": None, "unused": "x"})


def shop(path: Path | str, **settings: Any) -> Source:
    defaults: dict[str, Any] = {
        "name": "shop",
        "kind": "mapping",
        "format": "jsonl",
        "columns": COLUMNS,
        "attributes": {"page": "page"},
    }
    return Source(path=str(path), **{**defaults, **settings})


def json_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    return write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def csv_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    quoted = [
        ",".join(
            "" if v is None else '"' + str(v).replace('"', '""') + '"' for v in record.values()
        )
        for record in records
    ]
    return write_text(path, "\n".join([",".join(records[0]), *quoted, ""]))


def test_every_format_gives_the_same_events(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    for record in RECORDS:
        record["page"] = "home"
    typed = [
        {**record, "when": datetime.fromisoformat(record["when"]).astimezone(UTC)}
        for record in RECORDS
    ]
    write_parquet(tmp_path / "a.parquet", typed)
    frame = spark.read.parquet(str(tmp_path / "a.parquet"))
    frame.write.format("delta").save(str(tmp_path / "delta"))
    answers = {
        "jsonl": checked(shop(json_lines(tmp_path / "a.jsonl", RECORDS))),
        "csv": checked(shop(csv_lines(tmp_path / "a.csv.gz", RECORDS), format="csv")),
        "parquet": checked(shop(tmp_path / "a.parquet", format="parquet")),
        "delta": checked(shop(tmp_path / "delta", format="delta")),
    }
    for rows in answers.values():
        for row in rows:
            row.pop("row")  # the raw row is as its format spells it
    assert answers["csv"] == answers["jsonl"]
    assert answers["parquet"] == answers["jsonl"]
    assert answers["delta"] == answers["jsonl"]
    assert sorted(
        (r["user_id"] or "", r["item_id"], r["verdict"], r["reason"]) for r in answers["csv"]
    ) == [
        ("", "C", "quarantined", "no user"),
        ("u1", "A", "clean", None),
        ("u1", "A", "clean", None),
        ("u2", 'b,"2"', "clean", None),
    ]
    first = next(row for row in answers["csv"] if row["user_id"] == "u1")
    assert first["event_at"] == datetime(2024, 5, 31, 10)
    assert (first["value"], first["quantity"], first["order_id"]) == (9.5, 1.0, "o1")
    assert first["attributes"] == {"page": "home"}
    assert len({row["event_id"] for row in answers["csv"]}) == 4
    renamed = shop(tmp_path / "delta", format="delta", columns={**COLUMNS, "user_id": "custome"})
    with pytest.raises(SourceError, match=r"lacks a column: 'custome'\. Did you mean 'customer'\?"):
        read_landing(spark, renamed, NIGHT, initial=True)


TIMES = [
    ("2024-05-31", datetime(2024, 5, 30, 22)),
    ("2024-05-31 10:00", datetime(2024, 5, 31, 8)),
    ("2024-05-31T10:00:00.123456789", datetime(2024, 5, 31, 8, 0, 0, 123456)),
    ("2024-05-31T10:00:00Z", datetime(2024, 5, 31, 10)),
    ("2024-05-31 10:00:00+03:00", datetime(2024, 5, 31, 7)),
    ("2024-01-31 10:00:00", datetime(2024, 1, 31, 9)),  # winter
    ("1717149600", datetime(2024, 5, 31, 10)),
    ("1717149600000", datetime(2024, 5, 31, 10)),
    ("1717149600.25", datetime(2024, 5, 31, 10, 0, 0, 250000)),
    ("1717149600000000", datetime(2024, 5, 31, 10)),
    ("10:00:00", None),
    ("20240531", datetime(2024, 5, 30, 22)),
    ("2024-02-30", None),
    ("31.05.2024", None),
    ("now", None),
]


def test_times_of_every_spelling(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    records = [{**RECORDS[0], "sku": text, "when": text} for text, _ in TIMES]
    source = shop(json_lines(tmp_path / "a.jsonl", records), timezone="Europe/Berlin")
    rows = checked(source)
    assert {row["item_id"]: row["event_at"] for row in rows} == dict(TIMES)
    wrong = {row["item_id"] for row in rows if row["reason"] == "wrong type: when"}
    assert wrong == {text for text, at in TIMES if at is None}


def test_typed_times(spark: SparkSession, tmp_path: Path) -> None:
    typed = [
        (1717149600, datetime(2024, 5, 31, 10)),
        (1717149600000, datetime(2024, 5, 31, 10)),
        (1717149600.5, datetime(2024, 5, 31, 10, 0, 0, 500000)),
        (datetime(2024, 5, 31, 10), datetime(2024, 5, 31, 8)),  # no zone: the source's
        (datetime(2024, 5, 31, 10, tzinfo=UTC), datetime(2024, 5, 31, 10)),
        (date(2024, 5, 31), datetime(2024, 5, 30, 22)),
    ]
    frames = []
    for i, (value, _) in enumerate(typed):
        record = {**RECORDS[0], "page": "x", "when": value, "sku": i}
        path = write_parquet(tmp_path / f"{i}.parquet", [record])
        source = shop(path, format="parquet", timezone="Europe/Berlin")
        frames.append(read_landing(spark, source, NIGHT, initial=True).events)
    rows = reduce(DataFrame.union, frames).select("item_id", "event_at").collect()
    assert {int(row["item_id"]): row["event_at"] for row in rows} == {
        i: at for i, (_, at) in enumerate(typed)
    }


def test_an_id_of_another_type_is_named(spark: SparkSession, tmp_path: Path) -> None:
    record = {**RECORDS[0], "page": "x", "customer": {"first": "Ada"}}
    path = write_parquet(tmp_path / "a.parquet", [record])
    with pytest.raises(SourceError, match=r"column 'customer' is struct<.*>, expected an id: text"):
        read_landing(spark, shop(path, format="parquet"), NIGHT, initial=True)


def test_bad_json_lines_go_to_quarantine_as_they_are(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    good = json.dumps(RECORDS[0])
    lines = [good, '{"customer": "u1", "sku"', "5", "null", "", '["a"]', '{"sku": "B"}']
    text = "\n".join(lines).encode() + b'\n{"customer": "u\xff", "sku": "B"}\n'
    rows = checked(shop(write_text(tmp_path / "a.jsonl", text)))
    assert Counter(row["reason"] for row in rows) == {
        None: 1,
        "no user": 1,
        "unreadable row": 5,  # of JSON, also what is no UTF-8
    }
    raw = [json.loads(row["row"]) for row in rows if row["reason"] == "unreadable row"]
    texts = sorted(row["_unreadable"] for row in raw)
    assert texts[:3] == ["5", '["a"]', "null"]
    assert texts[3:] == ['{"customer": "u1", "sku"', '{"customer": "u\ufffd", "sku": "B"}']


def test_a_column_that_few_json_lines_have_is_found(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    records = [{**RECORDS[0], "sku": str(i)} for i in range(1500)]
    for record in records:
        del record["page"]
    records[-1]["page"] = "late"
    rows = checked(shop(json_lines(tmp_path / "a.jsonl", records)))
    assert [r["attributes"]["page"] for r in rows if r["attributes"]["page"]] == ["late"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_renamed_column_is_an_error_before_any_row(
    spark: SparkSession, tmp_path: Path, kind: str
) -> None:
    records = [{("skus" if name == "sku" else name): v for name, v in r.items()} for r in RECORDS]
    if kind == "csv":
        path = csv_lines(tmp_path / "a", records)
    elif kind == "jsonl":
        path = json_lines(tmp_path / "a", records)
    else:
        path = write_parquet(tmp_path / "a", [{**r, "page": "x"} for r in records])
    with pytest.raises(SourceError, match=r"lacks a column: 'sku'\. Did you mean 'skus'\?"):
        read_landing(spark, shop(path, format=kind), NIGHT, initial=True)


def test_one_file_of_many_without_a_column_is_named(spark: SparkSession, tmp_path: Path) -> None:
    csv_lines(tmp_path / "a.csv", RECORDS)
    csv_lines(tmp_path / "b.csv", [{**RECORDS[0], "sku": 1}])
    write_text(tmp_path / "c.csv", "customer,what\nu1,buy\n")
    with pytest.raises(SourceError, match=r"c\.csv lacks 6 columns"):
        read_landing(spark, shop(tmp_path, format="csv"), NIGHT, initial=True)


def test_csv_files_may_order_their_columns_differently(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    csv_lines(tmp_path / "a.csv", RECORDS[:1])
    csv_lines(tmp_path / "b.csv", [dict(reversed(RECORDS[1].items()))])
    rows = checked(shop(tmp_path, format="csv"))
    assert [(row["user_id"], row["item_id"], row["value"]) for row in rows] == [
        ("u1", "A", 9.5)
    ] * 2
    assert sorted(row["event_id"][-2:] for row in rows) == ["-1", "-2"]


def test_column_twice_in_a_csv_header_is_an_error(spark: SparkSession, tmp_path: Path) -> None:
    write_text(tmp_path / "a.csv", ",".join([*COLUMNS.values(), "page", "sku"]) + "\n1\n")
    with pytest.raises(SourceError, match=r"column 'sku' occurs 2 times in .*a\.csv"):
        read_landing(spark, shop(tmp_path, format="csv"), NIGHT, initial=True)


def test_folder_names_are_columns(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    records = [{name: v for name, v in RECORDS[0].items() if name != "page"}]
    write_parquet(tmp_path / "page=shop/a.parquet", records)
    [row] = checked(shop(tmp_path, format="parquet"))
    assert row["attributes"] == {"page": "shop"}


def test_ids_constants_and_session_keys(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    records = [
        {"id": 7, "visit": "v1", "sku": 12.0, "at": 1717149600},
        {"id": 7, "visit": "v2", "sku": 12.5, "at": 1717149601},
        {"id": None, "visit": "v3", "sku": 13.0, "at": 1717149602},
    ]
    source = shop(
        write_parquet(tmp_path / "a.parquet", records),
        format="parquet",
        columns={"event_id": "id", "session_key": "visit", "item_id": "sku", "event_at": "at"},
        constants={"event_type": "click", "value": "1"},
        attributes={},
    )
    rows = {row["session_key"]: row for row in checked(source)}
    found = {
        key: (r["event_id"], r["item_id"], r["verdict"], r["reason"]) for key, r in rows.items()
    }
    assert found == {
        "v1": ("7", "12", "clean", None),
        "v2": ("7", "12.5", "duplicate", "twice in this landing"),
        "v3": (None, "13", "quarantined", "no event id"),
    }
    assert (rows["v1"]["event_type"], rows["v1"]["value"]) == ("click", 1.0)


def test_value_below_the_least_is_quarantined(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    records = [{**RECORDS[0], "sku": str(v), "amount": v} for v in (-0.01, 0.0, 5.0)]
    rows = checked(shop(json_lines(tmp_path / "a.jsonl", records), min_value=0))
    assert {row["item_id"]: row["reason"] for row in rows} == {
        "-0.01": "value too small",
        "0.0": None,
        "5.0": None,
    }


def test_landing_of_a_night_is_taken_whole_and_judged_by_its_day(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    days = ["2024-05-23", "2024-05-24", "2024-05-31T23:59:59Z", "2024-06-01T00:00:00Z"]
    json_lines(tmp_path / "2024-05-31/a.jsonl", [{**RECORDS[0], "sku": d, "when": d} for d in days])
    source = shop(tmp_path / "{run_date}", archive=False)
    found = {row["item_id"]: row["reason"] for row in checked(source, initial=False)}
    assert found == dict(zip(days, ["event too late", None, None, "event in the future"]))
    found = {row["item_id"]: row["reason"] for row in checked(source, initial=True)}
    assert found == dict(zip(days, [None, None, None, "event in the future"]))


def test_delta_is_read_at_the_version_of_the_digest(spark: SparkSession, tmp_path: Path) -> None:
    frame = spark.createDataFrame(
        [("u1", "A", "2024-05-31")], "customer string, sku string, when string"
    )
    path = tmp_path / "delta"
    frame.write.format("delta").save(str(path))
    source = shop(
        path,
        format="delta",
        columns={"user_id": "customer", "item_id": "sku", "event_at": "when"},
        constants={"event_type": "click"},
        attributes={},
    )
    landing = read_landing(spark, source, NIGHT, initial=True)
    frame.write.format("delta").mode("append").save(str(path))
    assert landing.events.count() == 1
    assert landing.digest != landing_digest(source, NIGHT)


def verdicts(landing: Landing) -> list[dict[str, Any]]:
    assert landing.items is not None
    checked = check_items(landing.items)
    count_verdicts(checked, landing.items).check()
    return rows_of(checked)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_catalogue_rows_that_cannot_be_read(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    """Each has its reason and its raw text, as an event has."""
    prices = {"fine": "3.5", "no": "", "currency": "EUR 3", "comma": "12,99", "number": "NaN"}
    records = [{"sku": n, "name": n, "price": p, "from": "2024-05-30"} for n, p in prices.items()]
    records.append({"sku": "when", "name": "x", "price": "1", "from": "soon"})
    records.append({"sku": "broken", "name": "K\ufffdhler", "price": "1", "from": "2024-05-30"})
    if kind == "csv":
        path = csv_lines(tmp_path / "items.csv", records)
        path.write_bytes(path.read_bytes() + b"ragged,x\n")
    else:
        path = json_lines(tmp_path / "items.jsonl", records)
        path.write_bytes(path.read_bytes() + b'{"sku": "ragged",\n')
    source = shop(
        json_lines(tmp_path / "a.jsonl", RECORDS),
        items_path=str(path),
        items_format=kind,
        items_columns={
            "item_id": "sku",
            "item_name": "name",
            "price": "price",
            "valid_from": "from",
        },
    )
    rows = verdicts(read_landing(spark, source, NIGHT, initial=True))
    bad = [row for row in rows if row["verdict"] == "quarantined"]
    assert Counter(row["reason"] for row in bad) == {
        "wrong type: price": 2,
        "price not finite": 1,
        "wrong type: from": 1,
        "bad encoding: name": 1,
        "unreadable row": 1,
    }
    assert all("sku" in json.loads(row["row"]) or "ragged" in row["row"] for row in bad)
    clean = {row["item_id"]: row["price"] for row in rows if row["verdict"] == "clean"}
    assert clean == {"fine": 3.5, "no": None}


def test_a_catalogue_says_what_is_available(spark: SparkSession, tmp_path: Path) -> None:
    """A flag or a date range; a blank flag is true, and a flag that is none refuses the row."""
    flags = {"yes": True, "0": False, "": True, "TRUE": True, "n": False, "soon": None}
    records = [
        {"sku": flag or "blank", "flag": flag, "from": "2024-05-01", "until": ""} for flag in flags
    ]
    path = json_lines(tmp_path / "items.jsonl", records)
    columns = {"item_id": "sku", "available": "flag", "available_from": "from"}
    columns["available_until"] = "until"
    events = json_lines(tmp_path / "a.jsonl", RECORDS)
    source = shop(events, items_path=str(path), items_format="jsonl", items_columns=columns)
    rows = verdicts(read_landing(spark, source, NIGHT, initial=True))
    assert {row["item_id"]: row["available"] for row in rows} == {
        flag or "blank": value for flag, value in flags.items()
    }
    assert {row["reason"] for row in rows if row["available"] is None} == {"wrong type: flag"}
    assert {str(row["available_from"]) for row in rows} == {"2024-05-01 00:00:00"}
    assert {row["available_until"] for row in rows} == {None}
    # Without such columns nothing is said, unless the delivery is complete.
    for is_complete, available in ((False, None), (True, True)):
        source = shop(
            events,
            items_path=str(path),
            items_format="jsonl",
            items_columns={"item_id": "sku"},
            items_complete=is_complete,
        )
        rows = verdicts(read_landing(spark, source, NIGHT, initial=True))
        assert {row["available"] for row in rows} == {available}


def test_folder_columns_are_text(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    """Of every format that has folder columns; Delta types its own."""
    record = {k: v for k, v in RECORDS[0].items() if k not in ("customer", "page", "when")}
    wanted = []
    for user, page, day in [("00123", "007", "2024-05-30"), ("1e3", "1.0", "20240530")]:
        below = f"when={day}/customer={user}/page={page}"
        csv_lines(tmp_path / "csv" / below / "a.csv", [record])
        json_lines(tmp_path / "jsonl" / below / "a.jsonl", [record])
        write_parquet(tmp_path / "parquet" / below / "a.parquet", [record])
        wanted.append((user, page, datetime(2024, 5, 30)))
    for kind in ("csv", "jsonl", "parquet"):
        rows = checked(shop(tmp_path / kind, format=kind))
        found = [(row["user_id"], row["attributes"]["page"], row["event_at"]) for row in rows]
        assert sorted(found) == wanted, kind


SHOP = """order;article;kind;price;pieces;customer;sold_at;note
r1;A;sale;9,95;2;c1;2024-05-31 09:00;first
r2;A;sale;1.000,00;3;0;2024-05-31 09:00;a guest
r3;GIFT;sale;5,00;1;c2;2024-05-31 09:00;no product
r4;A;return;9,95;1;c2;2024-05-31 09:00;back
r5;A;sale;cheap;1;c2;2024-05-31 09:00;no price
r6;A;sale;;1;c2;2024-05-31 09:00;no price given
r7;A;sale;9,95;501;c2;2024-05-31 09:00;too many
r8;A;sale;1,00E+20;1;c2;2024-05-31 09:00;beyond all
r9;A;;9,95;1;c2;2024-05-31 09:00;kind unknown
r10;A;sale;0,50;1;c2;2024-05-31 09:00;half
"""
MAPPED = {"order_id": "order", "item_id": "article", "user_id": "customer", "quantity": "pieces"}
REAL: dict[str, Any] = {
    "columns": {**MAPPED, "event_at": "sold_at"},
    "expressions": {"value": "price * pieces"},
    "constants": {"event_type": "purchase"},
    "attributes": {},
    "where": {
        "article RLIKE '^[A-Z]$'": "not a product",
        "kind <> 'return' AND price > 0.1 OR price IS NULL": "a return",
    },
    "null_values": {"user_id": ["0"]},
    "bounds": {"quantity": [1, 500]},
    "decimal": ",",
    "thousands": ".",
}  # fmt: skip


def test_a_real_shop_needs_no_preparation(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    import csv

    write_text(tmp_path / "csv/a.csv", SHOP)
    delivered = list(csv.DictReader(SHOP.splitlines(), delimiter=";"))
    json_lines(tmp_path / "a.jsonl", delivered)
    # The same as a typed table: what can be a number is one.
    typed = [
        {**row, "pieces": int(row["pieces"]), "customer": row["customer"]} for row in delivered
    ]
    write_parquet(tmp_path / "a.parquet", typed)
    ways = {
        "csv": checked(shop(tmp_path / "csv", format="csv", options={"sep": ";"}, **REAL)),
        "jsonl": checked(shop(tmp_path / "a.jsonl", **REAL)),
        "parquet": checked(shop(tmp_path / "a.parquet", format="parquet", **REAL)),
    }
    wanted = {
        "r1": (19.9, None),
        "r2": (3000.0, "no user"),
        "r3": (5.0, "not a product"),
        "r4": (9.95, "a return"),
        "r5": (None, "wrong type: price"),
        "r6": (None, None),
        "r7": (9.95 * 501, "quantity too large"),
        "r8": (1e20, "value too large"),
        "r9": (9.95, "a return"),  # null = fails
        "r10": (0.5, None),
    }
    for way, rows in ways.items():
        assert {r["order_id"]: (r["value"], r["reason"]) for r in rows} == wanted, way
        refused = {r["order_id"]: json.loads(r["row"]) for r in rows if r["row"]}
        assert refused["r3"]["note"] == "no product"
        assert (
            {
                **refused["r6"],
            }
            if "r6" in refused
            else True
        )
        given = {k: v for k, v in delivered[2].items() if k != "pieces"}
        assert refused["r3"].items() >= given.items(), way
    ids = [{row["order_id"]: row["event_id"] for row in rows} for rows in ways.values()]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expressions": {"value": "prise * n"}}, r"value = 'prise \* n' .* Did you mean 'price'\?"),
        ({"expressions": {"value": "price *"}}, r"value = 'price \*' cannot be computed: \[PARSE"),
        ({"expressions": {"value": "sum(price)"}}, "has to be computed from one row alone"),
        ({"expressions": {"value": "price + rand()"}}, "and the same each time"),
        ({"expressions": {"value": "explode(array(price, n))"}}, "from one row alone"),
        ({"where": {"price * 2": "no"}}, r"source\.where is no condition: 'price \* 2' gives double"),
    ],
)  # fmt: skip
def test_sql_that_cannot_be_read_is_named(
    spark: SparkSession, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{**RECORDS[0], "price": 2}])
    columns = {name: raw for name, raw in COLUMNS.items() if name != "value"}
    with pytest.raises(SourceError, match=message):
        read_landing(spark, shop(path, columns=columns, **changes), NIGHT, initial=True)
    assert spark.conf.get("spark.sql.ansi.enabled") == "true"


def test_sql_reads_numbers_and_text_and_never_fails_a_row(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    amounts = ["0.5", "x", "1e400", None, "2"]
    records = [
        {**RECORDS[0], "page": "home", "sku": str(i), "amount": v, "n": 1, "basket.no": "00"}
        for i, v in enumerate(amounts)
    ]
    where = {
        "amount > 0 OR amount IS NULL": "too cheap",
        "`basket.no` = '00'": "another basket",
        "CAST(amount AS INT) / 0 IS NULL": "never",
        "CAST(concat(sku, 'x') AS INT) IS NULL": "never",
    }
    rows = checked(shop(json_lines(tmp_path / "a.jsonl", records), where=where))
    assert {row["item_id"]: row["reason"] for row in rows} == {
        "0": None,
        "1": "wrong type: amount",
        "2": "value not finite",
        "3": None,
        "4": None,
    }


def test_values_and_quantities_beyond_all_bounds_are_quarantined(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    amounts = [1e20, -1e20, 1e12, -5.0, "Infinity", "NaN"]
    records = [{**RECORDS[0], "sku": f"for {v}", "amount": v} for v in amounts]
    records.append({**RECORDS[0], "sku": "many", "n": 1e20})
    path = json_lines(tmp_path / "a.jsonl", records)
    reasons = {
        "for 1e+20": "value too large",
        "for -1e+20": "value too large",
        "for 1000000000000.0": None,
        "for -5.0": None,
        "for Infinity": "value not finite",
        "for NaN": "value not finite",
        "many": "quantity too large",
    }
    assert {row["item_id"]: row["reason"] for row in checked(shop(path))} == reasons
    reasons |= {"for 1000000000000.0": "value too large"}
    assert {r["item_id"]: r["reason"] for r in checked(shop(path, max_value=1e6))} == reasons


def test_an_archive_then_a_landing_a_night_is_one_source(
    spark: SparkSession, tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    """The first night's folder holds all that there is, the later ones a day each: some of it twice."""
    days = [f"2024-05-{day:02d}" for day in (1, 10, 28, 29, 30, 31)]
    records = [{**RECORDS[0], "page": "x", "sku": day, "when": f"{day}T10:00:00Z"} for day in days]
    write_parquet(tmp_path / "2024-05-29/archive.parquet", records[:4])
    write_parquet(tmp_path / "2024-05-30/a.parquet", records[3:5])
    write_parquet(tmp_path / "2024-05-31/a.parquet", records[5:])
    source = shop(tmp_path / "{run_date}", archive=False, format="parquet")
    clean = {}
    for day in (29, 30, 31):
        for row in checked(source, date(2024, 5, day), initial=day == 29):
            assert row["reason"] is None
            clean[row["event_id"]] = row["item_id"]
    assert sorted(clean.values()) == days
    # What came twice has its id again, so that ingest knows it; the whole at once gives the same.
    write_parquet(tmp_path / "whole.parquet", records)
    whole = checked(shop(tmp_path / "whole.parquet", format="parquet"))
    assert {row["event_id"]: row["item_id"] for row in whole} == clean


def test_prices_are_spelt_as_the_source_says(spark: SparkSession, tmp_path: Path) -> None:
    prices = {"€12.99": 12.99, "1,234.50": 1234.5, "12": 12.0, "0": None, "cheap": None}
    items = json_lines(tmp_path / "i.jsonl", [{"sku": p, "price": p} for p in prices])
    source = shop(
        json_lines(tmp_path / "a.jsonl", RECORDS),
        items_path=str(items),
        items_columns={"item_id": "sku", "price": "price"},
        thousands=",",
        currency=["€"],
        null_values={"price": [0]},
    )
    landing = read_landing(spark, source, NIGHT, initial=True)
    assert landing.items is not None
    assert {row["item_id"]: row["price"] for row in landing.items.collect()} == prices


def test_catalogue(spark: SparkSession, tmp_path: Path) -> None:
    items = [
        {"sku": 1.0, "name": " Lamp ", "path": "home|light | ", "price": 3.5, "from": None},
        {"sku": 2.0, "name": "", "path": None, "price": None, "from": "2024-05-31"},
        {"sku": 2.0, "name": "Chair", "path": "home", "price": None, "from": "2024-05-30"},
        {"sku": 2.0, "name": "Bench", "path": "home", "price": None, "from": "2024-05-30"},
        {"sku": None, "name": "?", "path": "home", "price": 1.0, "from": "2024-05-30"},
        {"sku": 3.0, "name": "Later", "path": "home", "price": 1.0, "from": "2024-06-01"},
    ]
    settings: dict[str, Any] = {
        "items_path": str(write_parquet(tmp_path / "items.parquet", items)),
        "items_format": "parquet",
    }
    columns = {"item_id": "sku", "item_name": "name", "category": "path", "price": "price"}
    path = json_lines(tmp_path / "a.jsonl", RECORDS)

    timed = shop(path, **settings, items_columns={**columns, "valid_from": "from"})
    judged = verdicts(read_landing(spark, timed, NIGHT, initial=True))
    assert Counter((row["verdict"], row["reason"]) for row in judged) == {
        ("clean", None): 2,
        ("duplicate", "twice in this landing"): 1,
        ("quarantined", "no item"): 1,
        ("quarantined", "no time"): 1,  # item 3 is of tomorrow: no row of this landing
    }
    kept = [row for row in judged if row["verdict"] == "clean"]
    found = [(row["item_id"], row["item_name"], row["valid_from"]) for row in kept]
    assert sorted(found, key=lambda item: item[2]) == [
        ("2", "Chair", datetime(2024, 5, 30)),
        ("2", None, datetime(2024, 5, 31)),
    ]

    untimed = shop(path, **settings, items_columns=columns)
    landing = read_landing(spark, untimed, NIGHT, initial=True)
    assert landing.items is not None
    lamp = next(row for row in rows_of(landing.items) if row["item_id"] == "1")
    assert (lamp.pop("reason"), json.loads(lamp.pop("row"))["name"]) == (None, " Lamp ")
    assert lamp == {
        "item_id": "1",
        "item_name": "Lamp",
        "category": ["home", "light"],
        "price": 3.5,
        "text": "Lamp",
        "media": None,
        "valid_from": datetime(1970, 1, 1),
        **dict.fromkeys(schema.AVAILABILITY),  # nothing is said
    }
    later = read_landing(spark, untimed, NIGHT, initial=False).items
    assert later is not None
    assert {row["valid_from"] for row in later.collect()} == {datetime(2024, 5, 31)}
    with pytest.raises(SourceError, match=r"items\.parquet lacks a column: 'title'"):
        read_landing(
            spark,
            shop(path, **settings, items_columns={"item_id": "sku", "item_name": "title"}),
            NIGHT,
            initial=True,
        )
