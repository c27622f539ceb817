"""The catalogue: one slice a write, nothing committed without a change, named errors before
writing."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from py4j.protocol import Py4JError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.errors import (
    ConcurrentWriteError,
    ConfigError,
    DamagedFileError,
    KeyViolationError,
    RecsparkError,
    SchemaError,
    TableNotFoundError,
    VersionNotFoundError,
)
from recspark.tables import commits
from recspark.tables.added_columns import ADDED_COLUMNS, with_added_names
from recspark.tables.catalog import TableCatalog
from recspark.tables.layout import laid_out
from recspark.tables.reader import TableReader
from recspark.tables.row_checks import count_checked, key_totals, slice_condition
from recspark.tables.snapshot import active_files, changed_rows
from recspark.tables.specs import SPECS, TableSpec
from tests.conftest import spark_conf

pytestmark = pytest.mark.spark
D1, D2 = date(2010, 12, 8), date(2010, 12, 9)


def events(spark: SparkSession, rows: list[tuple[str, date]], **over: Any) -> DataFrame:
    at = datetime(2010, 12, 8, 12, tzinfo=UTC)
    base = {"user_id": "u", "item_id": "i", "event_type": "purchase", "event_at": at, "value": 1.0}
    data = [
        tuple(
            {
                **dict.fromkeys(schema.EVENTS.names),
                **base,
                "event_id": e,
                "event_date": D1,
                "ingest_date": d,
                "attributes": {"a": "1"},
                **over,
            }.values()
        )
        for e, d in rows
    ]
    return spark.createDataFrame(data, schema.EVENTS)


def ids_of(frame: DataFrame) -> list[str]:
    return sorted(r["event_id"] for r in frame.collect())


def test_a_slice_is_replaced_and_the_others_stay(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    catalog.replace_slice("events", events(spark, [("a", D1), ("b", D1)]), {"ingest_date": D1})
    catalog.replace_slice("events", events(spark, [("c", D2)]), {"ingest_date": D2})
    after = catalog.replace_slice("events", events(spark, [("b", D1)]), {"ingest_date": D1})
    assert ids_of(catalog.read("events", after.version)) == ["b", "c"]
    assert ids_of(catalog.read("events", after.version - 1)) == ["a", "b", "c"]


def test_the_same_rows_again_commit_nothing(spark: SparkSession, catalog: TableCatalog) -> None:
    rows = events(spark, [("a", D1), ("b", D1)])
    first = catalog.replace_slice("events", rows, {"ingest_date": D1})
    again = catalog.replace_slice(
        "events", rows.orderBy("event_id", ascending=False), {"ingest_date": D1}
    )
    assert (again.version, again.changed) == (first.version, False)
    changed = events(spark, [("a", D1), ("b", D1)], value=2.0)
    assert catalog.replace_slice("events", changed, {"ingest_date": D1}).changed
    other_map = events(spark, [("a", D1), ("b", D1)], value=2.0, attributes={"a": "2"})
    assert catalog.replace_slice("events", other_map, {"ingest_date": D1}).changed


def test_an_empty_frame_clears_its_slice(spark: SparkSession, catalog: TableCatalog) -> None:
    catalog.replace_slice(
        "events", events(spark, [("a", D1), ("b", D2)]), {"ingest_date": [D1, D2]}
    )
    left = catalog.replace_slice("events", events(spark, []), {"ingest_date": D1})
    assert ids_of(catalog.read("events", left.version)) == ["b"]


def test_nothing_to_write_into_a_new_table(spark: SparkSession, catalog: TableCatalog) -> None:
    """A first landing without a bad row: quarantine is made, and stays empty."""
    nothing = events(spark, [])
    for _ in range(2):
        written = catalog.replace_slice("events", nothing, {"ingest_date": D1})
        assert (written.version, written.rows, written.changed) == (0, 0, False)
    noted = catalog.replace_slice("events", nothing, {"ingest_date": D1}, note={"events": 3})
    assert (noted.version, noted.changed) == (0, False)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda f: f.drop("item_id"), SchemaError, r"missing columns \['item_id'\]"),
        (lambda f: f.withColumn("x", f.user_id), SchemaError, r"unknown columns \['x'\]"),
        (lambda f: f.withColumn("value", f.user_id), SchemaError, "value is string, expected double"),
        (lambda f: f.unionByName(f), KeyViolationError, "more than once.*'event_id': 'a'"),
        (lambda f: f.withColumn("event_id", F.lit(None).cast("string")), KeyViolationError, "no event_id"),
        (lambda f: f.withColumn("ingest_date", f.ingest_date + 1), SchemaError, "outside the slice"),
    ],
)  # fmt: skip
def test_a_wrong_frame_is_refused_and_the_table_stays(
    spark: SparkSession, catalog: TableCatalog, change: Any, error: type[RecsparkError], says: str
) -> None:
    good = catalog.replace_slice("events", events(spark, [("z", D1)]), {"ingest_date": D1})
    with pytest.raises(error, match=says):
        catalog.replace_slice("events", change(events(spark, [("a", D1)])), {"ingest_date": D1})
    assert catalog.version("events") == good.version


def test_keys_with_one_hash_of_64_bits_cost_no_second_pass(spark: SparkSession) -> None:
    """Two keys with the same xxhash64 are counted in one job; the same key twice is still found."""
    pair, other = (1, 2), (3, colliding(1, 2, 3))
    spec = TableSpec("t", schema.columns(a=schema.LONG, b=schema.LONG), key=("a", "b"))
    rows = spark.createDataFrame([pair, other], spec.schema)
    assert rows.select(F.xxhash64("a", "b")).distinct().count() == 1
    tracker = spark.sparkContext.statusTracker()
    group = uuid.uuid4().hex
    spark.sparkContext.setJobGroup(group, "keys are counted")
    try:
        with spark_conf(spark, {"spark.sql.adaptive.enabled": "false"}):  # a job is a pass
            assert count_checked(spec, rows, {}) == 2
            assert len(tracker.getJobIdsForGroup(group)) == 1
            with pytest.raises(KeyViolationError, match="'a': 1, 'b': 2} 2 times"):
                count_checked(spec, rows.unionByName(rows.where("a = 1")), {})
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]


def test_a_write_shuffles_its_rows_once(spark: SparkSession) -> None:
    """The check of keys shuffles hashes, a count and a truth value; the layout shuffles the rows."""
    spec = SPECS["events"]
    rows = events(spark, [("a", D1), ("b", D1)])
    checked_keys = shuffled_columns(key_totals(spec, rows, {"ingest_date": D1}))
    assert [len(columns) for columns in checked_keys] == [4]
    assert not {column.split("#")[0] for column in checked_keys[0]} & {*schema.EVENTS.names}
    of_layout = shuffled_columns(laid_out(spec, rows, n_rows=10**8))
    assert [len(columns) for columns in of_layout] == [len(schema.EVENTS)]


def shuffled_columns(rows: DataFrame) -> list[list[str]]:
    """Return the columns of each shuffle of a plan; that of one row per task, for a sum, is no shuffle."""
    with spark_conf(rows.sparkSession, {"spark.sql.adaptive.enabled": "false"}):
        plan = rows._jdf.queryExecution().executedPlan()
    found, nodes = [], [plan]
    while nodes:
        node = nodes.pop()
        nodes += [node.children().apply(n) for n in range(node.children().size())]
        is_for_a_sum = "SinglePartition" in node.simpleString(100)
        if node.nodeName() == "Exchange" and not is_for_a_sum:
            columns = node.output()
            found.append([str(columns.apply(n).toString()) for n in range(columns.size())])
    return found[::-1]


def colliding(a: int, b: int, other_a: int) -> int:
    """Return the number with which `other_a` has the xxhash64 of (a, b).

    Spark hashes `a` with the seed 42, and `b` with that hash as its seed. Of a bigint x and a seed,
    xxhash64 is a one-to-one function of (seed + P5 + 8) xor f(x), and f can be inverted.
    """
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5, mask = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, (1 << 64) - 1

    def rotated(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & mask

    def mixed(x: int) -> int:
        return rotated(x * p2 & mask, 31) * p1 & mask

    def seed_of(x: int) -> int:
        value = rotated((42 + p5 + 8) ^ mixed(x), 27) * p1 + p4 & mask
        value = (value ^ value >> 33) * p2 & mask
        value = (value ^ value >> 29) * p3 & mask
        return value ^ value >> 32

    start, other_start = ((seed_of(x) + p5 + 8) & mask for x in (a, other_a))
    product = start ^ mixed(b) ^ other_start
    rotation = product * pow(p1, -1, 1 << 64) & mask
    found = rotated(rotation, 33) * pow(p2, -1, 1 << 64) & mask
    return found - (1 << 64) if found >> 63 else found


def test_reading_what_is_not_there_is_named(spark: SparkSession, catalog: TableCatalog) -> None:
    with pytest.raises(TableNotFoundError, match=r"Did you mean 'events'"):
        catalog.read("event", 0)
    with pytest.raises(TableNotFoundError, match="does not exist"):
        catalog.read("events", 0)
    written = catalog.replace_slice("events", events(spark, [("a", D1)]), {"ingest_date": D1})
    with pytest.raises(VersionNotFoundError, match="no version 99"):
        catalog.read("events", 99)
    assert catalog.read("sessions", None).count() == 0
    with pytest.raises(ConcurrentWriteError, match=r"'events' is at version 0, .* not there"):
        catalog.read("events", None)
    assert written.rows == 1


def test_a_table_of_an_earlier_version_is_named(spark: SparkSession, catalog: TableCatalog) -> None:
    old = spark.createDataFrame([("a", "no user")], "source string, reason string")
    old.write.format("delta").save(catalog.path("quarantine"))
    with pytest.raises(
        SchemaError, match=r"'quarantine' has no column .*row_id.*Delete the folder"
    ):
        catalog.read("quarantine", 0)


def test_a_table_from_before_a_column_is_read_and_written(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    """Earlier rows have the value that the column stands for; no earlier file is written again."""

    def lists(night: date, name: str, *users: str) -> DataFrame:
        row = {
            **dict.fromkeys(schema.RECOMMENDATIONS.names),
            "run_date": night,
            "list": name,
            "rank": 1,
        }
        rows = [{**row, "user_id": user, "item_id": "i", "score": 0.5} for user in users]
        return spark.createDataFrame(rows, schema.RECOMMENDATIONS)

    added = [column.name for column in ADDED_COLUMNS["recommendations"]]
    old = lists(D1, "dropped", "a", "b").drop(*added)
    writer = old.write.format("delta").partitionBy("run_date")
    writer.save(catalog.path("recommendations"))
    assert {r["list"] for r in catalog.read("recommendations", 0).collect()} == {"main"}
    files = {path.name for path in Path(catalog.path("recommendations")).rglob("*.parquet")}

    night = {"run_date": D2}
    both = lists(D2, "main", "a").unionByName(lists(D2, "again", "a", "c"))
    written = catalog.replace_slice("recommendations", both, night)
    assert written.version == 1
    assert not catalog.replace_slice("recommendations", both, night).changed
    rows = catalog.read("recommendations", 1)
    assert rows.columns == schema.RECOMMENDATIONS.names
    found = sorted((r["run_date"], r["list"], r["user_id"]) for r in rows.collect())
    assert found == [
        (D1, "main", "a"), (D1, "main", "b"), (D2, "again", "a"), (D2, "again", "c"), (D2, "main", "a"),
    ]  # fmt: skip
    assert files < {path.name for path in Path(catalog.path("recommendations")).rglob("*.parquet")}
    # The same rows without Spark, by a condition on the column too.
    reader = TableReader(catalog.root)
    assert sorted(map(str, reader.rows("recommendations", []))) == sorted(
        str(row.asDict()) for row in rows.collect()
    )
    of_main = reader.rows("recommendations", [("list", "=", "main")], ["user_id"])
    assert sorted(row["user_id"] for row in of_main) == ["a", "a", "b"]


def test_added_columns_are_those_of_the_specs() -> None:
    for table, columns in ADDED_COLUMNS.items():
        names = SPECS[table].schema.names
        assert with_added_names(names, table) == names
        for column in columns:
            assert SPECS[table].schema[column.name].dataType.jsonValue() == column.type


def test_a_write_with_empty_partitions_is_no_damage(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    """Delta counts the file of a partition without rows, and leaves it out."""
    rows = events(spark, [("a", D1)]).repartition(8)
    catalog.replace_slice("events", rows, {"ingest_date": D1}, n_files=8)
    again = TableCatalog(catalog.spark, catalog.root)
    assert again.count("events", again.version("events")) == 1


def test_insert_only_rows_never_change(spark: SparkSession, catalog: TableCatalog) -> None:
    def rows(*pairs: tuple[str, int]) -> DataFrame:
        return spark.createDataFrame([(n, i, D1) for n, i in pairs], schema.USER_IDS)

    first = catalog.insert_new("user_ids", rows(("a", 0)), None)
    second = catalog.insert_new("user_ids", rows(("a", 7), ("b", 1)), first.version)
    assert second.rows == 1
    found = {
        r["user_id"]: r["user_idx"] for r in catalog.read("user_ids", second.version).collect()
    }
    assert found == {"a": 0, "b": 1}
    with pytest.raises(ConcurrentWriteError, match="computed from"):
        catalog.insert_new("user_ids", rows(("c", 2)), first.version)
    with pytest.raises(KeyViolationError, match=r"user_idx 2 \(2 times\) stands for"):
        catalog.insert_new("user_ids", rows(("c", 2), ("d", 2)), second.version)
    assert catalog.version("user_ids") == second.version


def test_two_writers_of_a_new_dictionary_give_no_number_twice(
    spark: SparkSession, catalog: TableCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first has committed: both begin to count at 0."""
    first = spark.createDataFrame([("a", 0, D1)], schema.USER_IDS)
    catalog.insert_new("user_ids", first, None)
    look, looks = TableCatalog.version, iter([None])
    monkeypatch.setattr(TableCatalog, "version", lambda self, table: next(looks, look(self, table)))
    with pytest.raises(ConcurrentWriteError, match="at version 0, .* from None"):
        catalog.insert_new("user_ids", spark.createDataFrame([("b", 0, D1)], schema.USER_IDS), None)
    assert catalog.read("user_ids", catalog.version("user_ids")).count() == 1


def test_two_appends_to_a_new_table_leave_both(
    spark: SparkSession, catalog: TableCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.append("events", events(spark, [("a", D1)]))
    look, looks = TableCatalog.version, iter([None])
    monkeypatch.setattr(TableCatalog, "version", lambda self, table: next(looks, look(self, table)))
    catalog.append("events", events(spark, [("b", D1)]))
    assert ids_of(catalog.read("events", catalog.version("events"))) == ["a", "b"]


def test_two_writers_of_one_slice_leave_one_of_their_contents(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    catalog.create("events")
    outcome: list[str] = []

    def write(name: str) -> None:
        rows = events(spark, [(f"{name}{n}", D1) for n in range(50)])
        try:
            catalog.replace_slice("events", rows, {"ingest_date": D1})
            outcome.append("ok")
        except ConcurrentWriteError:
            outcome.append("refused")

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "ok" in outcome
    left = ids_of(catalog.read("events", catalog.version("events")))
    assert len(left) == 50
    assert len({name[0] for name in left}) == 1


def test_two_writers_of_a_new_table_leave_both_slices(
    spark: SparkSession, catalog: TableCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first has committed, and finds no table."""
    catalog.replace_slice("events", events(spark, [("a", D1)]), {"ingest_date": D1})
    look, looks = TableCatalog.version, iter([None])
    monkeypatch.setattr(TableCatalog, "version", lambda self, table: next(looks, look(self, table)))
    second = catalog.replace_slice("events", events(spark, [("b", D2)]), {"ingest_date": D2})
    assert second.changed
    assert ids_of(catalog.read("events", second.version)) == ["a", "b"]


Write = Callable[[TableCatalog, SparkSession, int | None], object]


def users(spark: SparkSession, *pairs: tuple[str, int]) -> DataFrame:
    return spark.createDataFrame([(name, number, D1) for name, number in pairs], schema.USER_IDS)


def insert(catalog: TableCatalog, spark: SparkSession, seen: int | None) -> object:
    return catalog.insert_new("user_ids", users(spark, ("mine", 1)), seen)


def replace_day(catalog: TableCatalog, spark: SparkSession, seen: int | None) -> object:
    rows = events(spark, [("mine", D1)])
    return catalog.replace_slice("events", rows, {"ingest_date": D1}, expected=seen)


def replace_own_day(catalog: TableCatalog, spark: SparkSession, seen: int | None) -> object:
    rows = events(spark, [("mine", D1)])
    return catalog.replace_slice(
        "events", rows, {"ingest_date": D1}, expected=seen, any_commit_conflicts=False
    )


@pytest.mark.parametrize(
    ("table", "write", "first", "other", "refused"),
    [
        ("user_ids", insert, [("a", 0)], [("theirs", 1)], True),
        ("events", replace_day, [("a", D1)], [("theirs", D1)], True),
        ("events", replace_day, [("a", D1)], [("theirs", D2)], True),
        ("events", replace_own_day, [("a", D1)], [("theirs", D1)], True),
        ("events", replace_own_day, [("a", D1)], [("theirs", D2)], False),
    ],
)  # fmt: skip
def test_what_another_commits_in_between_is_never_taken_for_known(
    spark: SparkSession,
    catalog: TableCatalog,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    write: Write,
    first: list[Any],
    other: list[Any],
    *,
    refused: bool,
) -> None:
    """The other commits after every look of this writer, right before its transaction begins."""

    def put(rows: list[Any]) -> int:
        if table == "user_ids":
            version = catalog.version(table)
            return catalog.insert_new(table, users(spark, *rows), version).version
        where = {"ingest_date": rows[0][1]}
        return catalog.replace_slice(table, events(spark, rows), where).version

    seen = put(first)
    real = commits.write

    def write_after_the_other(*args: Any, **options: Any) -> int | None:
        monkeypatch.setattr(commits, "write", real)
        put(other)
        return real(*args, **options)

    monkeypatch.setattr(commits, "write", write_after_the_other)
    if refused:
        with pytest.raises(ConcurrentWriteError):
            write(catalog, spark, seen)
    else:
        write(catalog, spark, seen)
    now = catalog.version(table)
    assert now == seen + (1 if refused else 2)
    key = SPECS[table].key[0]
    names = [row[key] for row in catalog.read(table, now).collect()]
    assert ("theirs" in names, "mine" in names) == (True, not refused)
    assert len(names) == len(set(names))


def test_an_integer_given_twice_long_ago_is_found(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    """Sums, sums of squares and of cubes of 0 … 11 are these numbers' too."""
    numbers = [1, 1, 2, 2, 3, 5, 6, 8, 9, 9, 10, 10]
    catalog.append("user_ids", users(spark, *[(f"u{n}", i) for n, i in enumerate(numbers)]))
    with pytest.raises(KeyViolationError, match=r"user_idx 1 \(2 times\), 2 \(2 times\), 9"):
        catalog.insert_new("user_ids", users(spark, ("new", 12)), catalog.version("user_ids"))
    assert catalog.version("user_ids") == 0


def test_a_commit_that_is_followed_by_an_error_is_one_commit(
    spark: SparkSession, catalog: TableCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that answers too late, a hook that fails: the log says that the rows are there."""
    real = commits.write

    def fail_afterwards(*args: Any, **options: Any) -> int | None:
        real(*args, **options)
        raise Py4JError("the answer was lost")

    monkeypatch.setattr(commits, "write", fail_afterwards)
    assert catalog.append("runs", run_row(spark), "a run's stage")
    assert catalog.append("runs", run_row(spark, "other"), "another run's stage")
    written = catalog.replace_slice("events", events(spark, [("a", D1)]), {"ingest_date": D1})
    again = catalog.replace_slice("events", events(spark, [("b", D1)]), {"ingest_date": D1})
    given = catalog.insert_new("user_ids", users(spark, ("a", 0)), None)
    more = catalog.insert_new("user_ids", users(spark, ("b", 1)), given.version)
    assert [w.version for w in (written, again, given, more)] == [0, 1, 0, 1]
    for table, rows in (("runs", 2), ("events", 1), ("user_ids", 2)):
        assert catalog.count(table, catalog.version(table)) == rows, table


def run_row(spark: SparkSession, run_id: str = "run") -> DataFrame:
    at = datetime(2024, 5, 30, tzinfo=UTC)
    row = (run_id, D1, "train", "ease", {}, {}, "{}", "code", "{}", 0, 0, 0.0, 0.0, "ok", at, at)
    return spark.createDataFrame([row], schema.RUNS)


def test_what_is_committed_once_is_there_once(spark: SparkSession, catalog: TableCatalog) -> None:
    """Two processes end the same stage of the same run at the same moment, and two others."""
    catalog.create("runs")
    outcome: list[tuple[str, bool]] = []

    def end(name: str) -> None:
        own = TableCatalog(spark, catalog.root)
        outcome.append((name, own.append("runs", run_row(spark, name), name)))

    threads = [threading.Thread(target=end, args=(name,)) for name in ("a", "a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome) == [("a", False), ("a", True), ("b", True), ("c", True)]
    rows = catalog.read("runs", catalog.version("runs")).collect()
    assert sorted(row["run_id"] for row in rows) == ["a", "b", "c"]


def test_a_restore_brings_back_the_note_of_what_it_restores(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    for number in range(3):
        rows = events(spark, [(f"e{n}", D1) for n in range(number + 1)])
        catalog.replace_slice("events", rows, {"ingest_date": D1}, note={"number": number})
    first, newest = (catalog.identity("events", v) for v in (0, 2))
    assert catalog.note("events", 2)["number"] == 2
    assert catalog.extends("events", 2, first)

    def restore(version: int) -> int:
        spark.sql(f"RESTORE delta.`{catalog.path('events')}` TO VERSION AS OF {version}")
        return catalog.version("events") or 0

    assert catalog.note("events", restore(1))["number"] == 1
    assert catalog.extends("events", 3, first)
    assert not catalog.extends("events", 3, newest)
    assert catalog.note("events", restore(0))["number"] == 0
    assert catalog.note("events", restore(2))["number"] == 2  # and forward again
    assert catalog.extends("events", 5, newest)
    other = TableCatalog(spark, catalog.root.replace("tables", "others"))
    for number in range(3):
        other.replace_slice("events", events(spark, [(f"e{number}", D1)]), {"ingest_date": D1})
    assert not other.extends("events", 2, first)


def test_a_log_file_cut_short_is_named(spark: SparkSession, catalog: TableCatalog) -> None:
    """At each of its line ends, in the middle of a line, and empty."""
    for day in (D1, D2):
        rows = events(spark, [("a", D1), ("b", D2)])
        catalog.replace_slice("events", rows, {"ingest_date": [D1, D2]}, note={"day": str(day)})
        catalog.replace_slice("events", events(spark, [("c", day)]), {"ingest_date": [D1, D2]})
    newest = catalog.version("events")
    file = Path(catalog.path("events")) / "_delta_log" / f"{newest:020d}.json"
    whole = file.read_bytes()
    ends = [n for n, byte in enumerate(whole) if byte == ord("\n")][:-1]
    assert len(ends) >= 3  # commitInfo, one file added, two removed
    for length in (0, 1, len(whole) // 2, len(whole) - 3, *ends, *[end + 1 for end in ends]):
        file.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match=rf"'events': its log file {file.name}"):
            TableCatalog(spark, catalog.root).version("events")
    file.write_bytes(whole)
    assert TableCatalog(spark, catalog.root).count("events", newest) == 1


def test_what_a_recorded_version_lacks_is_said(spark: SparkSession, catalog: TableCatalog) -> None:
    both = events(spark, [("a", D1), ("b", D2)])
    version = catalog.replace_slice("events", both, {"ingest_date": [D1, D2]}).version
    table = Path(catalog.path("events"))
    (first,), (second,) = (list(table.glob(f"ingest_date={day}/*.parquet")) for day in (D1, D2))

    def lost(version: int, day: date, **options: bool) -> str | None:
        return TableCatalog(spark, catalog.root).lost(
            "events", version, {"ingest_date": day}, **options
        )

    assert lost(version, D1, must_have_rows=True) is None
    assert lost(version, date(2020, 2, 2)) is None
    assert "no rows of" in (lost(version, date(2020, 2, 2), must_have_rows=True) or "")
    assert "no version 7" in (lost(7, D1) or "")
    data = first.read_bytes()
    first.write_bytes(data[:-1])
    assert f"has {len(data) - 1:,} bytes" in (lost(version, D1) or "")
    assert lost(version, D2) is None
    second.unlink()
    assert "is not there" in (lost(version, D2) or "")
    shutil.rmtree(table)
    assert "is gone" in (lost(version, D1) or "")


def test_changed_rows_are_those_of_only_one_version(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    v1 = catalog.replace_slice(
        "events", events(spark, [("a", D1), ("b", D1)]), {"ingest_date": D1}
    ).version
    catalog.replace_slice("events", events(spark, [("c", D2)]), {"ingest_date": D2})
    v3 = catalog.replace_slice(
        "events", events(spark, [("b", D1), ("d", D1)]), {"ingest_date": D1}
    ).version
    changes = {
        (r["event_id"], r["is_added"]) for r in changed_rows(catalog, "events", v1, v3).collect()
    }
    assert changes == {("a", False), ("c", True), ("d", True)}
    assert {r["event_id"] for r in changed_rows(catalog, "events", None, v1).collect()} == {
        "a",
        "b",
    }
    assert changed_rows(catalog, "events", v3, v3).count() == 0


def test_active_files_are_those_of_the_version(spark: SparkSession, catalog: TableCatalog) -> None:
    v1 = catalog.replace_slice("events", events(spark, [("a", D1)]), {"ingest_date": D1}).version
    v2 = catalog.replace_slice("events", events(spark, [("b", D1)]), {"ingest_date": D1}).version
    assert len(active_files(catalog, "events", v1)) == 1
    assert active_files(catalog, "events", v1) != active_files(catalog, "events", v2)


def test_files_of_one_slice_need_deltas_skipping(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    catalog.replace_slice("events", events(spark, [("a", D1)]), {"ingest_date": D1})
    v = catalog.replace_slice("events", events(spark, [("b", D2)]), {"ingest_date": D2}).version
    condition = slice_condition({"ingest_date": D2})
    assert len(active_files(catalog, "events", v, condition)) == 1
    with spark_conf(spark, {"spark.databricks.delta.stats.skipping": "false"}):
        with pytest.raises(ConfigError, match=r"stats\.skipping = false: .* table 'events'"):
            active_files(catalog, "events", v, condition)
        assert len(active_files(catalog, "events", v)) == 2


def test_every_table_is_created_at_reader_version_1(catalog: TableCatalog) -> None:
    for name in SPECS:
        catalog.create(name)
        log = Path(catalog.path(name)) / "_delta_log" / f"{0:020d}.json"
        actions = [json.loads(line) for line in log.read_text().splitlines()]
        assert [a["protocol"]["minReaderVersion"] for a in actions if "protocol" in a] == [1], name


def test_quotes_in_a_slice_are_harmless(spark: SparkSession, catalog: TableCatalog) -> None:
    row = (datetime(2010, 1, 1), 15, "it's", "novel", "ndcg", 0, "{}", 0.5, True, 1.0)
    frame = spark.createDataFrame([row], schema.TUNING)
    catalog.replace_slice("tuning", frame, {"model": "it's"})
    assert catalog.read("tuning", catalog.version("tuning")).count() == 1


def test_a_commit_of_a_file_without_rows_is_whole(
    spark: SparkSession, catalog: TableCatalog
) -> None:
    """Delta counts the file that a task without rows writes, and leaves it out."""
    rows = spark.sparkContext.parallelize([("a", 0, D1), ("b", 6, D1)], 2)
    users_of_two_tasks = spark.createDataFrame(rows, schema.USER_IDS)
    users_of_two_tasks.write.format("delta").save(catalog.path("user_ids"))
    only_the_second = users_of_two_tasks.where("user_idx > 5")
    only_the_second.write.format("delta").mode("append").save(catalog.path("user_ids"))
    log = Path(catalog.path("user_ids")) / "_delta_log" / f"{1:020d}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    (written,) = [action["commitInfo"] for action in actions if "commitInfo" in action]
    assert written["operationMetrics"]["numFiles"] == "2"
    assert sum("add" in action for action in actions) == 1
    assert catalog.version("user_ids") == 1
