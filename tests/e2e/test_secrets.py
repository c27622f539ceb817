"""No secret stands in anything that a night leaves or says; and who a night listens to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from recspark.pipeline.context import RunContext
from tests.conftest import NIGHT, PLANTED, ROOT, small_settings
from tests.test_session import hostile_folder

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]
SECRETS = ("planted/Secret", "plantedSignature", "plantedPassword")


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Give the name and content of each file below `folder`, Parquet as its values."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = str(file.relative_to(folder))
            yield name, file.read_bytes().decode("latin-1")
            if file.suffix == ".parquet":
                yield name, json.dumps(pq.read_table(file).to_pylist(), default=str)


def holding(wanted: Iterable[str], found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (secret, file) where a text of `found` holds one of `wanted`, JSON's escapes or not."""
    return [
        (secret, name)
        for name, text in found
        for secret in wanted
        if secret in text or secret.replace("/", "\\/") in text
    ]


def test_a_night_stores_no_secret(small_night: RunContext) -> None:
    root = Path(small_night.catalog.root).parent
    assert small_night.config.spark.conf.items() >= PLANTED.items()  # Spark got them
    everything = list(texts(root))
    assert holding(SECRETS, everything) == []
    # What is stored beside them is found: the settings in `runs`, the names of the artifacts.
    found = {
        name.split("/")[0] + "/" + name.split("/")[1]
        for _, name in holding(["popular"], everything)
    }
    assert {"tables/runs", "artifacts/popular"} <= {place.split(".")[0] for place in found}
    config = json.loads(next(iter(_configs(small_night))))
    assert config["spark"]["conf"]["spark.hadoop.fs.s3a.secret.key"] == "***"
    assert config["spark"]["conf"]["spark.hadoop.planted.uri"] == "https://me:***@store.example/x"


def _configs(night: RunContext) -> set[str]:
    rows = night.catalog.read("runs", night.catalog.version("runs")).select("config").collect()
    return {row["config"] for row in rows}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.horovod
def test_a_night_of_a_process_of_its_own(retail_slice: Path, tmp_path: Path) -> None:
    """Started beside modules it must not run, with two ranks and all its logs; nobody but this
    machine can reach it, and no file, log or command line holds a secret.
    """
    folder = hostile_folder(tmp_path / "hostile")
    root, own = tmp_path / "root", tmp_path / "own.yaml"
    conf = "\n".join(f"    {name}: '{value}'" for name, value in PLANTED.items())
    own.write_text(f"spark:\n  master: local[2]\n  conf:\n{conf}\n")
    settings = [s for s in small_settings(root, retail_slice) if not s.startswith("spark.conf.")]
    wanted = [
        *settings,
        "train.ranks=2",
        "models=[popular, ease, multvae]",
        "models.multvae.epochs=2",
    ]
    night = subprocess.Popen(
        [Path(sys.executable).parent / "recspark", "nightly", "--env", "test", "--run-date", NIGHT,
         *[word for setting in wanted for word in ("--set", setting)]],
        cwd=folder,
        env={
            **os.environ,
            "RECSPARK_CONF": str(ROOT / "conf"),
            "RECSPARK_SETTINGS": str(own),
            "RECSPARK_LOG": "DEBUG",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    said: list[str] = []
    assert night.stdout is not None
    reader = threading.Thread(target=said.extend, args=(night.stdout,))
    reader.start()
    listening, commands = set(), set()
    while night.poll() is None:
        for process in _with_children(night.pid):
            try:
                sockets = process.net_connections(kind="inet")
                commands.add(" ".join(process.cmdline()))
            except psutil.Error:
                continue
            listening.update(s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN)
        threading.Event().wait(0.2)
    reader.join()
    log = "".join(said)
    assert night.returncode == 0, log
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert len(commands) > 3
    written = [*texts(root), *texts(folder), ("the log", log)]
    assert (
        holding(SECRETS, [*written, *[("a command line", command) for command in commands]]) == []
    )
    assert "stage end" in log


def _with_children(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
