"""The environment is the one that was tested: versions, Java, jars, Horovod's build."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import delta_jars, freeze

ROOT = Path(__file__).parent.parent
LIST = """
from importlib.metadata import distributions
for d in distributions():
    print(d.metadata["Name"], d.version)
"""


def differences(pins: dict[str, str], found: dict[str, str]) -> list[str]:
    return [
        f"{name}: pinned {pins.get(name, 'not at all')}, installed {found.get(name, 'not at all')}"
        for name in sorted(pins.keys() | found.keys())
        if pins.get(name) != found.get(name)
    ]


def test_installed_versions_are_the_pinned_ones(capsys: pytest.CaptureFixture[str]) -> None:
    found = freeze.installed()
    shown = "pyspark delta-spark pyarrow numpy pandas scipy petastorm torch horovod optuna pydantic"
    with capsys.disabled():
        print("\nstack: Python", ".".join(map(str, sys.version_info[:3])), end=", ")
        print(*(f"{name} {found.get(name)}" for name in shown.split()), sep=", ")
    drift = differences(freeze.pinned(), found)
    assert not drift, "constraints.txt and .venv differ (make setup mends it):\n" + "\n".join(drift)


def test_pins_lie_inside_the_ranges_of_setup_py() -> None:
    pins = freeze.pinned()
    wanted = [Requirement(line) for line in requires("recspark") or []]
    assert {"pyspark", "torch", "optuna", "matplotlib", "pytest"} <= {r.name for r in wanted}
    outside = [str(r) for r in wanted if pins.get(freeze.normal(r.name)) not in r.specifier]
    assert not outside


def test_the_environment_of_airflow_is_the_pinned_one() -> None:
    python = ROOT / ".venv-airflow" / "bin" / "python"
    if not python.exists():
        pytest.skip(".venv-airflow is built by `make airflow`")
    lines = subprocess.run([python, "-c", LIST], capture_output=True, text=True, check=True).stdout
    found = {freeze.normal(name): version for name, version in map(str.split, lines.splitlines())}
    found.pop("recspark", None)
    assert not differences(freeze.pinned(ROOT / "constraints-airflow.txt"), found)


def test_spark_runs_on_java_17_or_21() -> None:
    home = delta_jars.jars_folder().parent
    run = subprocess.run(
        [home / "bin" / "spark-submit", "--version"],
        env=os.environ | {"SPARK_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    (major,) = re.findall(r"Server VM, (\d+)", run.stderr)
    assert major in {"17", "21"}


def test_delta_jars_are_in_pyspark() -> None:
    assert delta_jars.wrong(delta_jars.jars_folder()) == {}


@pytest.mark.torch
@pytest.mark.horovod
def test_horovod_is_the_gloo_build_for_this_torch() -> None:
    import horovod
    import horovod.torch as hvd
    import torch

    assert hvd.gloo_built()
    assert not hvd.mpi_built()
    assert not hvd.cuda_built()
    metadata = Path(horovod.__file__).with_name("metadata.json").read_text()
    # It ends in a comma, which JSON does not allow.
    built_for = json.loads(re.sub(r",\s*}", "}", metadata))
    assert built_for["pytorch"] == torch.__version__
