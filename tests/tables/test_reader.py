"""Tables read without Spark: only the files that a question needs, and errors with names."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from arro3.core import Table
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark.errors import DamagedFileError, TableNotFoundError
from recspark.tables.reader import TableReader, is_readable_without_spark

NIGHTS = [date(2024, 5, 30), date(2024, 5, 31)]
# Ids as shops have them, and as nobody should: quotes, comments of SQL, patterns, backslashes.
IDS = [
    "13085",
    "O'Neill",
    "x' OR '1'='1",
    '"',
    "%",
    "_",
    "\\",
    "a--b",
    " 1",
    "1",
    "",
    "\n",
    "é",
    "/*",
]


def write(folder: Path, nights: list[date], ids: list[str]) -> None:
    """Write a table `recommendations` of one row for each night and id."""
    rows = [(night, user) for night in nights for user in ids]
    table = pa.table(
        {
            "run_date": pa.array([n for n, _ in rows], pa.date32()),
            "user_id": pa.array([u for _, u in rows], pa.string()),
            "at": pa.array([datetime(2024, 5, 30, 12, tzinfo=UTC)] * len(rows)),
            "about": pa.array([[("k", u)] for _, u in rows], pa.map_(pa.string(), pa.string())),
        }
    )
    path = folder / "recommendations"
    write_deltalake(path, Table.from_arrow(table), partition_by=["run_date"], mode="append")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights of the ids, in a folder whose name is no pattern."""
    folder = tmp_path_factory.mktemp("tables")
    write(folder, NIGHTS, IDS)
    return folder.rename(folder.with_name("a [b] {c} #?é d"))


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.sampled_from(IDS), st.text(max_size=8).filter(lambda t: "\0" not in t)))
def test_an_id_is_a_value_whatever_it_holds(root: Path, user: str) -> None:
    reader = TableReader(str(root))
    found = reader.rows(
        "recommendations", [("run_date", "=", NIGHTS[0]), ("user_id", "=", user)], ["user_id"]
    )
    assert found == [{"user_id": user}] * (user in IDS)
    several = reader.rows("recommendations", [("user_id", "in", [user, "13085"])], ["user_id"])
    assert {row["user_id"] for row in several} == {user, "13085"} & {*IDS}


def test_values_are_those_of_sparks_rows(root: Path) -> None:
    reader = TableReader(str(root))
    noon = datetime(2024, 5, 30, 12, tzinfo=UTC)
    where = [("run_date", "=", NIGHTS[0]), ("user_id", "=", "13085")]
    (row,) = reader.rows("recommendations", where)
    assert row == {
        "run_date": NIGHTS[0],
        "list": "main",
        "user_id": "13085",
        "at": noon.replace(tzinfo=None),
        "about": {"k": "13085"},
        "because": None,
        "rules": None,
    }
    assert reader.rows("recommendations", [*where, ("at", "<", noon)]) == []
    assert reader.nights("recommendations") == NIGHTS
    assert reader.nights("runs") == []
    (size,) = reader.sizes()
    assert (size["rows"], size["files"], size["version"]) == (2 * len(IDS), 2, 0)


def test_batches_hold_every_row_and_column(root: Path) -> None:
    reader = TableReader(str(root))
    schema, batches = reader.batches("recommendations")
    rows = pa.Table.from_batches(batches, schema)
    assert rows.column_names == [
        "run_date", "list", "user_id", "at", "about", "because", "rules",
    ]  # fmt: skip
    assert sorted(rows["user_id"].to_pylist()) == sorted([*IDS, *IDS])
    _, batches = reader.batches("recommendations", NIGHTS[1])
    tonight = pa.Table.from_batches(batches, schema)
    assert tonight["run_date"].to_pylist() == [NIGHTS[1]] * len(IDS)


def test_a_column_that_was_added_since_has_its_value_in_earlier_rows(tmp_path: Path) -> None:
    """Night 0 is of before the column, in a file without it; night 1 brings it, at the end."""
    write(tmp_path, NIGHTS[:1], ["a"])
    later = pa.table(
        {"run_date": pa.array(NIGHTS[1:], pa.date32()), "user_id": ["a"], "list": ["again"]}
    )
    write_deltalake(
        tmp_path / "recommendations", Table.from_arrow(later), mode="append", schema_mode="merge"
    )
    reader = TableReader(str(tmp_path))
    rows = reader.rows("recommendations", [("user_id", "=", "a")], ["run_date", "list"])
    assert {row["run_date"]: row["list"] for row in rows} == dict(zip(NIGHTS, ["main", "again"]))
    (row,) = reader.rows("recommendations", [("list", "=", "main")])
    names = [*row]
    assert names.index("list") == names.index("run_date") + 1
    schema, batches = reader.batches("recommendations")
    table = pa.Table.from_batches(batches, schema)
    assert table.column_names == names
    assert sorted(table["list"].to_pylist()) == ["again", "main"]


def test_a_night_of_a_table_that_is_not_kept_by_night(tmp_path: Path) -> None:
    table = pa.table({"run_date": pa.array(NIGHTS, pa.date32()), "user_id": ["a", "b"]})
    write_deltalake(tmp_path / "user_ids", Table.from_arrow(table))
    reader = TableReader(str(tmp_path))
    assert reader.nights("user_ids") == NIGHTS
    _, batches = reader.batches("user_ids", NIGHTS[1])
    assert [row["user_id"] for batch in batches for row in batch.to_pylist()] == ["b"]


def test_only_the_files_of_the_night_are_read(tmp_path: Path) -> None:
    write(tmp_path, NIGHTS, IDS)
    for file in (tmp_path / "recommendations").glob("run_date=2024-05-30/*.parquet"):
        file.unlink()
    reader = TableReader(str(tmp_path))
    where = [("run_date", "=", NIGHTS[1]), ("user_id", "=", "13085")]
    assert len(reader.rows("recommendations", where)) == 1
    assert sum(b.num_rows for b in reader.batches("recommendations", NIGHTS[1])[1]) == len(IDS)
    for read in (
        lambda: reader.rows("recommendations", [("run_date", "=", NIGHTS[0])]),
        lambda: list(reader.batches("recommendations")[1]),
    ):
        with pytest.raises(DamagedFileError, match="table 'recommendations'"):
            read()


@pytest.mark.parametrize("what", ["cut", "garbage", "empty"])
def test_damage_has_a_name(tmp_path: Path, what: str) -> None:
    write(tmp_path, NIGHTS, IDS)
    folder = tmp_path / "recommendations"
    for file in [*folder.rglob("*.parquet")]:
        content = file.read_bytes()
        file.write_bytes({"cut": content[:-50], "garbage": b"x" * 200, "empty": b""}[what])
    with pytest.raises(DamagedFileError, match="table 'recommendations'"):
        TableReader(str(tmp_path)).rows("recommendations", [])
    with pytest.raises(DamagedFileError, match=r"its file run_date=.*parquet"):
        list(TableReader(str(tmp_path)).batches("recommendations")[1])
    log = next((folder / "_delta_log").glob("*.json"))
    log.write_bytes({"cut": log.read_bytes()[:-50], "garbage": b"\xff{", "empty": b""}[what])
    with pytest.raises(DamagedFileError, match="its log"):
        TableReader(str(tmp_path)).rows("recommendations", [])


def test_a_table_that_is_not_there_has_a_name(root: Path, tmp_path: Path) -> None:
    with pytest.raises(TableNotFoundError, match="Did you mean 'recommendations'"):
        TableReader(str(root)).rows("recommendation", [])
    with pytest.raises(TableNotFoundError, match="run a night first"):
        TableReader(str(tmp_path)).rows("recommendations", [])
    assert TableReader(str(tmp_path / "none")).sizes() == []


def test_a_store_is_left_to_spark() -> None:
    assert is_readable_without_spark("build/demo")
    assert is_readable_without_spark("file:///build/demo")
    assert not is_readable_without_spark("s3a://lake/recspark")
    assert not is_readable_without_spark("/data/50%25")
