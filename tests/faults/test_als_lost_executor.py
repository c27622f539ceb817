"""A standalone cluster of two workers loses an executor in the middle of ALS: the same factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import package, standalone, submit

JOB = """
import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import psutil
from recspark.config.load import load_config
from recspark.engines.als import BlockedAls, Plan
from recspark.engines.als_objective import Objective
from recspark.models.factors.als import pairs
from recspark.models.weights import HistoryWeights
from recspark.session import build_session
from recspark.testing import synth

adaptive = "spark.conf.spark.sql.adaptive.enabled=true"  # as every night has it, unlike the tests
settings = load_config("test", [adaptive]).spark.model_copy(update={"master": None})
spark = build_session(settings, "als loses an executor")
data = synth.dataset(spark, synth.power_law(400, 80))
frame = pairs(data, data.vocabulary(), HistoryWeights(0, None, "sum"))
killed, told = [], []


def executor(_):
    for process in psutil.Process().parents():
        if "CoarseGrainedExecutorBackend" in " ".join(process.cmdline()):
            return process.pid


def kill(text):
    told.append(text)
    if "iteration 4 of" in text:
        pid = spark.sparkContext.parallelize(range(2), 2).map(executor).collect()[0]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)


def fit(plan):
    with BlockedAls(frame, 80, Objective(0.1, 5.0), plan) as als:
        als.run()
        return als.item_factors()


plan = Plan(16, 6, n_blocks=4, checkpoint_every=3)
whole = fit(plan)
found = {}
for name, changed in {
    "lineage": {"checkpoint_every": 10},
    "checkpoint": {"scratch": sys.argv[1]},
    "sent": {"scratch": sys.argv[1] + "/sent", "broadcast_bytes": 0},
}.items():
    found[name] = float(abs(fit(replace(plan, progress=kill, **changed)) - whole).max())
print("RESULT", json.dumps({"difference": found, "killed": len(killed), "told": len(told)}))
spark.stop()
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_a_lost_executor_costs_a_recomputation(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    with standalone(tmp_path) as master:
        done = submit(master, job, [str(tmp_path / "scratch")], package(tmp_path), timeout=280)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["killed"] == 3
    assert result["told"] == 3 * 6  # each run went on where it was, none began anew
    assert result["difference"] == {"lineage": 0, "checkpoint": 0, "sent": 0}
