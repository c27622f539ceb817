#!/usr/bin/env bash
# The DAG tests, in .venv-airflow. Airflow keeps its database under build/airflow; the jobs that the DAG
# submits run with the Spark and the Python of .venv.
#
#   scripts/airflow_tests.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

export AIRFLOW_HOME=$root/build/airflow
export AIRFLOW__CORE__DAGS_FOLDER=$root/airflow_dags
export AIRFLOW__CORE__LOAD_EXAMPLES=False
export AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=sqlite:///$AIRFLOW_HOME/airflow.db
export AIRFLOW__USAGE_DATA_COLLECTION__ENABLED=False
# spark-submit comes from .venv: the apache-spark provider brings only a client without jars.
export PATH=$root/.venv/bin:$PATH
export SPARK_HOME=$root/.venv/lib/python3.11/site-packages/pyspark
export PYSPARK_PYTHON=$root/.venv/bin/python PYSPARK_DRIVER_PYTHON=$root/.venv/bin/python

# A JVM a task, each over in seconds: the second compiler would not pay for itself.
export SPARK_SUBMIT_OPTS="-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m"

rm -rf "$AIRFLOW_HOME"
mkdir -p "$AIRFLOW_HOME"
.venv-airflow/bin/airflow db migrate >"$AIRFLOW_HOME/migrate.log" 2>&1 || { cat "$AIRFLOW_HOME/migrate.log" >&2; exit 1; }

# Airflow's own warnings are not ours to fix, and the fixtures of tests/conftest.py need a full pyspark.
exec .venv-airflow/bin/python -m pytest -m airflow --confcutdir=tests/dags -W default tests/dags "$@"
