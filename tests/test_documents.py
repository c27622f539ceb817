"""What README.md and benchmarks/README.md say of the demo's lists is what was measured."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from recspark.config import is_backtest_model
from tests.conftest import ROOT

METRICS = ("ndcg", "recall", "map", "hit_rate", "coverage")


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, dict[str, Any]]]:
    """Mode -> model -> metric -> value, diff, ci, as `python -m benchmarks retail` wrote them."""
    path = ROOT / "benchmarks" / "results" / "retail.json"
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())["figures"]
    return found


def test_readme_shows_the_evaluation_that_was_measured(
    figures: dict[str, dict[str, dict[str, Any]]],
) -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("backtest, novel:")[1].split("```")[0]
    lines = re.findall(r"^ (\w+) +(0\.\d{4}.*)$", table, re.M)
    # The report leaves out models that list nothing in this mode.
    listing = {model for model, of in figures["novel"].items() if of["hit_rate"]["value"] > 0}
    assert {model for model, _ in lines} == listing
    for model, numbers in lines:
        of_model = figures["novel"][model]
        wanted = [f"{of_model[metric]['value']:.4f}" for metric in METRICS]
        if model != "popular":  # what the others are compared with
            ndcg = of_model["ndcg"]
            wanted += [f"{n:+.4f}" for n in (ndcg["diff"], *ndcg["ci"])]
        assert re.findall(r"[+-]?\d\.\d{4}", numbers) == wanted, model


def test_benchmarks_show_the_ndcg_that_was_measured(
    figures: dict[str, dict[str, dict[str, Any]]],
) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    table = text.split("## Quality on the bundled data")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\.\d{4}) \|[^|]*\| (\.\d{4}) \|", table, re.M)
    models = {model for model in figures["novel"] if not is_backtest_model(model)}
    assert {row[0] for row in rows} == models
    for model, *shown in rows:
        measured = [figures[mode][model]["ndcg"]["value"] for mode in ("novel", "repeat")]
        assert shown == [f"{value:.4f}".lstrip("0") for value in measured], model
