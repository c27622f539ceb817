"""The DAG in a real Airflow: imports, shape, arguments; and a whole night through spark-submit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
DAG_FILE = ROOT / "airflow_dags" / "nightly_recommendations.py"
DAG_ID = "nightly_recommendations"


RANKED = [
    "models=[popular, ease, words, near, best]",
    "models.words={algorithm: 'shop:Words', kind: encoder}",
    "models.near={algorithm: 'shop:Near', needs: [words]}",
    "models.best={algorithm: 'shop:Best', kind: ranker, needs: [ease, near]}",
    "publish={model: best, ladder: [popular]}",
]


@pytest.fixture(scope="module")
def dag() -> Any:
    os.environ["RECSPARK_ENV"] = "local"
    return loaded()


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The DAG of a night with a ranker on two retrievers, one of them built on an encoder. Their
    package need not be where Airflow runs.
    """
    monkeypatch.setenv("RECSPARK_ENV", "local")
    monkeypatch.setenv("RECSPARK_SET", json.dumps(RANKED))
    return loaded()


def loaded() -> Any:
    """The DAG as Airflow reads it with the environment as it is."""
    spec = importlib.util.spec_from_file_location("nightly_recommendations", DAG_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dag


def stages_of(dag: Any) -> list[Any]:
    """The tasks that start a job; the others only wait."""
    return [task for task in dag.tasks if hasattr(task, "application_args")]


def test_the_file_imports_no_spark_and_no_torch() -> None:
    code = (
        "import sys, runpy, time; t = time.time(); import airflow.sdk;"
        "from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator;"
        "before = set(sys.modules); t = time.time();"
        f"runpy.run_path({str(DAG_FILE)!r});"
        "new = set(sys.modules) - before;"
        "print([m for m in new if m.split('.')[0] in ('pyspark', 'torch', 'horovod', 'petastorm')],"
        " time.time() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("[] "), last
    assert float(last.removeprefix("[] ")) < 5


def test_tasks_are_the_stages(dag: Any) -> None:
    from recspark.pipeline.plan import STAGES

    names = [task.task_id.split(".")[0] for task in stages_of(dag)]
    ours = [
        stage for stage in STAGES if stage.name != "encode"
    ]  # the default night encodes nothing
    assert set(names) == {stage.name for stage in ours}
    for stage in STAGES:
        assert (ROOT / "jobs" / f"{stage.name}.py").is_file()
    n_rankers = 1
    for stage in ours:
        n_models = names.count(stage.name)
        assert (
            n_models == n_rankers if stage.name == "examples" else (n_models > 1) == stage.per_model
        )


def test_every_edge_of_a_night_with_a_ranker(ranked: Any) -> None:
    """As the plan has them: tests/pipeline/test_plan.py."""
    upstream = {task.task_id: task.upstream_task_ids for task in stages_of(ranked)}
    waiters = {"other_models_ended"}
    assert {name: ids - waiters for name, ids in upstream.items()} == {
        "ingest": set(),
        "sessionize": {"ingest"},
        "build_features": {"sessionize"},
        "train.popular": {"build_features"},
        "train.ease": {"build_features"},
        "train.words": {"build_features"},
        "encode.words": {"train.words"},
        "train.near": {"encode.words"},
        "recommend.popular": {"train.popular"},
        "recommend.ease": {"train.ease"},
        "recommend.near": {"train.near"},
        "examples.best": {"train.ease", "train.near"},
        "train.best": {"examples.best"},
        "recommend.best": {"train.best", "recommend.ease", "recommend.near"},
        "evaluate": {
            "recommend.popular", "recommend.ease", "encode.words", "recommend.near",
            "recommend.best",
        },
        "publish": {"evaluate"},
    }  # fmt: skip
    jobs = {Path(task.application).stem for task in stages_of(ranked)}
    assert {"encode", "examples"} <= jobs


def test_the_order_is_that_of_the_stages(dag: Any) -> None:
    train = dag.get_task("train.ease")
    assert train.upstream_task_ids == {"build_features"}
    assert train.downstream_task_ids == {"recommend.ease", "examples.lambdamart"}
    assert dag.get_task("publish").downstream_task_ids == set()


def test_a_model_that_nothing_published_needs_may_fail(dag: Any) -> None:
    """`evaluate` waits for it to end, not to succeed; and the run is shown as failed."""
    evaluate, others = dag.get_task("evaluate"), dag.get_task("other_models_ended")
    assert evaluate.trigger_rule == "all_success"
    assert evaluate.upstream_task_ids == {
        "recommend.popular", "recommend.own_items", "recommend.user_knn", "recommend.item_knn",
        "recommend.ease", "recommend.als", "recommend.lambdamart", "other_models_ended",
    }  # fmt: skip
    assert others.trigger_rule == "all_done"
    assert others.upstream_task_ids == {"recommend.multvae"}
    last = dag.get_task("every_model_succeeded")
    assert last.trigger_rule == "all_success"
    assert last.upstream_task_ids == {t for t in dag.task_ids if t.startswith("recommend.")}
    assert last.downstream_task_ids == set()


def test_settings_that_a_night_depends_on(dag: Any) -> None:
    assert dag.max_active_runs == 1
    assert dag.catchup is False
    assert type(dag.timetable).__name__ == "CronDataIntervalTimetable"
    for task in stages_of(dag):
        assert task.execution_timeout is not None, task.task_id
        assert task.owner == "recspark"
        assert task._conn_id == "recspark_spark"
    assert dag.get_task("publish").retries == 0
    assert dag.get_task("ingest").retries == 2


def test_every_date_is_the_data_interval(dag: Any) -> None:
    for task in stages_of(dag):
        arguments = task.application_args
        date = arguments[arguments.index("--run-date") + 1]
        assert "data_interval_start" in date
        assert not any("now()" in a or "{{ ds }}" in a for a in arguments)


def test_each_job_accepts_its_arguments(dag: Any, tmp_path: Path) -> None:
    """The jobs' own parser, in the project's Python, takes what the DAG passes."""
    calls = []
    for task in stages_of(dag):
        arguments = [a if "{{" not in a else "2010-12-09" for a in task.application_args]
        calls.append((Path(task.application).stem, arguments))
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    code = (
        "import json, sys; from recspark.pipeline.job import parser\n"
        "for stage, arguments in json.load(open(sys.argv[1])):\n"
        "    parser(stage).parse_args(arguments)\n"
        "print('all parsed')"
    )
    python = ROOT / ".venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-c", code, str(tmp_path / "calls.json")],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    assert "all parsed" in done.stdout, done.stderr


@pytest.mark.timeout(1500)
def test_a_whole_night_runs(tmp_path: Path) -> None:
    """`airflow dags test`: every stage by SparkSubmitOperator, on a slice of the bundled data.

    The tables stay where they are: `.ci/run` executes the notebooks on them.
    """
    slice_file = tmp_path / "slice.parquet"
    night = ROOT / "build" / "airflow" / "night"
    assert not night.exists(), "scripts/airflow_tests.sh begins with an empty folder"
    code = (
        "import sys, pandas as pd\n"
        "rows = pd.read_parquet('data/online_retail_ii/online_retail_2009_2010.parquet')\n"
        "customer = rows['Customer ID']\n"
        "kept = (customer % 10 == 0) | (customer.isna() & (rows.index % 10 == 0))\n"
        "rows[kept & (rows['InvoiceDate'] >= '2010-10-01')].to_parquet(sys.argv[1])\n"
    )
    python = ROOT / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", code, str(slice_file)], cwd=ROOT, check=True, timeout=120)
    settings = [
        f"paths.root={night}",
        f"source.path={slice_file}",
        "models=[popular, item_knn, lambdamart]",
        "models.lambdamart={needs: [popular, item_knn], n_trees: 20}",
        "examples.n_cutoffs=1",
        "rules.family={kind: cap, by: name, at_most: 1, similarity: 0.5}",
        "publish={model: lambdamart, rules: [family]}",
        "publish.min_full_lists=0.9",
        "evaluate.n_bootstrap=200",
        "n_candidates=20",
    ]
    env = {
        **os.environ,
        "RECSPARK_ENV": "local",  # with Spark's own adaptive plans and compiled code, unlike the tests
        "RECSPARK_SET": json.dumps(settings),
        "RECSPARK_RETRIES": "0",  # a second try would hide the failure of the first
        "AIRFLOW_CONN_RECSPARK_SPARK": '{"conn_type": "spark", "host": "local[2]"}',
    }
    started = time.monotonic()
    with (tmp_path / "night.log").open("w+") as output:
        try:
            done = subprocess.run(
                [str(Path(sys.executable).parent / "airflow"), "dags", "test", DAG_ID, "2010-12-10T02:00:00"],
                env=env, stdout=output, stderr=subprocess.STDOUT, timeout=1400, cwd=tmp_path, check=False,
            )  # fmt: skip
        finally:
            output.seek(0)
            print(output.read()[-6000:])
    assert done.returncode == 0
    print(f"whole night: {time.monotonic() - started:.0f} s")
    check = (
        "import sys; from recspark.config.load import load_config\n"
        "from recspark.session import build_session\n"
        "from recspark.tables.catalog import TableCatalog\n"
        "catalog = TableCatalog(build_session(load_config('test').spark, 'check'), sys.argv[1])\n"
        "rows = catalog.read('recommendations', catalog.version('recommendations'))\n"
        "print('dates', [str(r[0]) for r in rows.select('run_date').distinct().collect()],"
        "'models', sorted(r[0] for r in rows.select('model').distinct().collect()),"
        "'rules', rows.where(\"array_contains(rules, 'family')\").count(),"
        "'rows', rows.count())\n"
    )
    seen = subprocess.run(
        [python, "-c", check, f"{night}/tables"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=True,
    )  # fmt: skip
    last = seen.stdout.strip().splitlines()[-1]
    assert last.startswith("dates ['2010-12-09'] models ")
    assert "'lambdamart'" in last
    n_by_rule, n_rows = (int(n) for n in last.partition(" rules ")[2].split(" rows "))
    assert n_by_rule > 0
    assert n_rows > 1000
