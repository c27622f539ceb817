"""The nightly run as an Airflow DAG, built from the plan of the night: one spark-submit per stage
and model.

A model that no published list needs may fail. The other models are then evaluated and published,
and the run of the DAG is shown as failed. This file imports neither Spark nor torch. The deployment
sets these environment variables:

RECSPARK_HOME      the checkout or install that holds `jobs/` and `conf/`; default: the parent of
                   the folder of this file
RECSPARK_VENV      the virtual environment that spark-submit and its Python come from; default:
                   `.venv` in RECSPARK_HOME; empty: whatever the worker has on its PATH
RECSPARK_ENV       conf/env/<name>.yaml; default `cluster`
RECSPARK_SET       JSON list of further settings, such as ["paths.root=s3a://bucket/recspark"]
RECSPARK_SETTINGS  a settings file of your own. The jobs read it too, and also RECSPARK_SOURCE and
                   RECSPARK_ROOT (docs/settings.md), so the workers must have the same variables
RECSPARK_CONN      Airflow connection of type spark; default `recspark_spark`
RECSPARK_PY_FILES  the package as a zip or wheel, if it is not installed on the executors
RECSPARK_SCHEDULE  cron line in UTC; default `0 2 * * *`: in the night after the day to process
RECSPARK_RETRIES   how often a failed stage is tried again, except publish; default 2
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, BaseOperator, Param
from airflow.timetables.interval import CronDataIntervalTimetable

HOME = Path(os.environ.get("RECSPARK_HOME") or Path(__file__).resolve().parent.parent)
if str(HOME) not in sys.path:
    sys.path.insert(0, str(HOME))

from recspark.config.load import load_config  # noqa: E402
from recspark.pipeline.plan import STAGES, Task, plan  # noqa: E402

ENV = os.environ.get("RECSPARK_ENV", "cluster")
SETTINGS = json.loads(os.environ.get("RECSPARK_SET", "[]"))
CONFIG = load_config(ENV, SETTINGS, folder=HOME / "conf")
RETRIES = int(os.environ.get("RECSPARK_RETRIES", "2"))
VENV = os.environ.get("RECSPARK_VENV", str(HOME / ".venv"))
# The day with which the data interval starts. The variable `ds` alone is another day in a manual
# run, and has no meaning in an asset-triggered run.
RUN_DATE = "{{ params.run_date or (data_interval_start | ds) }}"
# Each rank of a training has one executor. A second attempt of a rank would make the others hang.
TRAINING_CONF = {"spark.speculation": "false", "spark.dynamicAllocation.enabled": "false"}


def worker_env() -> dict[str, str]:
    """Return the environment variables of spark-submit.

    They put the pyspark of the virtual environment first, because the pyspark that comes with the
    Airflow provider has neither jars nor scripts.
    """
    variables = {"RECSPARK_CONF": str(HOME / "conf")}
    if VENV:
        variables |= {
            "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
            "SPARK_HOME": f"{VENV}/lib/python3.11/site-packages/pyspark",
            "PYSPARK_PYTHON": f"{VENV}/bin/python",
        }
    return variables


def submit(task: Task) -> SparkSubmitOperator:
    """Return the operator that runs one task of the plan with spark-submit."""
    stage, model = task.stage, task.model
    arguments = ["--run-date", RUN_DATE, "--env", ENV]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    if model:
        arguments += ["--model", model]
    return SparkSubmitOperator(
        task_id=task.name,
        application=str(HOME / "jobs" / f"{stage.name}.py"),
        application_args=arguments,
        conn_id=os.environ.get("RECSPARK_CONN", "recspark_spark"),
        name=f"recspark {stage.name} {model}".strip(),
        conf=TRAINING_CONF if stage.trains else None,
        py_files=os.environ.get("RECSPARK_PY_FILES"),
        env_vars=worker_env(),
        # The last stage, publish, is not retried: a gate that refuses tonight's lists would refuse
        # them again, and a person has to look.
        retries=0 if stage.name == STAGES[-1].name else RETRIES,
    )


def models_ended(upstream: dict[Task, SparkSubmitOperator]) -> BaseOperator:
    """Return a task that succeeds once all tasks of `upstream` that `may_fail` have ended, failed
    or not.

    `upstream` : task of the plan -> its operator, for all tasks that the next stage needs.

    This also adds a task at the end of the graph that fails if any of these models failed. Airflow
    shows a run of the DAG as failed if one of its last tasks failed.
    """
    models_that_may_fail_ended = EmptyOperator(
        task_id="other_models_ended", trigger_rule="all_done"
    )
    every_model_succeeded = EmptyOperator(task_id="every_model_succeeded")
    for task, operator in upstream.items():
        operator >> every_model_succeeded
        if task.may_fail:
            operator >> models_that_may_fail_ended
    return models_that_may_fail_ended


with DAG(
    dag_id="nightly_recommendations",
    description="Raw events of one day to fresh top-N lists in Delta tables",
    schedule=CronDataIntervalTimetable(
        os.environ.get("RECSPARK_SCHEDULE", "0 2 * * *"), timezone="UTC"
    ),
    start_date=datetime(2010, 12, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # so that each table has one writer
    params={
        "run_date": Param(
            None, type=["null", "string"], description="YYYY-MM-DD, over the schedule's own day"
        )
    },
    default_args={
        "owner": "recspark",
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=4),  # nothing else surely ends a training that hangs
    },
    tags=["recspark"],
) as dag:
    operators: dict[str, SparkSubmitOperator] = {}
    tasks = {task.name: task for task in plan(CONFIG)}
    for task in tasks.values():
        operators[task.name] = submit(task)
        upstream = {tasks[name]: operators[name] for name in task.needs}
        # The task of one model does not run after a failed task that it needs. A stage for all
        # models does, if that task may fail.
        some_may_fail = not task.model and any(needed_task.may_fail for needed_task in upstream)
        if some_may_fail:
            models_ended(upstream) >> operators[task.name]
        for needed_task, operator in upstream.items():
            if not (some_may_fail and needed_task.may_fail):
                operator >> operators[task.name]
