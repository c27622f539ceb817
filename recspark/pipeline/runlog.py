"""The `runs` table: what each stage of a night read, wrote and took."""

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
# Status of a model's stage that failed (`detail` says how), and of the row of a run's pins once a
# stage of it has ended the run by an error.
FAILED = "failed"
PUBLISH = "publish"  # the stage that ends a run
BEGIN = "begin"  # the stage name of the row that holds a run's pins


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves in its `runs` row."""

    outputs: dict[str, int]
    rows_in: int
    rows_out: int
    detail: dict[str, Any] = field(default_factory=dict)


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
    run_id: str

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
        self._trained: dict[tuple[date, date], list[RunRow]] = {}  # of nights, first and last
        self._others: list[RunRow] = []  # of the night's other runs, when this one was first read

    def rows(self) -> dict[tuple[str, str], RunRow]:
        """Return this run's rows by (stage, model), in the order they were written."""
        if self._rows is None:
            night = night_rows(self.catalog, self.run_date).orderBy("ended_at").collect()
            rows = [_run_row(row) for row in night]
            self._rows = {(r.stage, r.model): r for r in rows if r.run_id == self.run_id}
            self._others = [r for r in rows if r.run_id != self.run_id]
        return self._rows

    def elsewhere(self, stage: str, model: str = "") -> list[RunRow]:
        """Return the rows of one stage in the night's other runs, the newest first."""
        self.rows()
        return [r for r in reversed(self._others) if (r.stage, r.model) == (stage, model)]

    def trained(self, first: date, last: date, model: str) -> list[RunRow]:
        """Return the rows of runs of the nights from `first` to `last` that trained a model, the newest
        first.

        They are read once by each process.
        """
        if (first, last) not in self._trained:
            runs = self.catalog.read("runs", self.catalog.version("runs"))
            nights = F.col("run_date").between(F.lit(first), F.lit(last))
            rows = runs.where(nights & (F.col("stage") == "train") & (F.col("status") == OK))
            newest_first = rows.orderBy(F.desc("ended_at")).collect()
            self._trained[first, last] = [_run_row(row) for row in newest_first]
        return [row for row in self._trained[first, last] if row.model == model]

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

    def slices(self, table: str, stages: Collection[str]) -> dict[str, int]:
        """Return model -> version of `table` as these stages left it, each of a slice of its own; ""
        is the model of a stage that runs once.
        """
        rows = [r for r in self.rows().values() if r.stage in stages and table in r.outputs]
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
        """Write the row of a stage that has ended; replaces an older one.

        A first row is appended, which conflicts with nobody, so models of a night may end at the
        same moment; two processes of one run that end the same stage leave one row, the later one's.
        `compact` makes one file of a night's rows.
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
        once = f"{self.run_id} {stage} {model}"
        if known or not self.catalog.append("runs", frame, once):
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
        """Put `row` in the place of the stage's row of before; models of a night may end at once."""
        retried(lambda: self.catalog.upsert("runs", row, {"run_date": self.run_date}))

    def begin(
        self, number: int, fingerprint: str, pins: dict[str, int], config: str, code: str
    ) -> bool:
        """Write the row of the run's pins; False where another run of that number was quicker."""
        now = datetime.now(UTC)
        detail = json.dumps({"config": fingerprint, "number": number}, sort_keys=True)
        empty: dict[str, int] = {}
        head = (self.run_id, self.run_date, BEGIN, "", empty, pins, config, code, detail)
        row = (*head, 0, 0, 0.0, 0.0, OK, now, now)
        frame = self.catalog.spark.createDataFrame([row], schema.RUNS)
        return self.catalog.append("runs", frame, f"{BEGIN} {self.run_date} {number}")

    def renumber(self, number: int) -> None:
        """Make this run, begun before, the night's newest."""
        detail = F.to_json(
            F.struct(
                F.get_json_object("detail", "$.config").alias("config"),
                F.lit(number).alias("number"),
            )
        )
        self._replace(self._begun().withColumns({"detail": detail, "status": F.lit(OK)}))

    def _begun(self) -> DataFrame:
        mine = (F.col("run_id") == self.run_id) & (F.col("stage") == BEGIN)
        return night_rows(self.catalog, self.run_date).where(mine)

    def set_status(self, status: str) -> None:
        """Write whether the run goes on (`OK`) or has ended by an error (`FAILED`)."""
        self._replace(self._begun().withColumn("status", F.lit(status)))

    def compact(self) -> None:
        """Make one file of the night's rows."""
        self.catalog.compact("runs", {"run_date": self.run_date})


def night_rows(catalog: TableCatalog, run_date: date) -> DataFrame:
    """Return the rows of `runs` of one night, all its runs."""
    return catalog.read("runs", catalog.version("runs")).where(F.col("run_date") == F.lit(run_date))


@dataclass(frozen=True)
class Begun:
    """One run of a night, as its rows in `runs` say.

    Parameters
    ----------
    number : 1 for the night's first run; a larger one began later, whatever the clocks say
    is_open : no stage has ended by an error since, and it has not published
    published_at : end of its stage publish
    last : the stage, or stage and model, whose row is its newest
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
        """Return whether it has begun and not ended."""
        return self.status != FAILED and self.published_at is None


def begun_runs(catalog: TableCatalog, run_date: date) -> list[Begun]:
    """Return the runs of a night, the one that began last at the end. One small job."""
    # Microseconds, not times: Python would give those in the zone of the driver.
    started, ended = (F.unix_micros(c).alias(c) for c in ("started_at", "ended_at"))
    rows = (
        night_rows(catalog, run_date)
        .select("run_id", "stage", "model", "outputs", "detail", "status", started, ended)
        .orderBy("ended_at")
        .collect()
    )
    last = {row["run_id"]: f"{row['stage']} {row['model']}".strip() for row in rows}
    published = {row["run_id"]: row["ended_at"] for row in rows if row["stage"] == PUBLISH}
    begun = [
        Begun(
            row["run_id"],
            (about := json.loads(row["detail"])).get("number", 0),
            about["config"],
            dict(row["outputs"] or {}),
            row["status"],
            row["started_at"],
            published.get(row["run_id"]),
            last[row["run_id"]],
        )
        for row in rows
        if row["stage"] == BEGIN
    ]
    return sorted(begun, key=lambda run: (run.number, run.started_at))


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
    """Return run_id, pins and log of the night's run for `config`; begins it where there is none.

    A run begun before keeps its pins, so that a retry reads what the first try read; `repin` begins
    a new one with the versions of now. `run_id = hash(run_date, config, pins)`, and where a run of
    that name was begun before, its number too. Without `begins` nothing is written.

    Raises OpenRunError where another run of the night is open, and SupersededRunError where one has
    begun since this one, unless `repin` or `force` asks for it.
    """
    fingerprint = config.fingerprint()
    while True:
        begun = begun_runs(catalog, run_date)
        mine = [run for run in begun if run.fingerprint == fingerprint]
        number = begun[-1].number + 1 if begun else 1
        if mine and not repin:
            run = mine[-1]
            runlog = RunLog(catalog, run_date, run.run_id)
            newer = newer_than(run, begun)
            if newer is not None and begins and not force:
                raise SupersededRunError(
                    f"night {run_date}: run {newer.run_id} with other settings has begun since run "
                    f"{run.run_id} with these, and the night's lists are its own. Begin a new run with "
                    "these settings by --repin, or take this one up again by --force"
                )
            if begins and newer is not None:
                runlog.renumber(number)
            elif begins and run.status == FAILED:
                runlog.set_status(OK)
            return run.run_id, run.pins, runlog
        if begun and begun[-1].is_open and begins and not (repin or force):
            other = begun[-1]
            raise OpenRunError(
                f"night {run_date}: run {other.run_id} with other settings has begun and not ended (its "
                f"last row in runs: {other.last}). Let it end, go on with it by its own settings, or "
                "begin another beside it by --repin; the one that begins last is published"
            )
        pins = {t: v for t in PINNED if (v := catalog.version(t)) is not None}
        name = {"run_date": run_date.isoformat(), "config": fingerprint, "pins": pins}
        run_id = digest(name)
        if any(run.run_id == run_id for run in begun):
            run_id = digest({**name, "number": number})
        runlog = RunLog(catalog, run_date, run_id)
        if not begins or runlog.begin(number, fingerprint, pins, config.resolved(), code):
            return run_id, pins, runlog


def newer_than(run: Begun, begun: list[Begun]) -> Begun | None:
    """Return the newest run of the night that began after `run` and has not failed; None without."""
    later = [other for other in begun if other.number > run.number and other.status != FAILED]
    return later[-1] if later else None


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
    """Return the row of `runs` of the run that published a night last; None where nobody did."""
    if catalog.version("runs") is None:
        return None
    rows = night_rows(catalog, run_date).where(
        (F.col("stage") == PUBLISH) & (F.col("status") == OK)
    )
    found = rows.orderBy(F.desc("ended_at")).limit(1).collect()
    return found[0] if found else None
