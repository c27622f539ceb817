"""Scores of pairs by several retrievers at once are those that each of them gives alone."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.data.blocks import micros
from recspark.data.examples import proposed
from recspark.data.pair_features import FEATURES, Catalogue, names
from recspark.hybrid.pairs import describe_pairs, relative
from recspark.models.base import FitOptions, RetrieverModel
from recspark.models.items.item_knn import ItemKNN
from recspark.models.items.popular import Popular
from recspark.models.items.transitions import Transitions
from recspark.testing import synth

GROUPS = tuple(FEATURES)


@pytest.mark.spark
def test_every_retriever_scores_every_pair(spark: SparkSession) -> None:
    data = synth.dataset(spark, synth.power_law(60, 40))
    options = FitOptions()
    retrievers: dict[str, RetrieverModel] = {
        "popular": Popular.from_dict({}).fit(data, options),  # type: ignore[dict-item]
        "item_knn": ItemKNN.from_dict({"half_life_days": None}).fit(data, options),  # type: ignore[dict-item]
        "transitions": Transitions.from_dict({"last_n": 3}).fit(data, options),  # type: ignore[dict-item]
    }
    lists = [
        retrievers[name]
        .recommend(synth.ask(data, mode), k)
        .withColumns({"model": F.lit(name), "mode": F.lit(mode)})
        for name, k in (("popular", 5), ("item_knn", 8))
        for mode in ("novel", "repeat")
    ]
    pairs = proposed(reduce(DataFrame.unionByName, lists), ("popular", "item_knn"))
    catalogue = Catalogue.of(data.item_features)
    described = describe_pairs(
        pairs, data.histories, retrievers, catalogue, micros(data.cutoff), GROUPS
    )
    assert described.columns[4:] == [
        "popular_score", "popular_relative", "item_knn_score", "item_knn_relative",
        "transitions_score", "transitions_relative", *names(GROUPS),
    ]  # fmt: skip
    rows = described.toPandas()
    assert len(rows) == pairs.count() > 600
    assert set(rows["mode"]) == {"novel", "repeat"}
    asked = synth.ask(data, "repeat").join(
        pairs.groupBy("user_idx").agg(F.collect_set("item_idx").alias("items")), on="user_idx"
    )
    for name, model in retrievers.items():
        alone = model.score(asked).toPandas().set_index(["user_idx", "item_idx"])["score"]
        expected = alone.loc[list(zip(rows["user_idx"], rows["item_idx"], strict=True))].to_numpy()
        assert rows[f"{name}_score"].to_numpy().tobytes() == expected.tobytes()
    assert rows["transitions_score"].isna().any()  # it lists few items, but scores what others list
    best = rows.groupby(["mode", "user_idx"])["popular_score"].apply(
        lambda scores: scores.nlargest(5).iloc[-1]
    )
    divisor = best.loc[list(zip(rows["mode"], rows["user_idx"], strict=True))].to_numpy()
    np.testing.assert_allclose(rows["popular_relative"], rows["popular_score"] / divisor, rtol=1e-6)


def test_relative_to_the_fifth_best() -> None:
    nan = float("nan")
    score = np.array([6.0, 5, 4, 3, 2, 1, nan, -1, -2, 0.5])
    row = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 3])
    assert relative(score, row, 4) == pytest.approx(
        [3, 2.5, 2, 1.5, 1, 0.5, nan, nan, nan, 1], nan_ok=True
    )
    assert relative(score[:0], row[:0], 0).shape == (0,)
