"""Popular orders items by decayed event weights, for everybody."""

from __future__ import annotations

import pytest
from pyspark.sql import SparkSession

from recspark.models.base import FitOptions
from recspark.models.items.popular import Popular, PopularSettings
from recspark.testing import synth

pytestmark = pytest.mark.spark

EVENTS = [(1, 3, 20.0), (2, 3, 20.0), (3, 3, 20.0), (1, 4, 10.0), (2, 4, 10.0), (3, 8, 0.0001)]


@pytest.mark.parametrize(
    ("half_life", "expected"),
    [
        (None, [(3, 3.0), (4, 2.0), (8, 1.0)]),
        (10.0, [(8, 1.0), (4, 2 / 2), (3, 3 / 4)]),
        (1.0, [(8, 1.0), (4, 2 / 1024), (3, 3 / 2**20)]),
    ],
)
def test_weights_by_hand(
    spark: SparkSession, half_life: float | None, expected: list[tuple[int, float]]
) -> None:
    model = Popular(PopularSettings(half_life_days=half_life)).fit(
        synth.dataset(spark, synth.log(EVENTS)), FitOptions()
    )
    data = synth.dataset(spark, synth.log([(7, 99, 1.0)]))  # a user the model never met
    rows = model.recommend(synth.ask(data), 5).orderBy("rank").collect()
    found = {r["item_idx"]: r["score"] for r in rows}
    assert found == pytest.approx(dict(expected), rel=1e-4)
    if half_life != 10.0:  # a near tie there
        assert [r["item_idx"] for r in rows] == [i for i, _ in expected]
