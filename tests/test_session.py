"""The session: work side by side on it, who it listens to, what it runs, which Java it takes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from recspark import session
from recspark.errors import SetupError
from recspark.session import check_java, find_java, java_version, together
from tests.conftest import ROOT

pytestmark = pytest.mark.spark


def test_results_come_in_the_order_given_from_threads_that_overlap(spark: SparkSession) -> None:
    both = threading.Barrier(2, timeout=60)  # breaks unless both pieces run at one time

    def piece(n: int) -> int:
        both.wait()
        return spark.range(n).count()

    assert together(spark, lambda: piece(3), lambda: piece(5)) == [3, 5]


def test_the_first_error_is_raised_when_all_have_ended(spark: SparkSession) -> None:
    ended = []

    def fails(name: str) -> None:
        raise ValueError(name)

    def works() -> None:
        ended.append(spark.range(7).count())

    with pytest.raises(ValueError, match="first"):
        together(spark, lambda: fails("first"), lambda: fails("second"), works)
    assert ended == [7]


def test_a_job_description_is_inherited(spark: SparkSession) -> None:
    spark.sparkContext.setLocalProperty("recspark.test", "ours")
    try:
        seen = together(spark, lambda: spark.sparkContext.getLocalProperty("recspark.test"))
    finally:
        spark.sparkContext.setLocalProperty("recspark.test", None)  # type: ignore[arg-type]
    assert seen == ["ours"]


# --------------------------------------------------------------------------- ports and foreign modules
PLANTED = "planted-secret-of-the-session"
# Prints what the session of a night listens on, and what its workers and ranks run.
SESSION = """
import contextlib, json, sys, threading
import psutil
from recspark.config import Train
from recspark.config.load import load_config
from recspark.session import build_session
from recspark.train.launch import launcher

listening, seen, ended = set(), {}, threading.Event()
settings = load_config("test", json.loads(sys.argv[1])).spark
spark = build_session(settings, "who listens")


def look():
    while True:
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                found = process.net_connections(kind="inet")
            except psutil.Error:
                continue
            listening.update(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)
        if ended.wait(0.1):
            return


watch = threading.Thread(target=look, daemon=True)
watch.start()


def modules(batches):
    import numpy, pyarrow, recspark
    for batch in batches:
        yield pyarrow.RecordBatch.from_pydict({"file": [numpy.__file__ + " " + recspark.__file__]})


def work(comm):
    import numpy, os, torch, recspark
    total = float(comm.allreduce(torch.ones(1))[0])
    return total, numpy.__file__ + " " + recspark.__file__, os.environ["PYTHONSAFEPATH"]


seen["worker"] = spark.range(1).mapInArrow(modules, "file string").first()[0]
for ranks in (1, 2):
    found = launcher(spark, Train(ranks=ranks, timeout_s=200)).run(work)
    seen[f"{ranks} ranks"] = [result.value for result in found]
commands = []
for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended: a zombie is one too
        commands.append(" ".join(process.cmdline()))
ended.set()
watch.join()
conf = spark.sparkContext.getConf()
print("SEEN", json.dumps({
    "listening": sorted(listening),
    **seen,
    "commands": commands,
    "secret": conf.get("spark.hadoop.fs.s3a.secret.key"),
    "shown": dict(spark.sql("SET -v").collect() and spark.sql("SET").collect()) .get("spark.hadoop.fs.s3a.secret.key"),
}))
spark.stop()
"""


def hostile_folder(folder: Path) -> Path:
    """Make a folder whose modules must not be run, and one that hides the package as the parent of a
    clone does.
    """
    folder.mkdir()
    (folder / "recspark").mkdir()
    for module in ("numpy", "pandas", "torch", "pyarrow", "psutil", "horovod", "cloudpickle"):
        (folder / f"{module}.py").write_text("raise SystemExit('a module of the folder was run')\n")
    return folder


@pytest.mark.torch
@pytest.mark.horovod
def test_a_local_session_listens_to_its_machine_and_runs_its_own_modules(tmp_path: Path) -> None:
    """With its UI, its Python workers and two ranks; no secret is on a command line."""
    script = tmp_path / "script" / "session.py"
    script.parent.mkdir()
    script.write_text(SESSION)
    settings = [
        "spark.conf.spark.ui.enabled=true",
        f"spark.conf.spark.hadoop.fs.s3a.secret.key={PLANTED}",
    ]
    run = subprocess.run(
        [sys.executable, script, json.dumps(settings)],
        cwd=hostile_folder(tmp_path / "hostile"),
        env={**os.environ, "RECSPARK_CONF": str(ROOT / "conf"), "SPARK_LOCAL_DIRS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert "SEEN" in run.stdout, run.stdout + run.stderr
    seen: dict[str, Any] = json.loads(run.stdout.split("SEEN ")[1].splitlines()[0])
    assert {ip.removeprefix("::ffff:") for ip in seen["listening"]} == {"127.0.0.1"}
    for ranks, total in (("1 ranks", 1.0), ("2 ranks", 2.0)):
        assert [value[0] for value in seen[ranks]] == [total] * int(total)
        assert {value[2] for value in seen[ranks]} == {"1"}
    files = [seen["worker"], *[value[1] for value in seen["1 ranks"] + seen["2 ranks"]]]
    assert not [file for file in files if "hostile" in file]
    assert all(str(ROOT / "recspark") in file for file in files)
    assert seen["secret"] == PLANTED
    assert len(seen["commands"]) > 1
    assert not [command for command in seen["commands"] if PLANTED in command]
    assert seen["shown"] != PLANTED


def test_what_is_said_of_the_address_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARK_LOCAL_IP", raising=False)
    loopback = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    for master, conf, want in (
        ("local[2]", {}, loopback),
        ("local-cluster[1,1,512]", {}, loopback),
        ("spark://host:7077", {}, {}),
        ("yarn", {}, {}),
        ("", {}, {}),
        ("local[*]", {"spark.driver.bindAddress": "0.0.0.0"}, {}),
        ("local[*]", {"spark.driver.host": "driver.example"}, {}),
    ):
        with session._on_loopback(master, conf) as given:
            assert given == want
            assert ("SPARK_LOCAL_IP" in os.environ) == bool(want)
        assert "SPARK_LOCAL_IP" not in os.environ  # of the JVM that was started, not of later ones


# ------------------------------------------------------------------------------------------------ Java
def a_java(home: Path, version: str | None = None, says: str = "") -> Path:
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    java.chmod(0o755)
    if version:
        (home / "release").write_text(f'JAVA_VERSION="{version}"\n')
    return java


@pytest.fixture
def no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `make setup` noted no Java."""
    package = tmp_path / "pyspark" / "__init__.py"
    package.parent.mkdir()
    monkeypatch.setattr(session.pyspark, "__file__", str(package))


@pytest.mark.usefixtures("no_note")
def test_a_java_home_that_leads_nowhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in (tmp_path / "gone", tmp_path):
        monkeypatch.setenv("JAVA_HOME", str(home))
        with pytest.raises(
            SetupError, match=f"JAVA_HOME says {home}, where no bin/java can be run"
        ):
            find_java()
    noted = tmp_path / "pyspark" / "conf" / "spark-env.sh"
    noted.parent.mkdir()
    noted.write_text(f"export JAVA_HOME={tmp_path / 'gone'}\n")
    monkeypatch.delenv("JAVA_HOME")
    with pytest.raises(SetupError, match=r"spark-env\.sh says .*gone"):
        find_java()


@pytest.mark.usefixtures("no_note")
def test_a_java_that_spark_does_not_run_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (version, says, fits) in enumerate(
        [
            ("17.0.1", "", True),
            ("21", "", True),
            (None, 'openjdk version "17.0.9" 2023', True),
            ("11.0.2", "", False),
            ("1.8.0_412", "", False),
            (None, "what?", False),
        ]
    ):
        home = tmp_path / str(number)
        java = a_java(home, version, says)
        monkeypatch.setenv("JAVA_HOME", str(home))
        if fits:
            assert check_java().startswith(f"{java} ({java_version(str(java))}")
        else:
            with pytest.raises(SetupError, match="Spark runs on 17 and 21"):
                check_java()


def test_only_session_names_a_conf_key_of_spark() -> None:
    """What docs/architecture.md says: whoever looks for a key looks in one file."""
    package = ROOT / "recspark"
    named = {
        (str(file.relative_to(package)), node.value)
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"spark\.[A-Za-z][\w.]*\w", node.value)
    }
    assert {file for file, _ in named} == {"session.py"}
