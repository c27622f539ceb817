"""The model of docs/add_a_model.md, taken from the page, passes the checks that the page promises."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from recspark.config import Train
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing.checks import CHECKS, Case, Check, checks_for
from tests.conftest import ROOT

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def case(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Case:
    page = (ROOT / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    source, line, settings = re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL)
    folder = Path(tmp_path_factory.mktemp("recent"))
    (folder / "recent.py").write_text(source, encoding="utf-8")
    spark.sparkContext.addPyFile(str(folder / "recent.py"))  # also puts it on the driver's path
    spec = eval(line, {"_line": registry._line})
    # The page's file lies in recspark/models; here it is a module of its own.
    spec = replace(
        spec,
        recommender=spec.recommender.removeprefix("recspark.models."),
        model=spec.model.removeprefix("recspark.models."),
    )
    options = FitOptions(in_process=True, train=Train(ranks=1))
    return Case(spark, spec, yaml.safe_load(settings), str(folder / "artifacts"), options)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract(case: Case, check: Check) -> None:
    if check not in checks_for(case.spec):
        pytest.skip("not asked for by its tags")
    if check.name == "another_process_gives_the_same_lists":
        pytest.skip("another process has no such module")
    check.run(case)
