"""Opens a night and executes its plan. Only this module knows all stages."""

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
from recspark.config.load import load_config
from recspark.errors import ModelsFailedError, RecsparkError, StageOrderError
from recspark.masking import mask
from recspark.pipeline.checks import check_settings, check_slots
from recspark.pipeline.code_digest import code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.peak_memory import peak_memory_mb
from recspark.pipeline.plan import STAGES, Stage, needed_models, needed_tasks, plan
from recspark.pipeline.reuse import COMMITS, IDENTITY, Execution, commits_of, recorded
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

_SHOWN_CHARACTERS = 600  # of an error message
_KEPT_CHARACTERS = 4000  # of a traceback, in `runs`

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
    """Return the context of one night: settings checked, Spark started, the run begun or found
    again.

    Parameters
    ----------
    trains : start the session with the training profile, for `models` or for all models of the
        night
    check : checks what the command needs besides the settings
    begins : begin a run where there is none. False: write nothing; the context then has the
        table versions of the night's run with these settings, or the present versions without
        such a run

    Before Spark starts, raises ConfigError for wrong settings, SetupError where there is no Java
    or `paths.root` cannot be written, NoSlotsError where a model needs more ranks than tasks can
    run at once, and whatever `check` raises. After that, raises OpenRunError or
    SupersededRunError where another run of the night is in the way.
    """
    config = load_config(env, overrides)
    check_settings(config)  # a wrong setting is an error now, not in the middle of the night
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
    """Run one stage, or use its recorded result. Writing its row in `runs` is the last step.

    A recorded result is used where its status is `ok`, its code, settings and inputs are the same,
    and `force` is off. Raises StageOrderError where a stage that this one reads from has no result
    in this run, and DamagedFileError where a data file cannot be read.
    """
    context = replace(context, stage=stage.name, model=model)
    check_order(context, stage, model)
    execution = Execution.of(context, stage, model)
    recorded_row = None if context.force else recorded(context, execution)
    if recorded_row is not None:
        return _use_recorded(context, execution, recorded_row)
    about_stage = {"stage": stage.name, "model": model, "run_id": context.run_id}
    log.info(json.dumps({"event": "stage start", **about_stage, "inputs": execution.inputs}))
    context.progress(f"{execution.label} ...")
    started = datetime.now(UTC)
    started_clock = time.monotonic()
    result = _run_function(context, execution, started)
    seconds = time.monotonic() - started_clock
    _record(context, execution, result, started, seconds)
    if stage is STAGES[-1]:
        context.runlog.compact()
    about_result = {
        "rows_in": result.rows_in,
        "rows_out": result.rows_out,
        "seconds": round(seconds, 1),
    }
    log.info(
        json.dumps({"event": "stage end", **about_stage, **about_result, "outputs": result.outputs})
    )
    context.progress(f"{execution.label}: {result.rows_out:,} rows, {seconds:.1f} s")
    return result


def _run_function(context: RunContext, execution: Execution, started_at: datetime) -> StageResult:
    """Run the stage's function and return its result.

    Where the function fails, the error is raised, as DamagedFileError where a data file cannot be
    read. Before that, the failure of a model is written to its row in `runs`, and the run is marked
    as failed unless the model fails alone.
    """
    function, model = FUNCTIONS[execution.stage.name], execution.model
    row_before = context.runlog.find(execution.stage.name, model)
    commits_before = dict(context.catalog.commits)
    try:
        # Where another writer committed first, the stage runs again and reads what that one wrote.
        result = retried(lambda: function(context, model) if model else function(context))
    except Exception as error:
        error_to_raise = damage.unreadable_file_error(error, context.catalog.root) or error
        if execution.stage.per_model:
            _record_failure(context, execution, error_to_raise, started_at)
        if not fails_alone(context, model):
            with suppress(Exception):  # the stage's own error is the one to report
                context.runlog.set_status(FAILED)
        if error_to_raise is error:
            raise
        raise error_to_raise from error
    # A table that this execution did not commit to keeps the version that was recorded first.
    if row_before is not None:
        unchanged_tables = {
            table
            for table in result.outputs
            if context.catalog.commits[table] == commits_before.get(table, 0)
        }
        versions_before = {
            table: version
            for table, version in row_before.outputs.items()
            if table in unchanged_tables
        }
        result = replace(result, outputs={**result.outputs, **versions_before})
    if execution.identity is not None:
        identity_detail = {
            IDENTITY: execution.identity,
            COMMITS: commits_of(context, result.outputs),
        }
        result = replace(result, detail={**result.detail, **identity_detail})
    return result


def _use_recorded(context: RunContext, execution: Execution, row: RunRow) -> StageResult:
    """Return the result of a recorded row. The row of another run is copied to this run's rows."""
    result = StageResult(row.outputs, row.rows_in, row.rows_out, row.detail)
    if row.run_id == context.run_id:
        context.progress(f"{execution.label}: as recorded ({row.rows_out:,} rows)")
        return result
    context.progress(f"{execution.label}: as run {row.run_id} left it ({row.rows_out:,} rows)")
    result = replace(result, detail={**row.detail, "of_run": row.run_id})
    _record(context, execution, result, datetime.now(UTC), 0.0)
    return result


def _record(
    context: RunContext,
    execution: Execution,
    result: StageResult,
    started_at: datetime,
    seconds: float,
    status: str = OK,
) -> None:
    """Write the stage's row in `runs`."""
    context.runlog.record(
        stage=execution.stage.name,
        model=execution.model,
        inputs=execution.inputs,
        result=result,
        config=context.config.resolved(),
        code=execution.code,
        seconds=seconds,
        peak_memory_mb=peak_memory_mb(),
        started_at=started_at,
        status=status,
    )


def execute_models(
    context: RunContext, stage: Stage, models: Sequence[str]
) -> dict[str, Exception]:
    """Run one stage for each of `models`; return the errors of the models that failed alone.

    `models` is ("",) for a stage that runs once. A model fails alone where nothing published needs
    it (`fails_alone`). Any other error is raised at once.
    """
    errors_by_model: dict[str, Exception] = {}
    for model in models:
        try:
            execute(context, stage, model)
        except Exception as error:
            if not fails_alone(context, model):
                raise
            errors_by_model[model] = error
            context.progress(
                f"{stage.name} {model}: failed, {error_line(error)}; the others go on without it"
            )
    return errors_by_model


def fails_alone(context: RunContext, model: str) -> bool:
    """Return whether the night goes on where `model` fails. False for "", a stage
    that runs once.
    """
    return bool(model) and model not in needed_models(context.config)


def night(context: RunContext) -> None:
    """Run tonight's plan, each task after the tasks that it needs.

    A model that nothing published needs may fail; the models that are built on it are then left
    out. After everything else is published, raises ModelsFailedError that names them.
    """
    failed: dict[str, str] = {}
    for stage, tasks in groupby(plan(context.config), key=lambda task: task.stage):
        models_to_run = []
        for task in tasks:
            failed_needs = [name for name in context.config.needs_of(task.model) if name in failed]
            if failed_needs and task.model not in failed:
                failed[task.model] = f"{task.model}, which is built on {', '.join(failed_needs)}"
            if task.model not in failed:
                models_to_run.append(task.model)
        for model, error in execute_models(context, stage, models_to_run).items():
            failed[model] = f"{model} in stage {stage.name}, {error_line(error)}"
    if failed:
        raise ModelsFailedError(
            f"night {context.run_date}, run {context.run_id} is published without "
            f"{'; '.join(failed.values())}. Nothing that is published needs them; run the night "
            "again to try only what failed"
        )


def error_line(error: Exception) -> str:
    """Return an error as one line that is short enough to read, with its secrets hidden."""
    text = " ".join(mask(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} …"


def _record_failure(
    context: RunContext, execution: Execution, error: Exception, started_at: datetime
) -> None:
    """Write the row of a model that failed.

    Where even that fails, only a warning is logged: the model's error matters more.
    """
    traceback_text = (
        "" if isinstance(error, RecsparkError) else "".join(traceback.format_exception(error))
    )
    detail = {"error": error_line(error), "traceback": traceback_text[-_KEPT_CHARACTERS:]}
    seconds = (datetime.now(UTC) - started_at).total_seconds()
    try:
        _record(context, execution, StageResult({}, 0, 0, detail), started_at, seconds, FAILED)
    except Exception as second_error:
        log.warning(
            "the failure of %s is not in `runs`: %s", execution.label, error_line(second_error)
        )


def check_order(context: RunContext, stage: Stage, model: str = "") -> None:
    """Raise StageOrderError where a task that this one needs has no result in this run yet.

    A stage that runs once does not wait for models that nothing published needs: `evaluate` leaves
    such a model out, and says so.
    """
    for task in needed_tasks(plan(context.config), stage, model):
        if task.may_fail and not model:
            continue
        if model and (task.model, task.stage.name) == (model, "train"):
            continue  # loading the model's artifact checks that
        if not context.runlog.ended_well(task.stage.name, task.model):
            row = context.runlog.find(task.stage.name, task.model)
            state = "has not ended yet" if row is None else f"failed: {row.detail.get('error')}"
            raise StageOrderError(
                f"stage '{stage.name}' of {context.run_date}, run {context.run_id}: stage "
                f"'{task.stage.name}' {task.model} {state}; run it first, with the same settings"
            )
