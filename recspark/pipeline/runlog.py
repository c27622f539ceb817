"""The `runs` table: what each stage of a night read, wrote and took."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Config, digest
from recspark.masking import mask_value
from recspark.pipeline.run import StageResult
from recspark.tables.catalog import TableCatalog, retried

# Tables that a run reads from earlier nights; their versions are pinned when the run begins.
PINNED = ("events", "sessions", "user_ids", "item_ids", "items", "histories", "recommendations")
OK = "ok"
FAILED = "failed"  # of a model's stage: what `detail` says
BEGIN = "begin"  # the stage name of the row that holds a run's pins


@dataclass(frozen=True)
class RunRow:
    """One row of `runs`, as far as a later stage needs it."""

    stage: str
    model: str
    inputs: dict[str, int]
    outputs: dict[str, int]
    code: str
    detail: dict[str, Any]
    rows_in: int
    rows_out: int
    status: str

    def reusable(self, inputs: Mapping[str, int], code: str) -> bool:
        """Return whether the stage would do the same work again."""
        return self.status == OK and self.inputs == dict(inputs) and self.code == code


class RunLog:
    """The rows of one run, read once by each process."""

    def __init__(self, catalog: TableCatalog, run_date: date, run_id: str) -> None:
        self.catalog = catalog
        self.run_date = run_date
        self.run_id = run_id
        self._rows: dict[tuple[str, str], RunRow] | None = None

    def rows(self) -> dict[tuple[str, str], RunRow]:
        """Return this run's rows by (stage, model), in the order they were written."""
        if self._rows is None:
            found = night_rows(self.catalog, self.run_date).where(F.col("run_id") == self.run_id)
            self._rows = {
                (r["stage"], r["model"]): RunRow(
                    r["stage"],
                    r["model"],
                    dict(r["inputs"] or {}),
                    dict(r["outputs"] or {}),
                    r["code"],
                    json.loads(r["detail"] or "{}"),
                    r["rows_in"],
                    r["rows_out"],
                    r["status"],
                )
                for r in found.orderBy("ended_at").collect()
            }
        return self._rows

    def find(self, stage: str, model: str = "") -> RunRow | None:
        """Return the row of one stage, None where it has not ended yet."""
        return self.rows().get((stage, model))

    def ended_well(self, stage: str, model: str = "") -> bool:
        """Return whether one stage has left its result in this run."""
        row = self.find(stage, model)
        return row is not None and row.status == OK

    def outputs(self, stages: Collection[str]) -> dict[str, int]:
        """Return table -> version as these stages of the run left it; of several the newest."""
        out: dict[str, int] = {}
        for row in self.rows().values():
            if row.stage in stages:
                for table, version in row.outputs.items():
                    out[table] = max(version, out.get(table, version))
        return out

    def record(
        self,
        *,
        stage: str,
        model: str,
        inputs: Mapping[str, int],
        result: StageResult,
        config: str,
        code: str,
        seconds: float,
        peak_memory_mb: float,
        started_at: datetime,
        status: str = OK,
    ) -> None:
        """Write the row of a stage that has ended; replaces an older one.

        A first row is appended, which conflicts with nobody, so models of a night may end at the
        same moment. `compact` makes one file of a night's rows.
        """
        known = self.find(stage, model) is not None
        row = (
            self.run_id,
            self.run_date,
            stage,
            model,
            dict(inputs),
            dict(result.outputs),
            config,
            code,
            json.dumps(mask_value(result.detail), sort_keys=True, default=str),
            result.rows_in,
            result.rows_out,
            round(seconds, 3),
            peak_memory_mb,
            status,
            started_at,
            datetime.now(UTC),
        )
        frame = self.catalog.spark.createDataFrame([row], schema.RUNS)
        if known:
            self._replace(frame)
        else:
            self.catalog.append("runs", frame)
        rows = self.rows()
        rows.pop((stage, model), None)
        rows[stage, model] = RunRow(
            stage,
            model,
            dict(inputs),
            dict(result.outputs),
            code,
            json.loads(json.dumps(result.detail, default=str)),
            result.rows_in,
            result.rows_out,
            status,
        )

    def _replace(self, row: DataFrame) -> None:
        """Put `row` in the place of the stage's row of before; models of a night may end at once."""
        retried(lambda: self.catalog.upsert("runs", row, {"run_date": self.run_date}))

    def compact(self) -> None:
        """Make one file of the night's rows."""
        self.catalog.compact("runs", {"run_date": self.run_date})


def night_rows(catalog: TableCatalog, run_date: date) -> DataFrame:
    """Return the rows of `runs` of one night, all its runs."""
    return catalog.read("runs", catalog.version("runs")).where(F.col("run_date") == F.lit(run_date))


def open_run(
    catalog: TableCatalog, config: Config, run_date: date, code: str, *, repin: bool
) -> tuple[str, dict[str, int], RunLog]:
    """Return run_id, pins and log of the night's run for `config`; begins it where there is none.

    A run begun before keeps its pins, so that a retry reads what the first try read; `repin` begins
    a new one with the versions of now. `run_id = hash(run_date, config, pins)`.
    """
    fingerprint = config.fingerprint()
    if not repin:
        begun = night_rows(catalog, run_date).where(F.col("stage") == BEGIN).orderBy("started_at")
        for row in reversed(begun.collect()):
            if json.loads(row["detail"])["config"] == fingerprint:
                return (
                    row["run_id"],
                    dict(row["outputs"] or {}),
                    RunLog(catalog, run_date, row["run_id"]),
                )
    pins = {t: v for t in PINNED if (v := catalog.version(t)) is not None}
    run_id = digest({"run_date": run_date.isoformat(), "config": fingerprint, "pins": pins})
    runlog = RunLog(catalog, run_date, run_id)
    if runlog.find(BEGIN) is None:
        now = datetime.now(UTC)
        runlog.record(
            stage=BEGIN,
            model="",
            inputs={},
            result=StageResult(pins, 0, 0, {"config": fingerprint}),
            config=config.resolved(),
            code=code,
            seconds=0.0,
            peak_memory_mb=0.0,
            started_at=now,
        )
    return run_id, pins, runlog
