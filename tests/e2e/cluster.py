"""A real standalone cluster of this machine: Master and Workers from the pip package, ended by
pid."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyspark

from tests.conftest import ROOT

SPARK_HOME = Path(pyspark.__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def standalone(folder: Path, workers: int = 2, memory: str = "2g") -> Iterator[str]:
    """Give the master's URL of a cluster with `workers` workers of one core each."""
    port, ui = free_port(), free_port()
    env = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    spark_class = SPARK_HOME / "bin" / "spark-class"
    url = f"spark://127.0.0.1:{port}"
    commands = [
        ["org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(ui)],
        *[
            ["org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", "--cores", "1", "--memory", memory,
             "--work-dir", str(folder / f"worker{n}"), "--webui-port", str(free_port()), url]
            for n in range(workers)
        ],
    ]  # fmt: skip
    processes = []
    try:
        for n, command in enumerate(commands):
            log = (folder / f"daemon{n}.log").open("wb")
            processes.append(
                subprocess.Popen(
                    [spark_class, *command], env=env, stdout=log, stderr=log, start_new_session=True
                )
            )
            if n == 0:
                wait_for(lambda: "ALIVE" in page(ui))
        wait_for(lambda: page(ui).count('"state" : "ALIVE"') >= workers)
        yield url
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def page(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def wait_for(ready: object, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError("the cluster did not come up")
        time.sleep(0.5)


def package(folder: Path) -> Path:
    """Zip the package as it is shipped with a job."""
    path = folder / "recspark.zip"
    with zipfile.ZipFile(path, "w") as out:
        for source in sorted((ROOT / "recspark").rglob("*.py")):
            out.write(source, source.relative_to(ROOT))
    return path


def submit(
    master: str,
    job: Path,
    arguments: Sequence[str],
    py_files: Path,
    *confs: str,
    timeout: int = 900,
) -> subprocess.CompletedProcess[str]:
    """Run one job by spark-submit from a folder that is not the checkout."""
    env = {
        **os.environ,
        "PYSPARK_PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RECSPARK_CONF": str(ROOT / "conf"),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    env.pop("PYTHONPATH", None)
    command = [
        str(SPARK_HOME / "bin" / "spark-submit"), "--master", master, "--py-files", str(py_files),
        "--driver-memory", "1500m", "--executor-memory", "1500m", "--conf", "spark.ui.enabled=false",
        *[part for conf in confs for part in ("--conf", conf)],
        str(job), *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=py_files.parent,
        check=False,
    )
