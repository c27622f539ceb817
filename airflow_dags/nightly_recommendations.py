"""The nightly run as an Airflow DAG, built from the stage list: one spark-submit per stage and
model.

Imports neither Spark nor torch. What the deployment decides comes from environment variables:

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

import yaml
from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import DAG, Param
from airflow.timetables.interval import CronDataIntervalTimetable

HOME = Path(os.environ.get("RECSPARK_HOME") or Path(__file__).resolve().parent.parent)
if str(HOME) not in sys.path:
    sys.path.insert(0, str(HOME))

from recspark.pipeline.run import STAGES, Stage  # noqa: E402

ENV = os.environ.get("RECSPARK_ENV", "cluster")
SETTINGS = json.loads(os.environ.get("RECSPARK_SET", "[]"))
RETRIES = int(os.environ.get("RECSPARK_RETRIES", "2"))
VENV = os.environ.get("RECSPARK_VENV", str(HOME / ".venv"))
# The day that the interval starts with; `ds` differs from it in a manual run, and has no meaning in
# an
# asset-triggered one.
RUN_DATE = "{{ params.run_date or (data_interval_start | ds) }}"
# One rank gets one executor, and a second attempt of a rank would hang the others.
TRAINING_CONF = {"spark.speculation": "false", "spark.dynamicAllocation.enabled": "false"}


def models() -> list[str]:
    """Return the models of the night: `--set models=...`, else the YAML files."""
    for setting in SETTINGS:
        key, _, value = setting.partition("=")
        if key == "models":
            return list(yaml.safe_load(value))
    found: list[str] = []
    for path in (HOME / "conf" / "base.yaml", HOME / "conf" / "env" / f"{ENV}.yaml"):
        found = (yaml.safe_load(path.read_text()) or {}).get("models", found)
    return found


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


def submit(stage: Stage, model: str = "") -> SparkSubmitOperator:
    """Return the task of one stage, of one model where the stage runs per model."""
    arguments = ["--run-date", RUN_DATE, "--env", ENV]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    if model:
        arguments += ["--model", model]
    return SparkSubmitOperator(
        task_id=f"{stage.name}.{model}" if model else stage.name,
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
    before: list[SparkSubmitOperator] = []
    per_model: dict[str, SparkSubmitOperator] = {}
    for stage in STAGES:
        if stage.per_model:
            for model in models():
                task = submit(stage, model)
                for upstream in [per_model[model]] if model in per_model else before:
                    upstream >> task
                per_model[model] = task
        else:
            task = submit(stage)
            for upstream in list(per_model.values()) or before:
                upstream >> task
            before, per_model = [task], {}
