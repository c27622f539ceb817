"""Opens a night and executes its plan: the only module that knows all stages."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime
from itertools import groupby
from typing import Any

from recspark import storage
from recspark.config import Config, digest
from recspark.errors import ModelsFailedError, RecsparkError, StageOrderError
from recspark.layers import load_config
from recspark.masking import mask
from recspark.pipeline.checks import check_settings, check_slots
from recspark.pipeline.code import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import NOT_FITTED, artifact_folder
from recspark.pipeline.plan import PUBLISHED, STAGES, Stage, Task, needed_models, needed_tasks, plan
from recspark.pipeline.process import peak_memory_mb
from recspark.pipeline.runlog import FAILED, RunRow, StageResult, open_run
from recspark.pipeline.stages.build_features import build_features
from recspark.pipeline.stages.evaluate import evaluate
from recspark.pipeline.stages.ingest import ingest
from recspark.pipeline.stages.publish import publish
from recspark.pipeline.stages.recommend import recommend
from recspark.pipeline.stages.sessionize import sessionize
from recspark.pipeline.stages.train import train
from recspark.pipeline.training_sets import TRAINING, training_tables
from recspark.session import TRAINING as TRAINING_PROFILE
from recspark.session import build_session
from recspark.sources import landing_digest
from recspark.tables import damage
from recspark.tables.catalog import TableCatalog, retried
from recspark.tables.specs import SPECS

log = logging.getLogger("recspark")

_SAID = 600  # characters of an error that are shown
_TRACED = 4000  # characters of a traceback that `runs` keeps

Function = Callable[..., StageResult]
# stage -> its function, and the tables whose versions identify its input
FUNCTIONS: dict[str, tuple[Function, tuple[str, ...]]] = {
    "ingest": (ingest, ("events",)),
    "sessionize": (sessionize, ("events",)),
    "build_features": (build_features, ("events", "sessions", "user_ids", "item_ids", "items")),
    "train": (train, ("histories", "items", "item_features", *TRAINING)),
    "recommend": (
        recommend,
        ("histories", "items", "item_features", "user_ids", "item_ids", "recommendations"),
    ),
    "evaluate": (
        evaluate,
        (
            "candidates",
            "histories",
            "interactions",
            "user_features",
            "item_features",
            "user_ids",
            "item_ids",
            "recommendations",
        ),
    ),
    "publish": (
        publish,
        (
            "candidates",
            "metrics",
            "histories",
            "user_features",
            "item_features",
            "user_ids",
            "item_ids",
            "items",
            "recommendations",
        ),
    ),
}

IDENTITY = "identity"  # in the detail of a row: digest of the settings that the stage read
# stage -> the settings that it reads: sections, or single ones; a stage that is not here reads all.
# Paths and what the machine decides are no part of a result.
SETTINGS_READ: dict[str, tuple[str, ...]] = {
    "ingest": ("source", "ingest", "sessions", "features"),
    "sessionize": ("sessions",),
    "build_features": ("features", "sessions", "evaluate.horizon_days", "train.ranks"),
    "train": ("features", "evaluate.horizon_days"),
    "recommend": ("features", "evaluate", "publish", "n_candidates"),
}


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
    config = load_config(env, overrides)
    check_settings(config)  # a wrong setting is an error now, not at 3 am
    check(config)
    storage.check_writable(storage.absolute(config.paths.root))
    if trains:
        check_slots(config, config.models if models is None else models)

    progress("starting Spark ...")
    spark = build_session(config.spark, f"{app} {run_date}", TRAINING_PROFILE if trains else None)
    catalog = TableCatalog(spark, config.paths.tables)
    code = code_digest(__name__)
    run_id, pins, runlog = open_run(
        catalog, config, run_date, code, repin=repin, force=force, begins=begins
    )
    return RunContext(
        spark, catalog, config, run_date, run_id, pins, runlog, force, progress=progress
    )


def execute(context: RunContext, stage: Stage, model: str = "") -> StageResult:
    """Run one stage, or take its recorded result; its `runs` row is its last act.

    A recorded result is taken when it is `ok`, of the same code and inputs, and `force` is off.
    Raises StageOrderError when a stage that it reads from has no result in this run, and
    DamagedFileError where a data file cannot be read.
    """
    context = replace(context, stage=stage.name)
    label = f"{stage.name} {model}".strip()
    function, _ = FUNCTIONS[stage.name]
    check_order(context, stage, model)
    inputs = {
        table: v
        for table in tables_read(context.config, stage)
        if (v := context.version(table)) is not None
    }
    done = context.runlog.find(stage.name, model)
    code = stage_code(context.config, stage, model)
    identity = settings_identity(context, stage, model)
    is_done = done is not None and done.reusable(inputs, code)
    if done and is_done and not context.force and still_holds(context, stage, model, done):
        context.progress(f"{label}: as recorded ({done.rows_out:,} rows)")
        return StageResult(done.outputs, done.rows_in, done.rows_out, done.detail)
    if done is None and not context.force:
        other = _of_another_run(context, stage, model, inputs, code, identity)
        if other is not None:
            return _take_over(context, stage, model, inputs, code, other)
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
            _record_failure(context, stage, model, inputs, code, named, started, seconds)
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
    if identity is not None:
        result = replace(result, detail={**result.detail, IDENTITY: identity})
    context.runlog.record(
        stage=stage.name,
        model=model,
        inputs=inputs,
        result=result,
        config=context.config.resolved(),
        code=code,
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


def tables_read(config: Config, stage: Stage) -> tuple[str, ...]:
    """Return the tables whose versions identify the input of a stage, with these settings."""
    _, tables = FUNCTIONS[stage.name]
    if stage.name == "recommend" and config.publish.rescore_days is None:
        return tuple(table for table in tables if table != "recommendations")  # nobody keeps a list
    return tables


def settings_identity(context: RunContext, stage: Stage, model: str) -> str | None:
    """Return the digest of the settings that one stage reads; None where it reads all of them.

    For a model's stages the artifacts are among them: they are named by all that makes a model.
    """
    names = SETTINGS_READ.get(stage.name)
    if names is None:
        return None
    settings = context.config.comparable()
    read: dict[str, Any] = {}
    for name in names:
        section, _, setting = name.partition(".")
        read[name] = settings[section][setting] if setting else settings[section]
    if stage.name == "build_features":
        read["training"] = sorted(training_tables(context.config))
    if stage.per_model:
        cutoffs = (context.backtest_cutoff, context.cutoff)
        read["artifacts"] = [artifact_folder(context, model, cutoff) for cutoff in cutoffs]
    return digest(read)


def _of_another_run(
    context: RunContext,
    stage: Stage,
    model: str,
    inputs: Mapping[str, int],
    code: str,
    identity: str | None,
) -> RunRow | None:
    """Return the row of the same stage in another run of the night, where it would be the same.

    That is: of the same settings as far as the stage reads them, the same inputs and code; what it
    left is still there. A model more, or another number of ranks, does not ingest a day again.
    """
    if identity is None:
        return None
    for row in context.runlog.elsewhere(stage.name, model):
        if row.detail.get(IDENTITY) != identity:
            continue
        if stage is STAGES[0]:
            # It writes what it reads: it would write nothing again where all is as it left it.
            now = context.catalog.versions()
            if any(context.pins.get(t, now.get(t)) != v for t, v in row.outputs.items()):
                continue
            if landing_digest(context.config.source, context.run_date) != row.detail["landing"]:
                continue
            row = replace(row, inputs=dict(inputs))
        if row.reusable(inputs, code) and still_holds(context, stage, model, row):
            return row
    return None


def _take_over(
    context: RunContext,
    stage: Stage,
    model: str,
    inputs: dict[str, int],
    code: str,
    row: RunRow,
) -> StageResult:
    """Write the result of another run's stage as this run's own; return it."""
    label = Task(stage, model).name
    context.progress(f"{label}: as run {row.run_id} left it ({row.rows_out:,} rows)")
    detail = {**row.detail, "of_run": row.run_id}
    result = StageResult(row.outputs, row.rows_in, row.rows_out, detail)
    context.runlog.record(
        stage=stage.name,
        model=model,
        inputs=inputs,
        result=result,
        config=context.config.resolved(),
        code=code,
        seconds=0.0,
        peak_memory_mb=peak_memory_mb(),
        started_at=datetime.now(UTC),
    )
    return result


def stage_code(config: Config, stage: Stage, model: str) -> str:
    """Return the digest of the code that a stage runs: its own, and that of the models it loads."""
    function, _ = FUNCTIONS[stage.name]
    own = code_digest(function.__module__)
    if stage.per_model:
        return digest([own, algorithm_code(config, model)])
    if "candidates" in FUNCTIONS[stage.name][1]:  # it reads what the models made
        return digest([own, algorithm_code(config, *config.models)])
    return own


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
    return bool(model) and model not in needed_models(context.config)


def night(context: RunContext) -> None:
    """Run tonight's plan, each task after those that it needs.

    Raises ModelsFailedError once all is published where a model failed that nothing published
    needs.
    """
    failed: dict[str, str] = {}
    for stage, tasks in groupby(plan(context.config), key=lambda task: task.stage):
        models = [task.model for task in tasks if task.model not in failed]
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
    code: str,
    error: Exception,
    started_at: datetime,
    seconds: float,
) -> None:
    """Write the row of a model that failed; where even that fails, the model's error is the one."""
    trace = "" if isinstance(error, RecsparkError) else "".join(traceback.format_exception(error))
    detail = {"error": said(error), "traceback": trace[-_TRACED:]}
    try:
        context.runlog.record(
            stage=stage.name,
            model=model,
            inputs=inputs,
            result=StageResult({}, 0, 0, detail),
            config=context.config.resolved(),
            code=code,
            seconds=seconds,
            peak_memory_mb=peak_memory_mb(),
            started_at=started_at,
            status=FAILED,
        )
    except Exception as second:
        log.warning("the failure of %s %s is not in `runs`: %s", stage.name, model, said(second))


def check_order(context: RunContext, stage: Stage, model: str = "") -> None:
    """Raise StageOrderError where a task that this one needs has left no result in this run.

    A model that nothing published needs may be without: `evaluate` leaves it out, and says so.
    """
    for task in needed_tasks(plan(context.config), stage, model):
        if task.may_fail or (stage.per_model and task.model == model and model):
            continue  # a model's own stages are checked by its artifact
        if not context.runlog.ended_well(task.stage.name, task.model):
            row = context.runlog.find(task.stage.name, task.model)
            state = "has not ended yet" if row is None else f"failed: {row.detail.get('error')}"
            raise StageOrderError(
                f"stage '{stage.name}' of {context.run_date}, run {context.run_id}: stage "
                f"'{task.stage.name}' {task.model} {state}; run it first, with the same settings"
            )


def still_holds(context: RunContext, stage: Stage, model: str, done: RunRow) -> bool:
    """Return whether what a recorded stage left, in the tables and beside them, is still there."""
    if stage.name == "ingest":
        now = landing_digest(context.config.source, context.run_date)
        if now is not None and now != done.detail["landing"]:
            context.progress(
                f"ingest: the landing of {context.run_date} has changed since run {context.run_id} read it; "
                "use --repin to take it in"
            )
    if stage.name == "train" and not all(
        storage.is_complete(artifact_folder(context, model, cutoff))
        for cutoff in (context.backtest_cutoff, context.cutoff)
        if f"{cutoff:%Y-%m-%d}" not in done.detail.get(NOT_FITTED, {})
    ):
        return False
    if what := lost(context, stage, model, done):
        context.progress(f"{stage.name} {model}".strip() + f": {what}; made again")
        return False
    return True


# stage -> the table that holds its rows: a slice of it without a file has lost them
_ROWS = {"recommend": "candidates", "evaluate": "metrics", "publish": "recommendations"}


def lost(context: RunContext, stage: Stage, model: str, done: RunRow) -> str | None:
    """Return what is no longer there of what a recorded stage left in the tables; None where all is.

    Its own slice where the table has one for it, else the whole table as of the recorded version.
    Cost: a job over the log for each table, a look at each file; no data is read.
    """
    known: dict[str, Any] = {
        "run_date": context.run_date,
        "ingest_date": context.run_date,
        "model": model or PUBLISHED,
        "cutoff": (context.backtest_cutoff, context.cutoff),
    }
    for table, version in sorted(done.outputs.items()):
        partition = SPECS[table].partition
        slice_ = {c: known[c] for c in partition} if known.keys() >= set(partition) else {}
        some = done.rows_out > 0 and _ROWS.get(stage.name) == table
        if what := context.catalog.lost(table, version, slice_, some=some):
            return what
    return None
