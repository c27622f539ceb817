"""The table `runs`: what each stage of a night read, wrote, and how long it took."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Config, digest
from recspark.errors import OpenRunError, SupersededRunError
from recspark.masking import mask_value
from recspark.tables.catalog import TableCatalog, retried

# Tables that a run reads from earlier nights; their versions are pinned when the run begins.
PINNED = ("events", "sessions", "user_ids", "item_ids", "items", "histories", "recommendations")
OK = "ok"
# Status of the row of a model whose stage failed (`detail` has the error), and of the row of a
# run's pins after a stage has ended the run by an error.
FAILED = "failed"
PUBLISH = "publish"  # the stage that ends a run
BEGIN = "begin"  # the stage name of the row that holds a run's pins


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves in its row of `runs`. `outputs`: table -> version that it left."""

    outputs: dict[str, int]
    rows_in: int
    rows_out: int
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRow:
    """One row of `runs`, with the columns that a later stage needs."""

    stage: str
    model: str
    inputs: dict[str, int]
    outputs: dict[str, int]
    code: str
    detail: dict[str, Any]
    rows_in: int
    rows_out: int
    status: str
    run_id: str

    def reusable(self, inputs: Mapping[str, int], code: str) -> bool:
        """Return whether the stage would do the same again with these inputs and this code."""
        return self.status == OK and self.inputs == dict(inputs) and self.code == code


class RunLog:
    """The rows of one run. Each process reads them once, and adds the rows that it writes."""

    def __init__(self, catalog: TableCatalog, run_date: date, run_id: str) -> None:
        self.catalog = catalog
        self.run_date = run_date
        self.run_id = run_id
        self._rows: dict[tuple[str, str], RunRow] | None = None
        # (stage, first night, last night) -> the rows that `ended` has read
        self._ended: dict[tuple[str, date, date], list[RunRow]] = {}
        self._others: list[RunRow] = []  # the rows of the night's other runs

    def rows(self) -> dict[tuple[str, str], RunRow]:
        """Return this run's rows by (stage, model), in the order they were written."""
        if self._rows is None:
            rows_of_night = night_rows(self.catalog, self.run_date).orderBy("ended_at").collect()
            rows = [_run_row(row) for row in rows_of_night]
            self._rows = {(row.stage, row.model): row for row in rows if row.run_id == self.run_id}
            self._others = [row for row in rows if row.run_id != self.run_id]
        return self._rows

    def elsewhere(self, stage: str, model: str = "") -> list[RunRow]:
        """Return the rows of one stage in the night's other runs, the newest first.

        They are as they were when this run's rows were first read.
        """
        self.rows()
        return [row for row in reversed(self._others) if (row.stage, row.model) == (stage, model)]

    def ended(self, stage: str, first: date, last: date, model: str) -> list[RunRow]:
        """Return the rows of one stage and model that ended well, of all runs of the nights `first`
        to `last`.

        The newest row comes first. Each process reads the rows of a span of nights once.
        """
        if (stage, first, last) not in self._ended:
            all_rows = self.catalog.read("runs", self.catalog.version("runs"))
            is_in_nights = F.col("run_date").between(F.lit(first), F.lit(last))
            rows = all_rows.where(
                is_in_nights & (F.col("stage") == stage) & (F.col("status") == OK)
            )
            newest_first = rows.orderBy(F.desc("ended_at")).collect()
            self._ended[stage, first, last] = [_run_row(row) for row in newest_first]
        return [row for row in self._ended[stage, first, last] if row.model == model]

    def find(self, stage: str, model: str = "") -> RunRow | None:
        """Return the row of one stage; None where the stage has not ended yet."""
        return self.rows().get((stage, model))

    def ended_well(self, stage: str, model: str = "") -> bool:
        """Return whether one stage has left a result in this run."""
        row = self.find(stage, model)
        return row is not None and row.status == OK

    def outputs(self, stages: Collection[str]) -> dict[str, int]:
        """Return table -> version, as these stages of the run left it; the newest where several
        wrote it.
        """
        newest_versions: dict[str, int] = {}
        for row in self.rows().values():
            if row.stage in stages:
                for table, version in row.outputs.items():
                    newest_versions[table] = max(version, newest_versions.get(table, version))
        return newest_versions

    def slices(self, table: str, stages: Collection[str]) -> dict[str, int]:
        """Return model -> version of `table`, as these stages left it for each model.

        Every model has its own slice of the table. The model "" is a stage that runs once.
        """
        rows = [row for row in self.rows().values() if row.stage in stages and table in row.outputs]
        return {row.model: row.outputs[table] for row in rows}

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
        """Write the row of a stage that has ended, replacing an older row of the stage.

        The first row of a stage is appended. An append conflicts with no other writer, so several
        models of a night may end at the same moment. Where two processes of one run end the same
        stage, the later row replaces the earlier one. `compact` puts the rows of a night into one
        file.
        """
        has_row = self.find(stage, model) is not None
        values = (
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
        frame = self.catalog.spark.createDataFrame([values], schema.RUNS)
        commit_name = f"{self.run_id} {stage} {model}"
        if has_row or not self.catalog.append("runs", frame, commit_name):
            self._replace(frame)
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
            self.run_id,
        )

    def _replace(self, row: DataFrame) -> None:
        """Replace the stage's earlier row by `row`; try again where another writer
        commits first.
        """
        retried(lambda: self.catalog.upsert("runs", row, {"run_date": self.run_date}))

    def begin(
        self, number: int, fingerprint: str, pins: dict[str, int], config: str, code: str
    ) -> bool:
        """Write the row that holds the run's pins.

        Return False where another process has begun a run with that number first.
        """
        begun_at = datetime.now(UTC)
        detail = json.dumps({"config": fingerprint, "number": number}, sort_keys=True)
        no_inputs: dict[str, int] = {}
        first_values = (
            self.run_id,
            self.run_date,
            BEGIN,
            "",
            no_inputs,
            pins,
            config,
            code,
            detail,
        )
        values = (*first_values, 0, 0, 0.0, 0.0, OK, begun_at, begun_at)
        frame = self.catalog.spark.createDataFrame([values], schema.RUNS)
        return self.catalog.append("runs", frame, f"{BEGIN} {self.run_date} {number}")

    def renumber(self, number: int) -> None:
        """Make this run, which was begun before, the newest of the night. It counts as not failed
        again.
        """
        detail = F.to_json(
            F.struct(
                F.get_json_object("detail", "$.config").alias("config"),
                F.lit(number).alias("number"),
            )
        )
        self._replace(self._pins_row().withColumns({"detail": detail, "status": F.lit(OK)}))

    def _pins_row(self) -> DataFrame:
        # The row that `begin` wrote: it holds the run's pins.
        is_of_this_run = (F.col("run_id") == self.run_id) & (F.col("stage") == BEGIN)
        return night_rows(self.catalog, self.run_date).where(is_of_this_run)

    def set_status(self, status: str) -> None:
        """Write whether the run goes on (`OK`) or was ended by an error (`FAILED`)."""
        self._replace(self._pins_row().withColumn("status", F.lit(status)))

    def compact(self) -> None:
        """Put the night's rows into one file."""
        self.catalog.compact("runs", {"run_date": self.run_date})


def night_rows(catalog: TableCatalog, run_date: date) -> DataFrame:
    """Return the rows of `runs` of all runs of one night."""
    return catalog.read("runs", catalog.version("runs")).where(F.col("run_date") == F.lit(run_date))


@dataclass(frozen=True)
class BegunRun:
    """One run of a night, as its rows in `runs` describe it.

    Parameters
    ----------
    number : 1 for the night's first run. A larger number means that the run began later, even where
        the clocks of the machines say otherwise
    fingerprint : digest of the run's settings
    pins : table -> version when the run began
    status : `FAILED` where a stage has ended the run by an error since, else `OK`
    started_at, published_at : microseconds since 1970: when the run began, and when its stage
        publish ended (None where it has not)
    last : the stage, or stage and model, of its newest row
    """

    run_id: str
    number: int
    fingerprint: str
    pins: dict[str, int]
    status: str
    started_at: int
    published_at: int | None
    last: str

    @property
    def is_open(self) -> bool:
        """Return whether the run has neither failed nor published yet."""
        return self.status != FAILED and self.published_at is None


def begun_runs(catalog: TableCatalog, run_date: date) -> list[BegunRun]:
    """Return the runs of a night, the one that began last at the end. Cost: one small job."""
    # Microseconds: `collect` would turn timestamps into the driver's time zone.
    started_micros, ended_micros = (
        F.unix_micros(column).alias(column) for column in ("started_at", "ended_at")
    )
    rows = (
        night_rows(catalog, run_date)
        .select(
            "run_id", "stage", "model", "outputs", "detail", "status", started_micros, ended_micros
        )
        .orderBy("ended_at")
        .collect()
    )
    newest_stage_of_runs = {row["run_id"]: f"{row['stage']} {row['model']}".strip() for row in rows}
    published_at_of_runs = {
        row["run_id"]: row["ended_at"] for row in rows if row["stage"] == PUBLISH
    }
    runs = [
        BegunRun(
            row["run_id"],
            (detail := json.loads(row["detail"])).get("number", 0),
            detail["config"],
            dict(row["outputs"] or {}),
            row["status"],
            row["started_at"],
            published_at_of_runs.get(row["run_id"]),
            newest_stage_of_runs[row["run_id"]],
        )
        for row in rows
        if row["stage"] == BEGIN
    ]
    return sorted(runs, key=lambda run: (run.number, run.started_at))


def open_run(
    catalog: TableCatalog,
    config: Config,
    run_date: date,
    code: str,
    *,
    repin: bool,
    force: bool = False,
    begins: bool = True,
) -> tuple[str, dict[str, int], RunLog]:
    """Return run_id, pins and log of the night's run for `config`; begin the run where there is
    none.

    A run that was begun before keeps its pins, so that a retry reads what the first try read.
    With `repin` a new run begins, with the present versions as its pins. `run_id` is a digest of
    run_date, config and pins; where a run of that id was begun before, the new run's number goes
    in as well. Without `begins` nothing is written.

    Raises OpenRunError where another run of the night is open, and SupersededRunError where
    another run has begun since this one. `repin` and `force` allow both.

    The loop repeats where another process begins a run with the same number first.
    """
    fingerprint = config.fingerprint()
    while True:
        runs_of_night = begun_runs(catalog, run_date)
        runs_with_config = [run for run in runs_of_night if run.fingerprint == fingerprint]
        number = runs_of_night[-1].number + 1 if runs_of_night else 1
        if runs_with_config and not repin:
            run = runs_with_config[-1]
            runlog = RunLog(catalog, run_date, run.run_id)
            newer_run = newer_than(run, runs_of_night)
            if newer_run is not None and begins and not force:
                raise SupersededRunError(
                    f"night {run_date}: run {newer_run.run_id} with other settings has begun since "
                    f"run {run.run_id} with these, and the night's lists are its own. Begin a new "
                    "run with these settings by --repin, or take this one up again by --force"
                )
            if begins and newer_run is not None:
                runlog.renumber(number)
            elif begins and run.status == FAILED:
                runlog.set_status(OK)
            return run.run_id, run.pins, runlog
        if runs_of_night and runs_of_night[-1].is_open and begins and not (repin or force):
            other_run = runs_of_night[-1]
            raise OpenRunError(
                f"night {run_date}: run {other_run.run_id} with other settings has begun and not "
                f"ended (its last row in runs: {other_run.last}). Let it end, go on with it by its "
                "own settings, or begin another beside it by --repin; the one that begins last is "
                "published"
            )
        pins = {
            table: version for table in PINNED if (version := catalog.version(table)) is not None
        }
        identity = {"run_date": run_date.isoformat(), "config": fingerprint, "pins": pins}
        run_id = digest(identity)
        if any(run.run_id == run_id for run in runs_of_night):
            run_id = digest({**identity, "number": number})
        runlog = RunLog(catalog, run_date, run_id)
        if not begins or runlog.begin(number, fingerprint, pins, config.resolved(), code):
            return run_id, pins, runlog


def newer_than(run: BegunRun, runs_of_night: list[BegunRun]) -> BegunRun | None:
    """Return the newest run of the night that began after `run` and has not failed; None without
    one.
    """
    later_runs = [
        other for other in runs_of_night if other.number > run.number and other.status != FAILED
    ]
    return later_runs[-1] if later_runs else None


def _run_row(row: Row) -> RunRow:
    return RunRow(
        row["stage"],
        row["model"],
        dict(row["inputs"] or {}),
        dict(row["outputs"] or {}),
        row["code"],
        json.loads(row["detail"] or "{}"),
        row["rows_in"],
        row["rows_out"],
        row["status"],
        row["run_id"],
    )


def published_row(catalog: TableCatalog, run_date: date) -> Row | None:
    """Return the row of stage publish of the run that published a night last, or None."""
    if catalog.version("runs") is None:
        return None
    rows = night_rows(catalog, run_date).where(
        (F.col("stage") == PUBLISH) & (F.col("status") == OK)
    )
    newest_rows = rows.orderBy(F.desc("ended_at")).limit(1).collect()
    return newest_rows[0] if newest_rows else None
