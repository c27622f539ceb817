"""The driver holds nothing user-sized: ten times the users, the same memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]
USERS = 3_000
GROWTH = 1.10


def peaks(folder: Path, users: int, *options: str) -> dict[str, Any]:
    """Run a night of planted users on local-cluster in a process of its own; return its peaks in
    MB."""
    conf = folder / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "sources" / "planted.yaml").write_text(
        "kind: mapping\npath: planted\narchive: true\nformat: parquet\n"
        "columns: {user_id: user_id, item_id: item_id, event_at: event_at}\n"
        "constants: {event_type: purchase}\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "e2e" / "memory_probe.py"), str(users), str(folder), *options],
        env={**os.environ, "RECSPARK_CONF": str(conf), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    return found


def test_ten_times_the_users_take_no_more(tmp_path: Path) -> None:
    small = peaks(tmp_path / "1", USERS)
    large = peaks(tmp_path / "10", 10 * USERS)
    for name in ("python_mb", "jvm_mb"):
        assert large[name] < GROWTH * small[name], (name, small, large)
    leaky = peaks(tmp_path / "leak", 10 * USERS, "collect")
    assert leaky["python_mb"] > GROWTH * small["python_mb"], "a collect of users must be noticed"
