"""Opens a night and executes its plan: the only module that knows all stages."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime
from itertools import groupby

from recspark import storage
from recspark.config import Config
from recspark.errors import ModelsFailedError, RecsparkError, StageOrderError
from recspark.layers import load_config
from recspark.masking import mask
from recspark.pipeline.checks import check_settings, check_slots
from recspark.pipeline.code import code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import STAGES, Stage, needed_models, needed_tasks, plan
from recspark.pipeline.process import peak_memory_mb
from recspark.pipeline.reuse import COMMITS, IDENTITY, Work, commits_of, recorded
from recspark.pipeline.runlog import FAILED, OK, RunRow, StageResult, open_run
from recspark.pipeline.stages.build_features import build_features
from recspark.pipeline.stages.encode import encode
from recspark.pipeline.stages.evaluate import evaluate
from recspark.pipeline.stages.examples import examples
from recspark.pipeline.stages.ingest import ingest
from recspark.pipeline.stages.publish import publish
from recspark.pipeline.stages.recommend import recommend
from recspark.pipeline.stages.sessionize import sessionize
from recspark.pipeline.stages.train import train
from recspark.session import TRAINING as TRAINING_PROFILE
from recspark.session import build_session
from recspark.tables import damage
from recspark.tables.catalog import TableCatalog, retried

log = logging.getLogger("recspark")

_SAID = 600  # characters of an error that are shown
_TRACED = 4000  # characters of a traceback that `runs` keeps

FUNCTIONS: dict[str, Callable[..., StageResult]] = {
    "ingest": ingest,
    "sessionize": sessionize,
    "build_features": build_features,
    "train": train,
    "encode": encode,
    "examples": examples,
    "recommend": recommend,
    "evaluate": evaluate,
    "publish": publish,
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

    A recorded result is taken when it is `ok`, of the same code, settings and inputs, and `force` is
    off. Raises StageOrderError when a stage that it reads from has no result in this run, and
    DamagedFileError where a data file cannot be read.
    """
    context = replace(context, stage=stage.name, model=model)
    check_order(context, stage, model)
    work = Work.of(context, stage, model)
    row = None if context.force else recorded(context, work)
    if row is not None:
        return _take(context, work, row)
    where = {"stage": stage.name, "model": model, "run_id": context.run_id}
    log.info(json.dumps({"event": "stage start", **where, "inputs": work.inputs}))
    context.progress(f"{work.label} ...")
    started = datetime.now(UTC)
    clock = time.monotonic()
    result = _run(context, work, started)
    seconds = time.monotonic() - clock
    _record(context, work, result, started, seconds)
    if stage is STAGES[-1]:
        context.runlog.compact()
    took = {"rows_in": result.rows_in, "rows_out": result.rows_out, "seconds": round(seconds, 1)}
    log.info(json.dumps({"event": "stage end", **where, **took, "outputs": result.outputs}))
    context.progress(f"{work.label}: {result.rows_out:,} rows, {seconds:.1f} s")
    return result


def _run(context: RunContext, work: Work, started_at: datetime) -> StageResult:
    """Run the stage's function; what goes wrong is recorded, and raised by its name."""
    function, model = FUNCTIONS[work.stage.name], work.model
    done = context.runlog.find(work.stage.name, model)
    commits = dict(context.catalog.commits)
    try:
        # Where another writer was quicker, the stage reads again what that one left.
        result = retried(lambda: function(context, model) if model else function(context))
    except Exception as error:
        named = damage.named(error, context.catalog.root) or error
        if work.stage.per_model:
            _record_failure(context, work, named, started_at)
        if not fails_alone(context, model):
            with suppress(Exception):  # what went wrong first is said
                context.runlog.set_status(FAILED)
        if named is error:
            raise
        raise named from error
    if done is not None:  # what the stage did not move is where it was when first recorded
        stayed = {t for t in result.outputs if context.catalog.commits[t] == commits.get(t, 0)}
        kept = {t: v for t, v in done.outputs.items() if t in stayed}
        result = replace(result, outputs={**result.outputs, **kept})
    if work.identity is not None:
        about = {IDENTITY: work.identity, COMMITS: commits_of(context, result.outputs)}
        result = replace(result, detail={**result.detail, **about})
    return result


def _take(context: RunContext, work: Work, row: RunRow) -> StageResult:
    """Return the result of a recorded row; that of another run becomes one of this run, too."""
    result = StageResult(row.outputs, row.rows_in, row.rows_out, row.detail)
    if row.run_id == context.run_id:
        context.progress(f"{work.label}: as recorded ({row.rows_out:,} rows)")
        return result
    context.progress(f"{work.label}: as run {row.run_id} left it ({row.rows_out:,} rows)")
    result = replace(result, detail={**row.detail, "of_run": row.run_id})
    _record(context, work, result, datetime.now(UTC), 0.0)
    return result


def _record(
    context: RunContext,
    work: Work,
    result: StageResult,
    started_at: datetime,
    seconds: float,
    status: str = OK,
) -> None:
    """Write the stage's row in `runs`."""
    context.runlog.record(
        stage=work.stage.name,
        model=work.model,
        inputs=work.inputs,
        result=result,
        config=context.config.resolved(),
        code=work.code,
        seconds=seconds,
        peak_memory_mb=peak_memory_mb(),
        started_at=started_at,
        status=status,
    )


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
        models = []
        for task in tasks:
            lost = [name for name in context.config.needs_of(task.model) if name in failed]
            if lost and task.model not in failed:
                failed[task.model] = f"{task.model}, which is built on {', '.join(lost)}"
            if task.model not in failed:
                models.append(task.model)
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
    context: RunContext, work: Work, error: Exception, started_at: datetime
) -> None:
    """Write the row of a model that failed; where even that fails, the model's error is the one."""
    trace = "" if isinstance(error, RecsparkError) else "".join(traceback.format_exception(error))
    detail = {"error": said(error), "traceback": trace[-_TRACED:]}
    seconds = (datetime.now(UTC) - started_at).total_seconds()
    try:
        _record(context, work, StageResult({}, 0, 0, detail), started_at, seconds, FAILED)
    except Exception as second:
        log.warning("the failure of %s is not in `runs`: %s", work.label, said(second))


def check_order(context: RunContext, stage: Stage, model: str = "") -> None:
    """Raise StageOrderError where a task that this one needs has left no result in this run.

    A model that nothing published needs may be without: `evaluate` leaves it out, and says so.
    """
    for task in needed_tasks(plan(context.config), stage, model):
        if task.may_fail and not model:
            continue
        if model and (task.model, task.stage.name) == (model, "train"):
            continue  # it is checked by its artifact
        if not context.runlog.ended_well(task.stage.name, task.model):
            row = context.runlog.find(task.stage.name, task.model)
            state = "has not ended yet" if row is None else f"failed: {row.detail.get('error')}"
            raise StageOrderError(
                f"stage '{stage.name}' of {context.run_date}, run {context.run_id}: stage "
                f"'{task.stage.name}' {task.model} {state}; run it first, with the same settings"
            )
