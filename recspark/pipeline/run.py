"""The list of stages, and what each of them is given. Imports neither Spark nor torch at the
top.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from recspark.config import Config
    from recspark.pipeline.runlog import RunLog
    from recspark.tables.catalog import TableCatalog

log = logging.getLogger("recspark")
PUBLISHED = "published"  # the model name of the list that is, or would have been, published


@dataclass(frozen=True)
class Stage:
    """One step of the night; `jobs/<name>.py` runs it by spark-submit.

    Parameters
    ----------
    name : also the job's file name
    per_model : runs once for each model of the configuration
    trains : needs the training profile (one slot an executor, speculation off)
    """

    name: str
    per_model: bool = False
    trains: bool = False

    def models(self, known: Sequence[str], asked: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what the stage runs for: the models `asked` for, else all `known`; ("",) once.

        Raises ConfigError where one that is asked for is not known.
        """
        from recspark.errors import ConfigError, suggest

        for model in asked:
            if model not in known:
                raise ConfigError(
                    f"model '{model}' is not among this night's.{suggest(model, known)}"
                )
        return tuple(asked or known) if self.per_model else ("",)


STAGES = (
    Stage("ingest"),
    Stage("sessionize"),
    Stage("build_features"),
    Stage("train", per_model=True, trains=True),
    Stage("recommend", per_model=True),
    Stage("evaluate"),
    Stage("publish"),
)


@dataclass
class RunContext:
    """Everything a stage needs: session, tables, settings, the night, and the versions it reads.

    Parameters
    ----------
    spark, catalog, config : of this process
    run_date : the night; the last full day of data
    run_id : hash(run_date, config, pins); of a run begun twice its number goes in
    pins : table -> version when the run began
    runlog : the rows of `runs`
    code : digest of recspark's own sources
    force : run a stage even where its recorded result would do
    stage : the stage that runs; it reads what the stages before it left
    progress : told of each step, for a person to see
    """

    spark: SparkSession
    catalog: TableCatalog
    config: Config
    run_date: date
    run_id: str
    pins: dict[str, int]
    runlog: RunLog
    code: str
    force: bool = False
    stage: str | None = None
    progress: Callable[[str], None] = field(default=lambda _text: None)

    @property
    def cutoff(self) -> datetime:
        """Of the published lists: the first instant after `run_date`."""
        from recspark.config import cutoff_of

        return cutoff_of(self.run_date)

    @property
    def backtest_cutoff(self) -> datetime:
        """Of the backtest: one horizon before `cutoff`."""
        return self.cutoff - timedelta(days=self.config.evaluate.horizon_days)

    def version(self, table: str) -> int | None:
        """Return the version of `table` that this run reads: as an earlier stage left it, else
        pinned. Of a table that has a slice for each model it is the newest one's (see `read`).
        """
        return self.runlog.outputs(self._earlier()).get(table, self.pins.get(table))

    def read(self, table: str, also: Mapping[str, int] | None = None) -> Any:
        """Return `table` at the version that this run reads.

        Of a table that has a slice for each model, each slice at the version that its own row names:
        at the newest version a slice may be that of another run of the night, which runs beside this
        one. `also` : model -> version of slices that this stage has just written. Where all commits
        in between are this run's, that is one plain read.
        """
        from recspark.tables.specs import SPECS

        if SPECS[table].partition != ("run_date", "model"):
            return self.catalog.read(table, self.version(table))
        slices = self.runlog.slices(table, self._earlier())
        slices = {**{model or PUBLISHED: v for model, v in slices.items()}, **(also or {})}
        versions = sorted(set(slices.values()))
        if not versions or versions == list(range(versions[0], versions[-1] + 1)):
            return self.catalog.read(table, versions[-1] if versions else self.version(table))
        parts = [
            self.catalog.read(table, version).where(
                self._of_night([model for model, v in slices.items() if v == version])
            )
            for version in versions
        ]
        return functools.reduce(lambda one, other: one.unionByName(other), parts)

    def _of_night(self, models: list[str]) -> Any:
        from pyspark.sql import functions as F

        return (F.col("run_date") == F.lit(self.run_date)) & F.col("model").isin(models)

    def _earlier(self) -> list[str]:
        """Return the stages before the one that runs."""
        order = [stage.name for stage in STAGES]
        return order[: order.index(self.stage)] if self.stage else order

    def count(self, table: str) -> int:
        """Return the number of rows of `table` at the version that this run reads."""
        return self.catalog.count(table, self.version(table))


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves in its `runs` row."""

    outputs: dict[str, int]
    rows_in: int
    rows_out: int
    detail: dict[str, Any] = field(default_factory=dict)


def code_digest() -> str:
    """Return 12 hex digits over recspark's Python sources, also when they are shipped in a zip.

    The code revision where git is not at hand; the same for a checkout and for a package made of
    it.
    """
    sha = hashlib.sha256()
    for name, source in sorted(_sources(resources.files("recspark"), "")):
        sha.update(name.encode())
        sha.update(source)
    return sha.hexdigest()[:12]


def _sources(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield f"{path}{entry.name}", entry.read_bytes()


def execute(context: RunContext, stage: Stage, model: str = "") -> StageResult:
    """Run one stage, or take its recorded result; its `runs` row is its last act.

    A recorded result is taken when it is `ok`, of the same code and inputs, and `force` is off.
    Raises StageOrderError when a stage that it reads from has no result in this run, and
    DamagedFileError where a data file cannot be read.
    """
    from recspark.pipeline import stages
    from recspark.pipeline.runlog import FAILED
    from recspark.tables import damage
    from recspark.tables.catalog import retried

    context = replace(context, stage=stage.name)
    label = f"{stage.name} {model}".strip()
    function, reads = stages.FUNCTIONS[stage.name]
    stages.check_order(context, stage)
    inputs = {table: v for table in reads if (v := context.version(table)) is not None}
    done = context.runlog.find(stage.name, model)
    is_done = done is not None and done.reusable(inputs, context.code)
    if done and is_done and not context.force and stages.still_holds(context, stage, model, done):
        context.progress(f"{label}: as recorded ({done.rows_out:,} rows)")
        return StageResult(done.outputs, done.rows_in, done.rows_out, done.detail)
    where = {"stage": stage.name, "model": model, "run_id": context.run_id}
    log.info(json.dumps({"event": "stage start", **where, "inputs": inputs}))
    context.progress(f"{label} ...")
    started = datetime.now(UTC)
    clock = time.monotonic()
    commits = dict(context.catalog.commits)
    try:
        # Where another writer was quicker, the stage reads again what that one left.
        result = retried(lambda: function(context, model) if stage.per_model else function(context))
    except Exception as error:
        with suppress(Exception):  # what went wrong first is said
            context.runlog.set_status(FAILED)
        named = damage.named(error, context.catalog.root)
        if named is None:
            raise
        raise named from error
    seconds = time.monotonic() - clock
    if done is not None:  # what the stage did not move is where it was when first recorded
        stayed = {t for t in result.outputs if context.catalog.commits[t] == commits.get(t, 0)}
        kept = {t: v for t, v in done.outputs.items() if t in stayed}
        result = replace(result, outputs={**result.outputs, **kept})
    context.runlog.record(
        stage=stage.name,
        model=model,
        inputs=inputs,
        result=result,
        config=context.config.resolved(),
        code=context.code,
        seconds=seconds,
        peak_memory_mb=peak_memory_mb(),
        started_at=started,
    )
    if stage is STAGES[-1]:
        context.runlog.compact()
    took = {"rows_in": result.rows_in, "rows_out": result.rows_out, "seconds": round(seconds, 1)}
    log.info(json.dumps({"event": "stage end", **where, **took, "outputs": result.outputs}))
    context.progress(f"{label}: {result.rows_out:,} rows, {seconds:.1f} s")
    return result


def night(context: RunContext) -> None:
    """Run every stage of the night in order."""
    for stage in STAGES:
        for model in stage.models(context.config.models):
            execute(context, stage, model)


def peak_memory_mb() -> float:
    """Return the peak resident memory of this Python process and the JVM it started, in MB."""
    total = 0.0
    for pid in _own_processes():
        try:
            text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="ignore")
        except OSError:
            continue
        peak = [line for line in text.splitlines() if line.startswith("VmHWM")]
        total += int(peak[0].split()[1]) / 1024 if peak else 0.0
    if not total:
        import resource

        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(total, 1)


def _own_processes() -> list[int]:
    """Return this process and its Java child or parent: the driver's two halves."""
    import psutil

    me = psutil.Process()
    java = [p for p in [*me.children(), *me.parents()[:1]] if p.name() == "java"]
    return [me.pid, *[p.pid for p in java]]


def check_settings(config: Config) -> None:
    """Raise ConfigError where settings name a model or metric that there is not, or that cannot do
    what it is named for.
    """
    from recspark.errors import ConfigError, suggest
    from recspark.eval.kernel import METRICS
    from recspark.models.registry import MODELS, make, model_spec

    for model in config.models:
        make(model, config.model_settings.get(model, {}))
    for model in config.model_settings:
        model_spec(model)
    metric = config.evaluate.metric
    if metric not in METRICS:
        raise ConfigError(f"evaluate.metric = '{metric}' is no metric.{suggest(metric, METRICS)}")
    neighbours = config.publish.neighbours_model
    if "neighbours" not in model_spec(neighbours).tags:
        able = [name for name, spec in MODELS.items() if "neighbours" in spec.tags]
        raise ConfigError(
            f"publish.neighbours_model = '{neighbours}' gives no neighbours; these do: {able}"
        )


def open_night(
    env: str,
    run_date: date,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    repin: bool = False,
    app: str = "recspark",
    trains: bool = False,
    begins: bool = True,
    progress: Callable[[str], None] = lambda _text: None,
) -> RunContext:
    """Return the context of one night: settings checked, session started, run begun or found again.

    `trains` starts the session with the training profile; without `begins` no run is begun, and the
    tables are those of the night's run with these settings, else those of now. Raises ConfigError, or
    SetupError where `paths.root` cannot be written, before Spark starts; OpenRunError and
    SupersededRunError where another run of the night is in the way.
    """
    from recspark import storage
    from recspark.layers import load_config

    config = load_config(env, overrides)
    check_settings(config)  # a wrong setting is an error now, not at 3 am
    storage.check_writable(storage.absolute(config.paths.root))

    from recspark.pipeline.runlog import open_run
    from recspark.session import TRAINING, build_session
    from recspark.tables.catalog import TableCatalog

    progress("starting Spark ...")
    spark = build_session(config.spark, f"{app} {run_date}", TRAINING if trains else None)
    catalog = TableCatalog(spark, config.paths.tables)
    code = code_digest()
    run_id, pins, runlog = open_run(
        catalog, config, run_date, code, repin=repin, force=force, begins=begins
    )
    return RunContext(
        spark, catalog, config, run_date, run_id, pins, runlog, code, force, progress=progress
    )
