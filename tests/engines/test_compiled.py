"""Compiled functions shipped as a zip: kept where HOME can be written, compiled anew elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

SOURCE = """
from recspark.engines.compiled import compiled

@compiled
def double(x):
    return 2 * x
"""
ASK = "from shipped import double; print(double(21), sum(double.stats.cache_hits.values()))"
ROOT = Path(__file__).resolve().parents[2]


def test_a_zip_is_compiled_once_or_without_a_place_to_keep_it(tmp_path: Path) -> None:
    package = tmp_path / "shipped.zip"
    with zipfile.ZipFile(package, "w") as out:
        out.writestr("shipped.py", SOURCE)

    def ask(home: str) -> str:
        env = {"PYTHONPATH": f"{package}:{ROOT}", "HOME": home, "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [ask(str(tmp_path)), ask(str(tmp_path))] == ["42 0", "42 1"]
    assert ask("/proc/nowhere") == "42 0"
