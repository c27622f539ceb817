"""A standalone cluster of two workers loses an executor while trees grow: they are grown anew, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import package, standalone, submit

JOB = """
import json
import logging
import os
import signal
import sys
import threading
import time

import numpy as np
from recspark.config import Train
from recspark.config.load import load_config
from recspark.data.feature_encoding import Encoding
from recspark.engines.boosting import Boosting, grow_trees
from recspark.errors import RankFailedError
from recspark.session import build_session
from recspark.testing.executors import connected_executors

logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
adaptive = "spark.conf.spark.sql.adaptive.enabled=true"  # as every night has it, unlike the tests
settings = load_config("test", [adaptive]).spark.model_copy(update={"master": None})
spark = build_session(settings, "trees lose an executor")
rng = np.random.default_rng(1)
rows = spark.createDataFrame(
    [
        (user, item, float(rng.random() < 0.3), rng.random(20).tolist(), [])
        for user in range(300)
        for item in range(20)
    ],
    "user_idx bigint, item_idx int, label float, numbers array<float>, fields array<int>",
).repartition(2).persist()
rows.count()
encoding = Encoding(tuple(f"f{n}" for n in range(20)), {})
train = Train(ranks=2, timeout_s=60)


def grow(n_trees):
    params = {"objective": "rank:ndcg", "tree_method": "hist", "max_bin": 64, "seed": 1}
    return grow_trees(rows, ["user_idx"], ["item_idx"], encoding, Boosting(params, n_trees, train))


def of_this_application(executor):
    driver = ":" + spark.conf.get("spark.driver.port") + " "
    return driver in " ".join(executor.cmdline()) and executor.pid not in killed


def kill(times):
    for _ in range(times):
        while not (victims := connected_executors(of_this_application)):
            time.sleep(0.1)
        os.kill(victims[0].pid, signal.SIGKILL)
        killed.append(victims[0].pid)


def grown(times):
    thread = threading.Thread(target=kill, args=[times], daemon=True)
    thread.start()
    try:
        return grow(n_trees)
    except RankFailedError as error:
        return str(error)
    finally:
        thread.join(60)


n_trees = int(sys.argv[1])
killed = []
whole = grow(n_trees)
again = grown(1)
told = grown(2)
told = told if isinstance(told, str) else "nothing"
print("RESULT", json.dumps({"equal": again == whole, "killed": len(killed), "told": told}))
spark.stop()
"""


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_executor_costs_one_more_try(tmp_path: Path) -> None:
    """One loss: the same trees. Two losses: a named error that says what to do."""
    job = tmp_path / "job.py"
    job.write_text(JOB)
    with standalone(tmp_path) as master:
        done = submit(master, job, ["1500"], package(tmp_path), timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert "failed twice" in result["told"], result
    assert "spark.executor.memoryOverhead" in result["told"]
    del result["told"]
    assert result == {"equal": True, "killed": 3}
    assert "growing the trees failed, and is tried once more" in done.stdout + done.stderr
