"""LambdaMART's own rules; tests/engines/test_boosting.py grows its trees, the contract checks it whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.config import Train
from recspark.data.dataset import Dataset, Examples
from recspark.errors import ConfigError, EmptyDataError, NoSlotsError
from recspark.models.base import FitOptions
from recspark.models.rankers.lambdamart import LambdaMart, LambdaMartModel
from recspark.models.registry import MODELS
from recspark.testing.ranker_checks import RankerCase

OPTIONS = FitOptions(train=Train(ranks=2))  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def case(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> RankerCase:
    folder = str(tmp_path_factory.mktemp("lambdamart"))
    return RankerCase(spark, MODELS["lambdamart"], {"n_trees": 5}, folder, OPTIONS)


def with_label(data: Dataset, label: Any) -> Dataset:
    assert data.examples is not None
    rows = data.examples.rows.withColumn("label", label.cast("float"))
    return replace(data, examples=Examples(rows, data.examples.encoding))


def trees(case: RankerCase, data: Dataset, **settings: Any) -> bytes:
    model = case.fit(data, **settings)
    assert isinstance(model, LambdaMartModel)
    return model.arrays()["trees"].tobytes()


@pytest.mark.spark
def test_what_was_bought_counts_and_how_often_does_not(case: RankerCase) -> None:
    more = with_label(case.data, F.col("label") * 7)
    assert trees(case, more) == trees(case, case.data)
    turned = with_label(case.data, 1 - F.col("label"))
    assert trees(case, turned) != trees(case, case.data)


@pytest.mark.spark
def test_every_setting_reaches_the_trees(case: RankerCase) -> None:
    first = trees(case, case.data)
    other: dict[str, Any] = {
        "n_trees": 6, "learning_rate": 0.2, "max_leaves": 4, "min_leaf_weight": 5.0,
        "features_per_tree": 1.0, "rows_per_tree": 1.0, "reg": 0.5, "truncation": 1, "max_bins": 4,
    }  # fmt: skip
    assert set(other) == set(LambdaMart.settings_class.model_fields)
    for name, value in other.items():
        assert trees(case, case.data, **{name: value}) != first, name


@pytest.mark.spark
@pytest.mark.parametrize(("label", "n"), [(0.0, "0 of"), (1.0, r"(\d+,?\d*) of \1")])
def test_lists_of_one_kind_are_refused(case: RankerCase, label: float, n: str) -> None:
    with pytest.raises(EmptyDataError, match=f"lambdamart: {n}.* examples are items that the user"):
        case.fit(with_label(case.data, F.lit(label)))


@pytest.mark.spark
def test_more_workers_than_slots_are_refused_at_once(case: RankerCase) -> None:
    options = FitOptions(train=Train(ranks=64, start_timeout_s=1))  # type: ignore[call-arg]
    with pytest.raises(NoSlotsError, match="64 ranks need as many task slots"):
        case.algorithm.fit(case.data, options)


def test_it_needs_a_retriever() -> None:
    LambdaMart.from_dict({}).check_needs({"ease": "retriever", "words": "encoder"})
    with pytest.raises(ConfigError, match=r"lambdamart ranks what retrievers list.*\['words'\]"):
        LambdaMart.from_dict({}).check_needs({"words": "encoder"})
