"""The graph of a night follows from the settings, without Spark."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recspark.config.load import load_config
from recspark.errors import ConfigError
from recspark.pipeline.cutoffs import Cutoffs
from recspark.pipeline.plan import STAGES, find_stage, needed_tasks, plan, stages_before

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
    assert len(before) == len(tasks) == 5 + 2 * len(models)
    # Everything is done for the last task, and nothing needs itself.
    last = needed_tasks(tasks, STAGES[-1])
    assert {task.name for task in last} == before - {"publish"}


RANKED = [
    "models=[popular, ease, words, near, best, wide]",
    "models.words={algorithm: 'shop:Words', kind: encoder}",
    "models.near={algorithm: 'shop:Near', needs: [words]}",
    "models.best={algorithm: 'shop:Best', kind: ranker, needs: [ease, near, words]}",
    "models.wide={algorithm: 'shop:Best', kind: ranker, needs: [popular]}",
]


def test_every_edge_of_a_night_with_a_ranker_on_two_retrievers_and_an_encoder() -> None:
    """One of the retrievers is built on the encoder, too; another ranker is a challenger."""
    tasks = plan(load_config("test", [*RANKED, "publish={model: best, ladder: [popular]}"]))
    assert {task.name: task.needs for task in tasks} == {
        "ingest": (),
        "sessionize": ("ingest",),
        "build_features": ("sessionize",),
        "train.popular": ("build_features",),
        "train.ease": ("build_features",),
        "train.words": ("build_features",),
        "encode.words": ("train.words",),
        "train.near": ("encode.words",),
        "recommend.popular": ("train.popular",),
        "recommend.ease": ("train.ease",),
        "recommend.near": ("train.near",),
        "examples.best": ("train.ease", "train.near", "encode.words"),
        "train.best": ("examples.best",),
        "recommend.best": ("train.best", "recommend.ease", "recommend.near"),
        "examples.wide": ("train.popular",),
        "train.wide": ("examples.wide",),
        "recommend.wide": ("train.wide", "recommend.popular"),
        "evaluate": (
            "recommend.popular", "recommend.ease", "encode.words", "recommend.near",
            "recommend.wide", "recommend.best",
        ),
        "publish": ("evaluate",),
    }  # fmt: skip
    # What the published ranker is built on is needed, however deep; the challenger is not.
    assert {task.model for task in tasks if task.may_fail} == {"wide"}
    before: set[str] = set()
    for task in tasks:
        assert before.issuperset(task.needs), task.name
        before.add(task.name)


def test_a_task_reads_what_the_stages_that_it_needs_left() -> None:
    config = load_config("test", RANKED)
    first = {"ingest", "sessionize", "build_features"}
    assert stages_before(config, "train", "ease") == first
    assert stages_before(config, "train", "near") == first | {"train", "encode"}
    assert stages_before(config, "train", "best") == first | {"train", "encode", "examples"}
    assert "recommend" in stages_before(config, "recommend", "best")
    assert stages_before(config, None) == {stage.name for stage in STAGES}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["models.near.needs=[wrds]"], "near.needs names 'wrds', .* Did you mean 'words'"),
        (["models.near.needs=words"], "models.near.needs = 'words' is no list of names"),
        (["models.near.needs=[words, words]"], "names a model twice"),
        (["models.words.needs=[near]"], "in a circle: words -> near -> words"),
        (["models.ease.needs=[ease]"], "in a circle: ease -> ease"),
        (["models.near.needs=[best]"], "in a circle: near -> best -> near"),
    ],
)
def test_needs_that_cannot_be_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("test", [*RANKED, *settings])


def test_nothing_is_built_on_a_ranker() -> None:
    with pytest.raises(ConfigError, match="model 'best' needs the ranker wide"):
        plan(load_config("test", [*RANKED, "models.best.needs=[ease, wide]"]))
    for needs in ([], ["words"]):
        with pytest.raises(ConfigError, match="model 'best' is a ranker and needs a retriever"):
            plan(load_config("test", [*RANKED, f"models.best.needs={needs}"]))
    with pytest.raises(ConfigError, match="model 'near': kind = 'judge': one of retriever, ranker"):
        plan(load_config("test", [*RANKED, "models.near.kind=judge"]))


def test_a_stage_runs_for_the_models_of_its_kinds() -> None:
    config = load_config("test", RANKED)
    by_name = {stage.name: stage.models(config) for stage in STAGES}
    assert by_name["train"] == ("popular", "ease", "words", "near", "wide", "best")
    assert by_name["encode"] == ("words",)
    assert by_name["examples"] == ("wide", "best")
    assert by_name["recommend"] == ("popular", "ease", "near", "wide", "best")
    assert by_name["publish"] == ("",)
    with pytest.raises(ConfigError, match="stage 'encode' has nothing to do for ranker 'best'"):
        find_stage("encode").models(config, ["best"])
    with pytest.raises(ConfigError, match=r"'bst' is not among this night's\. Did you mean 'best'"):
        find_stage("train").models(config, ["bst"])


def test_a_ranker_that_learns_nothing_has_no_examples() -> None:
    """Its retrievers are not fitted for examples either, where no other ranker learns from them."""
    blends = [
        "models=[popular, ease, rrf, fixed, mine, switch]",
        "models.rrf.needs=[ease, popular]",
        "models.fixed={algorithm: switch, learns: false, needs: [ease, popular]}",
        "models.mine={algorithm: 'shop:Best', kind: ranker, learns: false, needs: [popular]}",
        "models.switch.needs=[popular]",
    ]
    config = load_config("test", blends)
    edges = {task.name: task.needs for task in plan(config)}
    assert edges["train.rrf"] == edges["train.fixed"] == ("train.ease", "train.popular")
    assert edges["recommend.rrf"] == ("train.rrf", "recommend.ease", "recommend.popular")
    assert edges["train.mine"] == ("train.popular",)
    assert find_stage("examples").models(config) == ("switch",)
    assert [name for name in edges if name.startswith("examples.")] == ["examples.switch"]
    with pytest.raises(ConfigError, match="stage 'examples' has nothing to do for ranker 'rrf'"):
        find_stage("examples").models(config, ["rrf"])
    night = Cutoffs(date(2024, 5, 31), config)
    assert len(night.examples) > 0
    without = load_config("test", [*blends, "models=[popular, ease, rrf, fixed, mine]"])
    assert Cutoffs(date(2024, 5, 31), without).examples == ()


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
