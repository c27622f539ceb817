"""No network's defaults lose to the nearest neighbours of items on real ratings."""

from __future__ import annotations

from typing import Any

import pytest
from pyspark.sql import SparkSession

from benchmarks.quality import ml1m
from benchmarks.quality.movielens import SETTINGS, Split
from recspark.config import Train
from recspark.models import registry
from recspark.models.base import FitOptions

pytestmark = [pytest.mark.spark, pytest.mark.slow]
NETWORKS = [
    name for name, spec in registry.MODELS.items() if spec.training[:1] == ("training_bags",)
]


@pytest.fixture(scope="module")
def split(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Split:
    ratings = ml1m.ratings()
    if ratings is None:
        pytest.skip(
            "MovieLens 1M is not here: it may not be handed on, RECSPARK_DATA says where it is"
        )
    folder = tmp_path_factory.mktemp("movielens")
    return Split(ratings[ratings["rating"] > 0], 1, f"{folder}/bags", spark, "validation")


@pytest.fixture(scope="module")
def bar(split: Split) -> float:
    return ndcg("item_knn", SETTINGS["item_knn"], split)


def ndcg(name: str, settings: dict[str, Any], split: Split) -> float:
    options = FitOptions(in_process=True, train=Train(threads=1))  # type: ignore[call-arg]
    fitted = registry.make(name, settings).fit(split.data, options)
    lists = fitted.recommend(split.question.queries, ml1m.K).toArrow()
    return float(ml1m.of_users(lists, split.question)[1][f"ndcg@{ml1m.K}"].mean())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_defaults_pass_item_knn(name: str, split: Split, bar: float) -> None:
    assert ndcg(name, {"half_life_days": None}, split) > bar
