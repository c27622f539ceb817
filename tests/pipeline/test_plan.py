"""The graph of a night follows from the settings, without Spark."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark.errors import ConfigError
from recspark.layers import load_config
from recspark.pipeline.plan import STAGES, find_stage, needed_tasks, plan

MODELS = ["popular", "item_knn", "ease", "als", "multvae"]


def test_every_edge_of_a_small_night() -> None:
    config = load_config(
        "test", ["models=[als, ease, popular]", "publish={model: ease, ladder: [popular]}"]
    )
    edges = {task.name: task.needs for task in plan(config)}
    assert edges == {
        "ingest": (),
        "sessionize": ("ingest",),
        "build_features": ("sessionize",),
        "train.als": ("build_features",),
        "train.ease": ("build_features",),
        "train.popular": ("build_features",),
        "recommend.als": ("train.als",),
        "recommend.ease": ("train.ease",),
        "recommend.popular": ("train.popular",),
        "evaluate": ("recommend.als", "recommend.ease", "recommend.popular"),
        "publish": ("evaluate",),
    }
    assert {task.name for task in plan(config) if task.may_fail} == {"train.als", "recommend.als"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(MODELS), min_size=1, unique=True))
def test_a_task_comes_after_all_that_it_needs(models: list[str]) -> None:
    tasks = plan(load_config("test", [f"models=[{', '.join(models)}]"]))
    before: set[str] = set()
    for task in tasks:
        assert before.issuperset(task.needs)
        before.add(task.name)
    assert len(before) == len(tasks) == len(STAGES) + 2 * (len(models) - 1)
    # Everything is done for the last task, and nothing needs itself.
    last = needed_tasks(tasks, STAGES[-1])
    assert {task.name for task in last} == before - {"publish"}


def test_a_stage_is_found_by_its_name() -> None:
    assert find_stage("train").trains
    with pytest.raises(ConfigError, match=r"no stage is called 'trains'\. Did you mean 'train'\?"):
        find_stage("trains")


def test_the_command_prints_it_without_spark_or_torch() -> None:
    code = (
        "import sys; from recspark.cli import main; sys.argv = ['recspark', 'plan', '--json', '--env', 'test'];\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in sys.modules if m in ('pyspark', 'torch', 'airflow')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    tasks = json.loads(done.stdout)
    assert [task["task"] for task in tasks] == [t.name for t in plan(load_config("test"))]
    assert {"needs", "may_fail", "stage", "model"} < set(tasks[0])
