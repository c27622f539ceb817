"""An executor killed in the middle of training costs its tasks, not the run, and changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.cluster import package, standalone, submit

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

JOB = """
import os, signal, sys, threading
import numpy as np, psutil
from pyspark.sql import SparkSession
from recspark.engines.word2vec import train_vectors
from recspark.engines.word2vec_step import Word2Vec

spark = SparkSession.builder.getOrCreate()
context = spark.sparkContext
context.setLogLevel("ERROR")
rng = np.random.default_rng(1)
rows = [(i, (rng.choice(40, 5, replace=False) * 5 + i % 5).tolist()) for i in range(20_000)]
sentences = spark.createDataFrame(rows, "sentence_id long, items array<int>").repartition(4)
settings = Word2Vec(epochs=4, n_blocks=4, n_rotations=4)
items = np.arange(200, dtype=np.int32)
killed = []

def executors(_):
    yield psutil.Process().parent().parent().pid  # worker, daemon, executor

def kill():
    os.kill(victim, signal.SIGKILL)
    killed.append(victim)

def after(text):
    print(text, flush=True)
    if text.startswith("epoch 2") and not killed:
        threading.Timer(0.3, kill).start()  # within the steps of epoch 3

plain = train_vectors(sentences, items, settings, scratch=sys.argv[1])
pids = sorted(set(context.parallelize(range(8), 8).mapPartitions(executors).collect()))
assert len(pids) == 2, pids
victim = pids[0]
assert "java" in psutil.Process(victim).name()
again = train_vectors(sentences, items, settings, scratch=sys.argv[1], progress=after)
assert killed and not psutil.pid_exists(victim)
apart = max(np.abs(plain.inputs - again.inputs).max(), np.abs(plain.outputs - again.outputs).max())
print("SIZE", np.abs(plain.inputs).max(), "APART", apart)
"""


def test_a_killed_executor_changes_nothing(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    with standalone(tmp_path) as master:
        done = submit(master, job, [str(tmp_path / "scratch")], package(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    size, apart = re.search(r"SIZE (\S+) APART (\S+)", done.stdout).groups()  # type: ignore[union-attr]
    assert float(size) > 0.1
    assert float(apart) <= 1e-5
    assert not list((tmp_path / "scratch").rglob("*.*"))
