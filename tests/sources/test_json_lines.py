"""JSON lines: what a line holds beside one flat object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from recspark.config import Source
from recspark.errors import SourceError
from recspark.sources import read_landing
from tests.sources.conftest import NIGHT, write_parquet, write_text

pytestmark = pytest.mark.spark


def shop(path: Path | str, **settings: Any) -> Source:
    defaults: dict[str, Any] = {
        "name": "shop",
        "kind": "mapping",
        "format": "jsonl",
        "columns": {"user_id": "user", "item_id": "item", "event_at": "at"},
        "constants": {"event_type": "click"},
    }
    return Source(path=str(path), **{**defaults, **settings})


def line(user: str, item: str = "1", **more: Any) -> str:
    return json.dumps({"user": user, "item": item, "at": "2024-05-31", **more})


DEEP = "[" * 1000 + "]" * 1000
BAD = [
    line("a") + " x",
    line("a") + line("b"),
    line("a") + "," + line("b"),
    line("a") + "]] x",
    line("a") + ', "user": "b"',
    line("a") + "}",
    line("a") + "],[",
    line("a") + "\x00",
    f"[{line('a')}] {line('b')}",
    f"[{line('a')}, 5, null]",
    '{"user": ' + DEEP + "}",
    '{"user": "a", "item": "1", "deep": ' + DEEP * 5 + "}",
    '{"a":' * 1500 + "1" + "}" * 1500,
    "[" * 5000,
    '{"user": {"$oid": "5"}, "item": "1", "at": "2024-05-31"}',
    '{"user": "a", "item": ["1"], "at": "2024-05-31"}',
    '{"user": "a", "item": "1", "at": {"$date": 5}}',
    '{"user": "a", "item": ' + "9" * 5000 + ', "at": "2024-05-31"}',
    "nonsense",
    "5",
]  # fmt: skip
GOOD = {
    line("good"): ["good"],
    " \t" + line("blanks") + " \r": ["blanks"],
    "\ufeff" + line("marked"): ["marked"],
    f"[{line('one')}, {line('two')}]": ["one", "two"],
    line("[bracket]"): ["[bracket]"],
    line('["a"]'): ['["a"]'],
    line('{"a": 1}'): ['{"a": 1}'],
    line("spaces", extra=[1, {"a": []}]): ["spaces"],
    line('"],[]] x'): ['"],[]] x'],
    "": [],
    "  ": [],
    "[]": [],
}


def test_a_line_is_one_object_or_unreadable(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    lines = [text for pair in zip(GOOD, BAD, strict=False) for text in pair]
    text = "\n".join([*lines, *BAD[len(GOOD) :], ""])
    rows = checked(shop(write_text(tmp_path / "a.jsonl", text)))
    assert sorted(row["user_id"] for row in rows if row["reason"] is None) == sorted(
        user for users in GOOD.values() for user in users
    )
    unreadable = [row["row"] for row in rows if row["reason"] == "unreadable row"]
    assert sorted(json.loads(row)["_unreadable"] for row in unreadable) == sorted(BAD)
    assert len(rows) == len(BAD) + sum(map(len, GOOD.values()))


def test_a_file_of_one_document_is_read_to_its_end(
    tmp_path: Path, checked: Callable[..., list[dict[str, Any]]]
) -> None:
    records = [json.loads(line(user)) for user in "abc"]
    write_text(tmp_path / "a.json", json.dumps(records, indent=2))
    write_text(tmp_path / "b.json", json.dumps(json.loads(line("d")), indent=2) + "\n")
    write_text(tmp_path / "c.json", line("e") + "\n" + line("f"))  # two documents
    rows = checked(shop(tmp_path, options={"multiLine": "true"}))
    assert sorted((row["user_id"] or "", row["reason"]) for row in rows) == [
        ("", "unreadable row"), ("a", None), ("b", None), ("c", None), ("d", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "what"),
    [({"$oid": "5"}, "an object"), (["5"], "a list"), ([{"a": 1}], "a list")],
)
def test_a_column_that_is_never_a_text_is_named(
    spark: SparkSession, tmp_path: Path, value: Any, what: str
) -> None:
    lines = [json.dumps({**json.loads(line("a")), "user": value})] * 3
    path = write_text(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(SourceError, match=f"column 'user' is {what} in .*a.jsonl, expected a text"):
        read_landing(spark, shop(path), NIGHT, initial=True)


def test_lists_are_read_as_in_parquet(spark: SparkSession, tmp_path: Path) -> None:
    lists = {
        "a": ["x", "y|z"],
        "b": "x|y",
        "c": None,
        "d": [],
        "e": ["1", "2"],
        "f": '["x"]',
    }
    records = [{"sku": sku, "c": value} for sku, value in lists.items()]
    records[4]["c"] = [1, 2]
    text = "\n".join(json.dumps(record) for record in [*records, {"sku": "g", "c": [{"a": 1}]}])
    as_lists = [
        {"sku": r["sku"], "c": v} for r in records if isinstance(v := lists[r["sku"]], list)
    ]
    events = write_text(tmp_path / "a.jsonl", line("a"))
    found = {}
    for kind, path in {
        "jsonl": write_text(tmp_path / "items.jsonl", text),
        "parquet": write_parquet(tmp_path / "items.parquet", as_lists),
    }.items():
        source = shop(
            events, items_path=str(path), items_format=kind, items_columns={"item_id": "sku", "category": "c"}
        )  # fmt: skip
        items = read_landing(spark, source, NIGHT, initial=True).items
        assert items is not None
        rows = items.collect()
        found[kind] = {r["item_id"]: r["category"] for r in rows if r["reason"] is None}
        assert [r["item_id"] for r in rows if r["reason"]] == (["g"] if kind == "jsonl" else [])
    assert found["jsonl"] == {
        "a": ["x", "y|z"], "b": ["x", "y"], "c": None, "d": [], "e": ["1", "2"], "f": ['["x"]']
    }  # fmt: skip
    assert found["parquet"].items() <= found["jsonl"].items()


def test_lists_of_objects_are_named(spark: SparkSession, tmp_path: Path) -> None:
    events = write_text(tmp_path / "a.jsonl", line("a"))
    path = write_text(tmp_path / "items.jsonl", json.dumps({"sku": "1", "c": [{"a": 1}]}))
    columns = {"item_id": "sku", "category": "c"}
    source = shop(events, items_path=str(path), items_columns=columns)
    with pytest.raises(SourceError, match=r"column 'c' is a list .*expected a list of texts"):
        read_landing(spark, source, NIGHT, initial=True)
