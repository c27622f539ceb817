"""A million items: an executor stays within 4 GB, and what it holds hardly follows the catalogue."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


def measure(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.topn_memory", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    return dict(json.loads(lines[0].removeprefix("RESULT ")))


def test_a_million_items_within_four_gigabytes() -> None:
    large = measure()
    assert (large["items"], large["users"], large["rank"], large["k"]) == (
        1_000_000,
        20_000,
        64,
        100,
    )
    assert 500 < large["executor_resident_mb"] < 4096
    small = measure("--items", "50000")
    # Two workers map the 256 MB of the matrix; a copy in each would be as much again.
    apart = large["executor_proportional_mb"] - small["executor_proportional_mb"]
    assert apart < 256 * 1.9
