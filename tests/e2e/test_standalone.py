"""Every job by spark-submit on a standalone cluster of two workers, the package shipped as a
zip."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import psutil
import pytest
from pyspark.sql import SparkSession

from recspark.config.load import load_config
from recspark.pipeline.plan import plan
from recspark.tables.catalog import TableCatalog
from recspark.testing.executors import connected_executors
from tests.conftest import NIGHT, ROOT
from tests.e2e.cluster import package, standalone, submit

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]

SMALL = (
    "evaluate.n_bootstrap=50", "spark.shuffle_partitions=2", "features.history_buckets=4",
    "train.ranks=2",
)  # fmt: skip


def arguments_of(settings: list[str]) -> list[str]:
    """The arguments of a job with these settings."""
    set_options = [part for setting in settings for part in ("--set", setting)]
    return ["--run-date", NIGHT, "--env", "cluster", *set_options]


def test_a_night_on_two_workers(retail_slice: Path, tmp_path: Path) -> None:
    settings = [
        f"paths.root={tmp_path}/night", f"source.path={retail_slice}",
        "models=[popular, item_knn, ease, multvae]", "models.multvae.epochs=2", *SMALL,
    ]  # fmt: skip
    arguments = arguments_of(settings)
    shipped = package(tmp_path)
    printed = {}
    with standalone(tmp_path) as master:
        where = tmp_path / "where.py"
        where.write_text(
            "from pyspark.sql import SparkSession\n"
            "sc = SparkSession.builder.getOrCreate().sparkContext\n"
            "def place(_):\n"
            "    import recspark\n"
            "    return [recspark.__file__]\n"
            "print('IMPORTED', sorted(set(sc.parallelize(range(2), 2).mapPartitions(place).collect())))\n"
        )
        done = submit(master, where, [], shipped)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "recspark.zip/recspark/__init__.py" in done.stdout
        assert str(ROOT / "recspark") not in done.stdout
        for stage in dict.fromkeys(task.stage for task in plan(load_config("cluster", settings))):
            confs = ("spark.task.cpus=1", "spark.speculation=false") if stage.trains else ()
            printed[stage.name] = printed_by(master, stage.name, arguments, shipped, *confs)
    ranks = re.findall(r"rank (\d)[^\n]*host (\S+)[^\n]*executor (\S+)", printed["train"])
    print(printed["train"])
    assert {rank for rank, _, _ in ranks} == {"0", "1"}
    assert len({executor.strip(",") for _, _, executor in ranks[:2]}) == 2
    assert re.search(r"publish: [\d,]+ rows", printed["publish"])


def test_a_ranked_night_loses_an_executor_while_the_ranker_trains(
    spark: SparkSession, retail_slice: Path, tmp_path: Path
) -> None:
    """Two retrievers, a ranker and rules: the trees are grown anew, and the night goes on."""
    settings = [
        f"paths.root={tmp_path}/night", f"source.path={retail_slice}",
        "models=[popular, own_items, lambdamart]", "models.lambdamart.needs=[popular, own_items]",
        "models.lambdamart.n_trees=1500", "examples.n_cutoffs=1",
        "rules.family={kind: cap, by: name, at_most: 1, similarity: 0.5}", "publish.rules=[family]",
        *SMALL,
    ]  # fmt: skip
    shipped = package(tmp_path)
    printed, killed = {}, []
    with standalone(tmp_path) as master:
        for task in plan(load_config("cluster", settings)):
            arguments = arguments_of(settings)
            arguments += ["--model", task.model] if task.model else []
            ends = threading.Event()
            if task.name == "train.lambdamart":
                killer = threading.Thread(target=kill_one, args=[tmp_path, killed, ends])
                killer.start()
            try:
                printed[task.name] = printed_by(master, task.stage.name, arguments, shipped)
            finally:
                ends.set()
    assert len(killed) == 1
    assert "growing the trees failed, and is tried once more" in printed["train.lambdamart"]
    catalog = TableCatalog(spark, f"{tmp_path}/night/tables")
    rows = catalog.read("recommendations", catalog.version("recommendations")).toPandas()
    main = rows[rows["list"] == "main"]
    assert (main["model"] == "lambdamart").mean() > 0.9
    assert main["rules"].map(lambda rules: "family" in rules).any()


def printed_by(master: str, stage: str, arguments: list[str], shipped: Path, *confs: str) -> str:
    """Submit the job of a stage and return all that it prints."""
    done = submit(master, ROOT / "jobs" / f"{stage}.py", arguments, shipped, *confs)
    assert done.returncode == 0, f"{stage}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
    return done.stdout + done.stderr


def kill_one(folder: Path, killed: list[int], ends: threading.Event) -> None:
    """Kill an executor of the cluster in `folder` as soon as two executors train together."""

    def is_in_folder(executor: psutil.Process) -> bool:
        return executor.cwd().startswith(str(folder))

    while not ends.wait(0.1):
        for victim in connected_executors(is_in_folder)[:1]:
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)
            return
