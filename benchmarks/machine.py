"""Where a figure was measured, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from recspark.config import Config, load_config

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "recspark",
    "pyspark",
    "delta-spark",
    "numpy",
    "torch",
    "horovod",
    "petastorm",
    "pyarrow",
    "numba",
    "implicit",
    "gensim",
)


def config(spark: Sequence[str], *, smoke: bool, env: str = "local") -> Config:
    """Return the settings of a benchmark: those of `env` with some of `spark` changed.

    In smoke mode the tests' environment, where Spark compiles no plans: rows are few there, and the
    compiler takes most of the time.
    """
    return load_config("test" if smoke else env, [f"spark.{setting}" for setting in spark])


def about() -> dict[str, Any]:
    """Return processor, cores, memory and versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [
        line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")
    ]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "measured_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average": os.getloadavg(),
    }


def write(name: str, command: str, figures: dict[str, Any]) -> None:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"command": command, "machine": about(), **figures}, indent=1) + "\n"
    )
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
