"""Where a figure was measured, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from recspark.config.load import load_config
from recspark.session import build_session

RESULTS = Path(__file__).parent / "results"
# Workers do not look into the folder they are started in: what the benchmarks send them is here.
_WORKERS = {"spark.executorEnv.PYTHONPATH": str(Path(__file__).parents[1])}
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


@contextmanager
def session(
    name: str,
    spark: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
    *,
    smoke: bool = False,
    env: str = "local",
) -> Iterator[SparkSession]:
    """Give a Spark session with the settings of `env`, some of `spark` changed and `extra` over them.

    In smoke mode all benchmarks of a process share one with the settings of the tests: rows are few
    there, and a session with its Python workers takes longer to start than to read them.
    """
    if smoke:
        yield build_session(
            load_config("test").spark, "benchmarks", _WORKERS
        )  # or the one that there is
        return
    config = load_config(env, [f"spark.{setting}" for setting in spark])
    shared = SparkSession.getActiveSession()
    if shared is not None:
        shared.stop()
    own = build_session(config.spark, f"benchmark {name}", {**_WORKERS, **(extra or {})})
    try:
        yield own
    finally:
        own.stop()


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
