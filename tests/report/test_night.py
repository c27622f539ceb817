"""What the night says of models that do not earn their place."""

from __future__ import annotations

from datetime import UTC, date, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config.load import load_config
from recspark.report.night import below_baseline, evaluation_table, models_that_list_nothing


def row(low: float | None, high: float | None) -> dict[str, dict[str, float | None]]:
    return {"ndcg": {"ci_low": low, "ci_high": high}}


def test_models_below_the_baseline_are_named() -> None:
    found = {
        "popular": row(-0.1, -0.05),  # the baseline itself
        "ease": row(0.01, 0.03),
        "mf": row(-0.01, 0.02),
        "cdl": row(-0.03, -0.01),
        "als": row(None, None),  # no bootstrap
        "item_knn": {},
        "published": row(-0.1, -0.05),  # the list, not a model
    }
    lines = below_baseline(found, "popular")
    assert [line.split(" here:")[0] for line in lines] == [
        "mf is no better than popular",
        "cdl is below popular",
    ]
    assert "recspark tune mf" in lines[0]
    assert below_baseline({"ease": row(0.01, 0.03)}, "popular") == []


def test_models_that_list_nothing_by_design_are_not_named() -> None:
    found = {"own_items": row(-0.1, -0.05), "mf": row(-0.01, 0.02)}
    assert len(below_baseline(found, "popular")) == 2
    [line] = below_baseline(found, "popular", {"own_items"})
    assert line.startswith("mf is no better")


OWN_ITEMS = [
    "models=[popular, own_items, mine, ease]",
    "publish.neighbours_model=ease",
    "models.mine.algorithm=own_items",
]


def test_models_of_own_items_list_nothing_in_mode_novel() -> None:
    """The model's name is free."""
    config = load_config("test", OWN_ITEMS)
    assert models_that_list_nothing(config, "novel") == {"own_items", "mine"}
    assert models_that_list_nothing(config, "repeat") == set()


@pytest.mark.spark
def test_the_caption_advises_on_own_items_in_mode_repeat_only(spark: SparkSession) -> None:
    """The model `gone` is of another run of the night: it is in the table, but not in the config."""
    config = load_config("test", OWN_ITEMS)
    night, cutoff = date(2020, 1, 15), datetime(2020, 1, 1, tzinfo=UTC)
    k = config.evaluate.ks[0]
    rows: list[tuple[Any, ...]] = [
        (night, "backtest", cutoff, 15, model, mode, "warm", "ndcg", k, 0.1, 9, "popular", -0.1, -0.2, high)
        for model, high in [("popular", -0.1), ("mine", -0.1), ("ease", 0.1), ("gone", -0.1)]
        for mode in ("novel", "repeat")
    ]  # fmt: skip
    metrics = spark.createDataFrame(rows, schema.METRICS)
    catalog = SimpleNamespace(read=lambda table, version: metrics, version=lambda table: 0)
    context: Any = SimpleNamespace(
        config=config,
        catalog=catalog,
        run_date=night,
        cutoffs=SimpleNamespace(backtest=cutoff),
    )
    for mode, named in [("novel", ["ease", "gone"]), ("repeat", ["ease", "gone", "mine"])]:
        table = evaluation_table(context, mode)
        lines = str(table.caption).splitlines()[1:]
        silent = [line for line in lines if "nothing in mode" in line]
        assert sorted(line.split(" is ")[0] for line in lines if line not in silent) == named
        shown = {str(cell) for cell in table.columns[0].cells}
        assert ("mine" in shown) == (mode == "repeat")
        assert [line.split(" lists")[0] for line in silent] == ["mine"] * (mode == "novel")
