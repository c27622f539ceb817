"""Every job by spark-submit on a standalone cluster of two workers, the package shipped as a
zip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recspark.config.load import load_config
from recspark.pipeline.plan import plan
from tests.conftest import NIGHT, ROOT
from tests.e2e.cluster import package, standalone, submit

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_a_night_on_two_workers(retail_slice: Path, tmp_path: Path) -> None:
    settings = [
        f"paths.root={tmp_path}/night", f"source.path={retail_slice}",
        "models=[popular, item_knn, ease, multvae]", "models.multvae.epochs=2", "train.ranks=2",
        "evaluate.n_bootstrap=50", "spark.shuffle_partitions=2", "features.history_buckets=4",
    ]  # fmt: skip
    arguments = ["--run-date", NIGHT, "--env", "cluster"]
    for setting in settings:
        arguments += ["--set", setting]
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
            done = submit(master, ROOT / "jobs" / f"{stage.name}.py", arguments, shipped, *confs)
            assert done.returncode == 0, (
                f"{stage.name}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
            )
            printed[stage.name] = done.stdout
    ranks = re.findall(r"rank (\d)[^\n]*host (\S+)[^\n]*executor (\S+)", printed["train"])
    print(printed["train"])
    assert {rank for rank, _, _ in ranks} == {"0", "1"}
    assert len({executor.strip(",") for _, _, executor in ranks[:2]}) == 2
    assert re.search(r"publish: [\d,]+ rows", printed["publish"])
