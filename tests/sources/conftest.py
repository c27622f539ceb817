"""Small inputs for the tests of the sources."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from recspark.config import Source
from recspark.data.event_checks import check_events
from recspark.sources import read_landing

ROOT = Path(__file__).parents[2]
NIGHT = date(2024, 5, 31)


@pytest.fixture
def shared() -> Path:
    """The folder of the benchmark data, which never enters the repository."""
    folder = Path(os.environ.get("RECSPARK_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set RECSPARK_SHARED to the folder that holds data/")
    return folder


@pytest.fixture
def checked(spark: SparkSession) -> Callable[..., list[dict[str, Any]]]:
    """Read a landing, check it, and collect its rows as dicts, ordered by event_id."""

    def run(source: Source, night: date = NIGHT, *, initial: bool = True) -> list[dict[str, Any]]:
        landing = read_landing(spark, source, night, initial=initial)
        frame = check_events(
            landing.events,
            run_date=night,
            max_late_days=7,
            initial=initial,
            unique_ids=landing.unique_ids,
        )
        return rows_of(frame.drop("row_id"))  # it follows `row`

    return run


def rows_of(frame: DataFrame) -> list[dict[str, Any]]:
    rows = [row.asDict(recursive=True) for row in frame.collect()]
    return sorted(rows, key=lambda row: json.dumps(row, default=str, sort_keys=True))


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def write_text(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
