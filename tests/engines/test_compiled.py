"""Compiled functions work from a zip, as `--py-files` ships them, and without a place for a cache."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import numpy as np
from recspark.engines import word2vec_kernels as kernels
assert ".zip" in kernels.__file__
print(kernels.mix(np.uint64(0)))
"""


@pytest.mark.parametrize("home", ["home", "no folder"])
def test_a_zip_is_compiled_with_and_without_a_home(home: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        for file in (ROOT / "recspark").rglob("*.py"):
            archive.write(file, file.relative_to(ROOT))
    (tmp_path / "no folder").write_text("a file is no folder")
    place = {
        "HOME": str(tmp_path / home),
        "XDG_CACHE_HOME": str(tmp_path / home),
        "PYTHONPATH": str(tmp_path / "app.zip"),
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**{k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}, **place},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "0"
    kept = list(tmp_path.rglob("*.nbi"))
    assert bool(kept) == (home == "home")
