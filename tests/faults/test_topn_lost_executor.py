"""A standalone cluster of two workers loses an executor in the middle of top-N: the same lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import package, standalone, submit

SCORER = """
import os
from pathlib import Path

import numpy as np
from recspark.models.scoring import topk


class Scorer:
    def __init__(self, items, told, size):
        self.items, self.told, self.size = items, told, size

    def score(self, block):
        Path(self.told, f"{os.getpid()}-{block.user_idx[0]}").touch()
        users = np.stack([np.random.default_rng(u).standard_normal(self.size) for u in block.user_idx])
        known = np.ones(len(block), bool)
        return topk.DotScores(users.astype(np.float32), np.asarray(self.items.array), None, known)
"""

JOB = """
import json, os, signal, sys, threading

import numpy as np
import psutil
from recspark import schema, storage
from recspark.config.load import load_config
from recspark.models.scoring import topk
from recspark.session import build_session
from scorer import Scorer

adaptive = "spark.conf.spark.sql.adaptive.enabled=true"  # as every night has it, unlike the tests
settings = load_config("test", [adaptive]).spark.model_copy(update={"master": None})
spark = build_session(settings, "top-n loses an executor")
context = spark.sparkContext
context.addPyFile(sys.argv[1] + "/scorer.py")
n_users, n_items, size = 6_000, 50_000, 16
file = sys.argv[1] + "/items.npy"
rng = np.random.default_rng(1)
storage.write_array(file, rng.standard_normal((n_items, size)).astype(np.float32))


def executor(_):
    yield psutil.Process().parent().parent().pid  # worker, daemon, executor


def kill():
    while len(os.listdir(told)) < 4:  # some parts are done, others under way
        threading.Event().wait(0.05)
    os.kill(victim, signal.SIGKILL)
    killed.append(victim)


def lists(told):
    os.makedirs(told, exist_ok=True)
    queries = spark.range(n_users).selectExpr(
        "id AS user_idx", "CAST(NULL AS " + schema.HISTORY.simpleString() + ") AS history",
        "transform(sequence(0, 49), x -> CAST(pmod(xxhash64(id, x), 50000) AS int)) AS seen",
    ).repartition(24)
    items = topk.Shared(storage.read_array(file, mmap=True))
    vocabulary = np.arange(n_items, dtype=np.int32)
    found = topk.recommend(queries, vocabulary, Scorer(items, told, size), 20).toArrow()
    return found.sort_by([("user_idx", "ascending"), ("rank", "ascending")])


killed = []
told = sys.argv[1] + "/plain"
plain = lists(told)
pids = sorted(set(context.parallelize(range(8), 8).mapPartitions(executor).collect()))
assert len(pids) == 2, pids
victim, told = pids[0], sys.argv[1] + "/killed"
os.makedirs(told)
thread = threading.Thread(target=kill)
thread.start()
again = lists(told)
thread.join()
attempts = len(os.listdir(told)) - len(os.listdir(sys.argv[1] + "/plain"))
print("RESULT", json.dumps({
    "equal": again.equals(plain), "rows": plain.num_rows, "killed": len(killed),
    "gone": not psutil.pid_exists(victim), "done_again": attempts,
}))
spark.stop()
"""


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_executor_changes_no_list(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    (tmp_path / "scorer.py").write_text(SCORER)
    with standalone(tmp_path) as master:
        done = submit(master, job, [str(tmp_path)], package(tmp_path), timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["done_again"] > 0
    del result["done_again"]
    assert result == {"equal": True, "rows": 6_000 * 20, "killed": 1, "gone": True}
