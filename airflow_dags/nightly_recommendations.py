"""The nightly run as an Airflow DAG, built from its plan: one spark-submit per stage and model.

A model that nothing published needs may fail: the others are evaluated and published, and the run
of the DAG is shown as failed. Imports neither Spark nor torch. What the deployment decides comes
from environment variables:

RECSPARK_HOME      the checkout or install that holds `jobs/` and `conf/`; default: beside this file
RECSPARK_VENV      the virtual environment that spark-submit and its Python come from;
                   default: `.venv` in RECSPARK_HOME; empty: whatever the worker has on its PATH
RECSPARK_ENV       conf/env/<name>.yaml; default `cluster`
RECSPARK_SET       JSON list of further settings, such as ["paths.root=s3a://bucket/recspark"]
RECSPARK_SETTINGS  a settings file of one's own; the jobs read it too, and RECSPARK_SOURCE and RECSPARK_ROOT
                   (docs/settings.md), so the workers must have the same
RECSPARK_CONN      Airflow connection of type spark; default `recspark_spark`
RECSPARK_PY_FILES  the package as a zip or wheel, where the executors do not have it installed
RECSPARK_SCHEDULE  cron line in UTC; default `0 2 * * *`: the night after the day it is about
RECSPARK_RETRIES   how often a failed stage is tried again, publish excepted; default 2
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

from recspark.layers import load_config  # noqa: E402
from recspark.pipeline.plan import STAGES, Task, plan  # noqa: E402

ENV = os.environ.get("RECSPARK_ENV", "cluster")
SETTINGS = json.loads(os.environ.get("RECSPARK_SET", "[]"))
CONFIG = load_config(ENV, SETTINGS, folder=HOME / "conf")
RETRIES = int(os.environ.get("RECSPARK_RETRIES", "2"))
VENV = os.environ.get("RECSPARK_VENV", str(HOME / ".venv"))
# The day that the interval starts with; `ds` differs from it in a manual run, and has no meaning in
# an
# asset-triggered one.
RUN_DATE = "{{ params.run_date or (data_interval_start | ds) }}"
# One rank gets one executor, and a second attempt of a rank would hang the others.
TRAINING_CONF = {"spark.speculation": "false", "spark.dynamicAllocation.enabled": "false"}


def worker_env() -> dict[str, str]:
    """Return what spark-submit must see: the provider brings a pyspark without jars or scripts."""
    out = {"RECSPARK_CONF": str(HOME / "conf")}
    if VENV:
        out |= {
            "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
            "SPARK_HOME": f"{VENV}/lib/python3.11/site-packages/pyspark",
            "PYSPARK_PYTHON": f"{VENV}/bin/python",
        }
    return out


def submit(task: Task) -> SparkSubmitOperator:
    """Return the operator of one task of the plan."""
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
        # A gate that refuses tonight's lists refuses them again: somebody has to look.
        retries=0 if stage.name == STAGES[-1].name else RETRIES,
    )


def models_ended(upstream: dict[Task, SparkSubmitOperator]) -> BaseOperator:
    """Return the task that succeeds once tasks that `may_fail` have ended, however they did.

    `upstream`: what the next stage needs, of all models. Beside the gate, at the end of the graph, is
    a task that fails where any model did: a run of the DAG is as its last tasks are.
    """
    all_ended = EmptyOperator(task_id="other_models_ended", trigger_rule="all_done")
    every_model = EmptyOperator(task_id="every_model_succeeded")
    for task, operator in upstream.items():
        operator >> every_model
        if task.may_fail:
            operator >> all_ended
    return all_ended


with DAG(
    dag_id="nightly_recommendations",
    description="Raw events of one day to fresh top-N lists in Delta tables",
    schedule=CronDataIntervalTimetable(
        os.environ.get("RECSPARK_SCHEDULE", "0 2 * * *"), timezone="UTC"
    ),
    start_date=datetime(2010, 12, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # one writer of each table
    params={
        "run_date": Param(
            None, type=["null", "string"], description="YYYY-MM-DD, over the schedule's own day"
        )
    },
    default_args={
        "owner": "recspark",
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=4),  # the only sure end of a hung training
    },
    tags=["recspark"],
) as dag:
    operators: dict[str, SparkSubmitOperator] = {}
    tasks = {task.name: task for task in plan(CONFIG)}
    for task in tasks.values():
        operators[task.name] = submit(task)
        upstream = {tasks[name]: operators[name] for name in task.needs}
        # A model's own task is not run after one that failed; a stage of all models is.
        some_may_fail = not task.model and any(need.may_fail for need in upstream)
        if some_may_fail:
            models_ended(upstream) >> operators[task.name]
        for need, operator in upstream.items():
            if not (some_may_fail and need.may_fail):
                operator >> operators[task.name]
