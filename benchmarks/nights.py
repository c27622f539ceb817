"""Nights in turn on the bundled data: what a new day costs, and that it ends like a rebuild.

The nights of 2010-12-01 to 2010-12-09, up to the features; then the last one once more with everything
but events, dictionaries and catalogue made again. Sessions, histories and features must be
equal, row for row.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from benchmarks import machine
from recspark.config.load import load_config
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, open_night

DERIVED = ("sessions", "histories", "user_features", "item_features")
LAST = date(2010, 12, 9)


def run(*, smoke: bool) -> None:
    """Print and write seconds, rows and files of each night."""
    days = [LAST - timedelta(days=n) for n in reversed(range(1 if smoke else 9))]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "turn"
        source = [f"source.path={sliced(folder)}"] if smoke else []
        nights = [prepare(root, day, *source) for day in days]
        context = nights[-1][0]
        again = Path(folder) / "again"
        shutil.copytree(root, again)
        for table in DERIVED:
            shutil.rmtree(again / "tables" / table)
        rebuilt, seconds = prepare(again, LAST, *source, force=True)
        same = {t: differing(of_night(context, t), of_night(rebuilt, t)) for t in DERIVED}
        figures = {
            "nights": [describe(night, seconds) for night, seconds in nights],
            "rebuild": {"night": str(LAST), "seconds": seconds},
            "differing_rows": same,
        }
        context.spark.stop()
    print("rows that differ from a rebuild:", same)
    if not smoke:
        machine.write("nights", "python -m benchmarks nights", figures)


def sliced(folder: str) -> str:
    """Write a twentieth of the customers, since October; return the file."""
    source = load_config("local").source.path
    rows = pd.read_parquet(source)
    kept = (rows["Customer ID"] % 20 == 0) & (rows["InvoiceDate"] >= "2010-10-01")
    path = f"{folder}/slice.parquet"
    rows[kept].to_parquet(path)
    return path


def prepare(
    root: Path, day: date, *more: str, **options: bool
) -> tuple[RunContext, dict[str, float]]:
    """Run the stages up to the features; return the context and the seconds of each."""
    context = open_night(
        "local", day, [f"paths.root={root}", "evaluate.horizon_days=15", *more], **options
    )
    seconds = {}
    for stage in STAGES[:3]:
        begun = time.perf_counter()
        execute(context, stage)
        seconds[stage.name] = round(time.perf_counter() - begun, 1)
    return context, seconds


def describe(context: RunContext, seconds: dict[str, float]) -> dict[str, Any]:
    """Return one night's line of the report, printed too."""
    events = context.runlog.find("ingest")
    assert events is not None
    files = {t: context.catalog.size(t)["files"] for t in ("events", "sessions", "histories")}
    line = {
        "night": str(context.run_date),
        "events": events.rows_out,
        "seconds": seconds,
        "files": files,
    }
    print(line, flush=True)
    return line


def of_night(context: RunContext, table: str) -> DataFrame:
    """Return the night's rows of a table, maps as text so that rows can be compared."""
    rows = context.catalog.read(table, context.catalog.version(table))
    if "cutoff" in rows.columns:
        rows = rows.where(F.col("cutoff") == F.lit(context.cutoffs.tonight))
    return rows.select(F.to_json(F.struct(*rows.columns)).alias("row"))


def differing(left: DataFrame, right: DataFrame) -> int:
    """Return how many rows only one side has, counted with repeats."""
    return left.exceptAll(right).count() + right.exceptAll(left).count()
