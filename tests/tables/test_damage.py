"""The file that a Spark job stumbled over is named, whatever the job was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark.errors import SourceError
from recspark.tables.damage import unreadable_file_error

pytestmark = pytest.mark.spark

ACTIONS: dict[str, Callable[[DataFrame, Path], object]] = {
    "collect": lambda rows, _: rows.where("id > 3").collect(),
    "arrow": lambda rows, _: rows.toArrow(),
    "python": lambda rows, _: rows.mapInArrow(lambda batches: batches, "id long").count(),
    "write": lambda rows, to: rows.write.parquet(str(to)),
}


@pytest.mark.parametrize("missing", [False, True], ids=["torn", "missing"])
def test_the_file_is_named(spark: SparkSession, tmp_path: Path, *, missing: bool) -> None:
    table = tmp_path / "lake of tables" / "events"
    spark.range(1000).repartition(1).write.format("delta").save(str(table))
    (file,) = table.glob("*.parquet")
    (table / f".{file.name}.crc").unlink()
    if missing:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:500])
    rows = spark.read.format("delta").load(str(table))
    for action in ACTIONS.values():
        with pytest.raises(Exception, match="FAILED_READ_FILE") as failed:
            action(rows, tmp_path / "out")
        inside = unreadable_file_error(failed.value, f"file://{table.parent}")
        what = "is not there" if missing else "is torn"
        assert str(inside).startswith(f"table 'events': its file {file.name} {what}")
        outside = unreadable_file_error(failed.value, f"{tmp_path}/elsewhere")
        assert file.name in str(outside)
        assert isinstance(outside, SourceError)
        assert "Deliver it again" in str(outside)


def test_other_errors_are_left_alone(spark: SparkSession) -> None:
    with pytest.raises(Exception, match="DIVIDE_BY_ZERO") as failed:
        spark.sql("SELECT 1 / (id - id) FROM range(3)").collect()
    assert unreadable_file_error(failed.value, "/lake") is None
