"""Two ranks on the two executors of a local cluster, with the package shipped by `--py-files`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = """
import json
from recspark.config import Train
from recspark.config.load import load_config
from recspark.session import build_session
from recspark.train.launch import launcher

adaptive = "spark.conf.spark.sql.adaptive.enabled=true"  # as every night has it, unlike the tests
settings = load_config("test", [adaptive]).spark.model_copy(update={"master": "local-cluster[2,1,1024]"})
spark = build_session(settings, "ranks on executors")


def work(comm):
    import recspark
    import torch

    return recspark.__file__, float(comm.allreduce(torch.ones(1))[0])


def main():
    told = []
    results = launcher(spark, Train(ranks=2, timeout_s=200), tell=told.append).run(work)
    print("RESULT", json.dumps([[vars(r.location), *r.value] for r in results]), flush=True)
    print("TOLD", json.dumps(told), flush=True)


main()
spark.stop()
"""


@pytest.mark.cluster
@pytest.mark.horovod
@pytest.mark.slow
@pytest.mark.torch
def test_ranks_run_on_executors_from_the_shipped_package(tmp_path: Path) -> None:
    package = shutil.make_archive(str(tmp_path / "shipped"), "zip", ROOT, "recspark")
    job = tmp_path / "job.py"
    job.write_text(JOB)
    environment = {
        **os.environ,
        "RECSPARK_CONF": str(ROOT / "conf"),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_WORKER_DIR": str(tmp_path / "work"),
        "SPARK_LOCAL_DIRS": str(tmp_path / "local"),
    }
    submit = Path(sys.executable).parent / "spark-submit"
    done = subprocess.run(
        [str(submit), "--master", "local-cluster[2,1,1024]", "--py-files", package, str(job)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert "RESULT" in lines, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads(lines["RESULT"])
    assert [total for _, _, total in results] == [2.0, 2.0]
    assert {place["executor"] for place, _, _ in results} == {"0", "1"}
    assert all("shipped.zip" in file for _, file, _ in results)
    told = json.loads(lines["TOLD"])
    assert all("executor" in line for line in told)
    assert len(told) == 2
