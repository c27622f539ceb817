"""Exports: what other programs read is what the table holds, and nothing of others is removed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recspark.errors import ConfigError
from recspark.report.export import DONE, MARKER, Export, csv_lines

HARD = [
    'a"b',
    '"',
    " 1",
    "1 ",
    "\t1",
    "x\ny",
    "x\r\ny",
    "\r",
    "a,b",
    "\\",
    '\\"',
    "a\\",
    "#1",
    "",
    "é",
    "'",
]
TEXTS = st.one_of(
    st.none(), st.sampled_from(HARD), st.text(st.characters(codec="utf-8"), max_size=8)
)


def batch_of(ids: Sequence[str | None]) -> pa.RecordBatch:
    """Return rows of an id and a number."""
    numbers = pa.array([None if i % 3 == 2 else i / 7 for i in range(len(ids))], pa.float64())
    return pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.string()), numbers, pa.array(range(len(ids)), pa.int64())],
        ["user_id", "score", "n"],
    )


def exported(ids: Sequence[str | None], **options: bool) -> bytes:
    header = b'"user_id","score","n"\r\n'
    return header + csv_lines(batch_of(ids), **options)


def test_csv_holds_lists_as_json() -> None:
    rules = pa.array([["a", 'say "b"'], [], None], pa.list_(pa.string()))
    because = pa.array([[{"item": "x", "share": 0.5}], None, []])
    batch = pa.RecordBatch.from_arrays([rules, because], ["rules", "because"])
    rows = list(csv.reader(io.StringIO(csv_lines(batch).decode(), newline="")))
    assert rows == [
        ['["a", "say \\"b\\""]', '[{"item": "x", "share": 0.5}]'],
        ["[]", ""],
        ["", "[]"],
    ]


@settings(deadline=None, max_examples=150)
@given(st.lists(TEXTS, min_size=1, max_size=6))
@example(HARD)
def test_csv_is_read_back_by_python_and_polars(ids: list[str | None]) -> None:
    data = exported(ids)
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    assert [row["user_id"] for row in rows] == [i or "" for i in ids]
    assert [float(row["score"]) if row["score"] else None for row in rows] == [
        None if i % 3 == 2 else i / 7 for i in range(len(ids))
    ]
    if not any(i and "\0" in i for i in ids):
        frame = pl.read_csv(data, schema_overrides={"user_id": pl.String})
        assert frame["user_id"].to_list() == ids
        assert frame["n"].to_list() == list(range(len(ids)))


@given(st.text(st.characters(codec="utf-8"), max_size=6))
@example("=1+1")
@example(" =1+1")
@example("@SUM(A1)")
@example("-5")
@example("+49")
@example("\tx")
@example("\rx")
@example("＝1")
def test_no_cell_is_a_formula_where_that_was_asked_for(text: str) -> None:
    (row,) = csv.DictReader(io.StringIO(exported([text], neutral=True).decode(), newline=""))
    cell = row["user_id"]
    runs = text.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠"))
    if runs or text.startswith(("\t", "\r", "\n")):
        assert cell == f"'{text}"
    else:
        assert cell == text
    assert row["n"] == "0"  # numbers are no formulas, negative ones neither


def export(folder: Path, form: str = "csv", ids: Sequence[str | None] = HARD) -> Export:
    target = Export(str(folder), form)  # type: ignore[arg-type]
    target.check_target()
    target.begin({"table": "t"})
    batch = batch_of(ids)
    assert target.write(batch.schema, [batch, batch.slice(0, 0)], "00000") == len(ids)
    target.end()
    return target


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_an_export_is_replaced_by_the_next(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "lists"
    export(folder, form, ["old"])
    export(folder, form)
    assert {f.name for f in folder.iterdir()} >= {MARKER, DONE}
    (file,) = folder.glob("part-*")
    if form == "csv":
        read = pl.read_csv(file, schema_overrides={"user_id": pl.String})
    elif form == "parquet":
        read = pl.read_parquet(file)
    else:
        read = pl.DataFrame([json.loads(line) for line in file.read_text().split("\n") if line])
    assert read["user_id"].to_list() == HARD


def test_an_export_that_was_cut_off_is_replaced(tmp_path: Path) -> None:
    target = Export(str(tmp_path), "csv")
    target.begin({})
    batch = batch_of(["half"])
    target.write(batch.schema, [batch], "00000")
    assert not (tmp_path / DONE).exists()
    export(tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"_SUCCESS": "", "part-00000.csv": "raw"},  # a landing that Spark wrote
        {"part-0123456789ab-00000.csv": "raw"},
        {MARKER: "", "raw.csv": "raw"},
        {MARKER: "{}", "raw.csv": "raw"},
        {MARKER: '{"id": ".*"}', "raw.csv": "raw"},
        {MARKER: '{"id": "0123456789ab"}', "raw.csv": "raw"},
        {MARKER: '{"id": "0123456789ab"}', "part-0123456789ab-0/raw.csv": "raw"},
        {MARKER: '["id"]', ".hidden": "raw"},
    ],
)
def test_what_recspark_did_not_write_stays(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match="holds files that no export of recspark wrote"):
            Export(str(tmp_path), "csv").begin({})
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} == {*files}


def test_an_empty_table_gives_a_header(tmp_path: Path) -> None:
    export(tmp_path, "csv", [])
    (file,) = tmp_path.glob("part-*.csv")
    assert file.read_bytes() == b'"user_id","score","n"\r\n'
