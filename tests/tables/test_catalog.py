"""The catalogue: one slice a write, nothing committed without a change, named errors before
writing."""

from __future__ import annotations

import json
import threading
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.errors import (
    ConcurrentWriteError,
    ConfigError,
    KeyViolationError,
    RecsparkError,
    SchemaError,
    TableNotFoundError,
    VersionNotFoundError,
)
from recspark.tables.catalog import TableCatalog
from recspark.tables.rows import slice_condition
from recspark.tables.snapshot import active_files, changed_rows
from recspark.tables.specs import SPECS
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


def test_reading_what_is_not_there_is_named(spark: SparkSession, catalog: TableCatalog) -> None:
    with pytest.raises(TableNotFoundError, match=r"Did you mean 'events'"):
        catalog.read("event", 0)
    with pytest.raises(TableNotFoundError, match="does not exist"):
        catalog.read("events", 0)
    written = catalog.replace_slice("events", events(spark, [("a", D1)]), {"ingest_date": D1})
    with pytest.raises(VersionNotFoundError, match="no version 99"):
        catalog.read("events", 99)
    assert catalog.read("sessions", None).count() == 0
    assert written.rows == 1


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
    with pytest.raises(KeyViolationError, match="2 rows share 1 values of user_idx"):
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
