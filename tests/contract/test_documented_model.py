"""The models of docs/add_a_model.md, taken from the page, pass the checks that the page promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from recspark.config import Train
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing.case import BaseCase, Case
from recspark.testing.contract import CHECKS, Check, case_class, checks_for
from tests.contract.documented import add_module, blocks, documented

pytestmark = [pytest.mark.spark, pytest.mark.torch]
FROM_OUTSIDE = ("words", "segments", "linear")


@pytest.fixture(scope="module", params=["recent", "words", "segments", "linear", "narrow"])
def case(
    request: pytest.FixtureRequest, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> BaseCase:
    name = request.param
    folder = Path(tmp_path_factory.mktemp(name))
    options = FitOptions(in_process=True, train=Train(ranks=1))
    if name in FROM_OUTSIDE:  # as a class of another package, by its path
        spec = registry.model_spec(documented(spark, folder, name))
        return case_class(spec)(spark, spec, {}, str(folder / "artifacts"), options)
    if name == "recent":
        source, line, settings = blocks("python|yaml")[:3]
    else:
        net, source, line, settings = blocks("python|yaml")[-4:]
        add_module(spark, folder / "narrow_net.py", net)
        # The page's files lie in recspark; here each is a module of its own.
        source = source.replace("from recspark.nets.narrow import", "from narrow_net import")
    add_module(spark, folder / f"{name}.py", source)
    spec = eval(line, {"_line": registry._line})
    spec = replace(
        spec,
        algorithm_class=spec.algorithm_class.rpartition(".")[2],
        model=spec.model.rpartition(".")[2],
    )
    short = {"batch_size": 32} if name == "narrow" else {}
    values = {**yaml.safe_load(settings), **short}
    return Case(spark, spec, values, str(folder / "artifacts"), options)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract(case: BaseCase, check: Check) -> None:
    if check not in checks_for(case.spec):
        pytest.skip("not asked for by its tags")
    if check.name == "another_process_gives_the_same_lists":
        pytest.skip("another process has no such module")
    check.run(case)
