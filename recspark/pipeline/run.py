"""The list of stages, and what each of them is given. Imports neither Spark nor torch at the
top.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recspark.errors import ModelsFailedError, RecsparkError
from recspark.masking import mask

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from recspark.config import Config
    from recspark.pipeline.runlog import RunLog
    from recspark.tables.catalog import TableCatalog

log = logging.getLogger("recspark")
PUBLISHED = "published"  # the model name of the list that is, or would have been, published

_SAID = 600  # characters of an error that are shown
_TRACED = 4000  # characters of a traceback that `runs` keeps


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
    from recspark.pipeline import functions as stages
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
        named = damage.named(error, context.catalog.root) or error
        if stage.per_model:
            seconds = time.monotonic() - clock
            _record_failure(context, stage, model, inputs, named, started, seconds)
        if not fails_alone(context, model):
            with suppress(Exception):  # what went wrong first is said
                context.runlog.set_status(FAILED)
        if named is error:
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


def execute_models(
    context: RunContext, stage: Stage, models: Sequence[str]
) -> dict[str, Exception]:
    """Run one stage for each of `models`, ("",) once; return the errors of those that failed alone.

    A model that nothing published needs (`fails_alone`) fails alone; any other error is raised.
    """
    alone: dict[str, Exception] = {}
    for model in models:
        try:
            execute(context, stage, model)
        except Exception as error:
            if not fails_alone(context, model):
                raise
            alone[model] = error
            context.progress(
                f"{stage.name} {model}: failed, {said(error)}; the others go on without it"
            )
    return alone


def fails_alone(context: RunContext, model: str) -> bool:
    """Return whether the night goes on without `model`; "" is a stage that runs once."""
    return bool(model) and model not in context.config.publish.needed_models


def night(context: RunContext) -> None:
    """Run every stage of the night in order.

    Raises ModelsFailedError once all is published where a model failed that nothing published
    needs.
    """
    failed: dict[str, str] = {}
    for stage in STAGES:
        models = [m for m in stage.models(context.config.models) if m not in failed]
        for model, error in execute_models(context, stage, models).items():
            failed[model] = f"{model} in stage {stage.name}, {said(error)}"
    if failed:
        raise ModelsFailedError(
            f"night {context.run_date}, run {context.run_id} is published without "
            f"{'; '.join(failed.values())}. Nothing that is published needs them; run the night "
            "again to try only what failed"
        )


def said(error: Exception) -> str:
    """Return an error on one line of a length that a person reads, its secrets hidden."""
    text = " ".join(mask(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= _SAID else f"{text[:_SAID]} …"


def _record_failure(
    context: RunContext,
    stage: Stage,
    model: str,
    inputs: dict[str, int],
    error: Exception,
    started_at: datetime,
    seconds: float,
) -> None:
    """Write the row of a model that failed; where even that fails, the model's error is the one."""
    from recspark.pipeline.runlog import FAILED

    trace = "" if isinstance(error, RecsparkError) else "".join(traceback.format_exception(error))
    detail = {"error": said(error), "traceback": trace[-_TRACED:]}
    try:
        context.runlog.record(
            stage=stage.name,
            model=model,
            inputs=inputs,
            result=StageResult({}, 0, 0, detail),
            config=context.config.resolved(),
            code=context.code,
            seconds=seconds,
            peak_memory_mb=peak_memory_mb(),
            started_at=started_at,
            status=FAILED,
        )
    except Exception as second:
        log.warning("the failure of %s %s is not in `runs`: %s", stage.name, model, said(second))


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
    what it is named for. It says everything at once.
    """
    from recspark.errors import ConfigError, suggest
    from recspark.eval.kernel import METRICS
    from recspark.models.registry import MODELS, make

    wrong = []
    for model in dict.fromkeys([*config.models, *config.model_settings]):
        try:
            make(model, config.model_settings.get(model, {}))
        except ConfigError as error:
            wrong.append(str(error))
    metric = config.evaluate.metric
    if metric not in METRICS:
        wrong.append(f"evaluate.metric = '{metric}' is no metric.{suggest(metric, METRICS)}")
    able = [name for name, spec in MODELS.items() if "neighbours" in spec.tags]
    neighbours = config.publish.neighbours_model
    if neighbours in MODELS and neighbours not in able:
        wrong.append(
            f"publish.neighbours_model = '{neighbours}' gives no neighbours; these do: {able}"
        )
    if wrong:
        raise ConfigError("; ".join(wrong))


def check_landing(config: Config, run_date: date) -> None:
    """Raise MissingLandingError, or SourceError, where the landing of a night that has not begun is
    not there; a night that has begun may have taken it in, and nobody needs it again.
    """
    from recspark import storage
    from recspark.sources import check_places

    begun = storage.join(config.paths.tables, "runs", f"run_date={run_date}")
    if not storage.exists(storage.absolute(begun)):
        check_places(config.source, run_date)


def check_stage(config: Config, run_date: date, stage: Stage, asked: Sequence[str] = ()) -> None:
    """Raise what is wrong with a stage that is asked for, as far as it is known without Spark."""
    stage.models(config.models, asked)
    if stage is STAGES[0]:
        check_landing(config, run_date)


def check_slots(config: Config, models: Sequence[str]) -> None:
    """Raise NoSlotsError where one of `models` trains on more ranks than tasks can run at once."""
    from recspark.errors import NoSlotsError
    from recspark.models.registry import MODELS
    from recspark.session import most_slots

    ranks, slots = config.train.ranks, most_slots(config.spark)
    networks = [name for name in models if name in MODELS and "neural" in MODELS[name].tags]
    if networks and slots is not None and ranks > slots:
        raise NoSlotsError(
            f"{', '.join(networks)}: train.ranks = {ranks} need as many task slots, spark.master = "
            f"{config.spark.master} has {slots}: set train.ranks={max(slots, 1)}, or give Spark more"
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
    check: Callable[[Config], object] = lambda _config: None,
    models: Sequence[str] | None = None,
    begins: bool = True,
    progress: Callable[[str], None] = lambda _text: None,
) -> RunContext:
    """Return the context of one night: settings checked, session started, run begun or found again.

    `trains` starts the session with the training profile, for `models` or all of the night; `check`
    looks at what the command needs besides; without `begins` no run is begun, and the tables are
    those of the night's run with these settings, else those of now. Before Spark starts raises
    ConfigError, SetupError where there is no Java or `paths.root` cannot be written, NoSlotsError
    where a model wants more ranks than there can be tasks at once, and what `check` raises;
    OpenRunError and SupersededRunError where another run of the night is in the way.
    """
    from recspark import storage
    from recspark.layers import load_config

    config = load_config(env, overrides)
    check_settings(config)  # a wrong setting is an error now, not at 3 am
    check(config)
    storage.check_writable(storage.absolute(config.paths.root))
    if trains:
        check_slots(config, config.models if models is None else models)

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
