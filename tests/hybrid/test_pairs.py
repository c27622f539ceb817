"""Scores of pairs by several retrievers at once are those that each of them gives alone."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Examples
from recspark.data.blocks import micros, parse_histories
from recspark.data.dataset import Dataset
from recspark.data.examples import labelled, proposed, sampled, truths_of
from recspark.data.pair_features import FEATURES, Catalogue, names
from recspark.data.pair_similarity import ItemVectors, similarities, similarity_names
from recspark.hybrid.pairs import describe_pairs, relative
from recspark.models.base import FitOptions, RetrieverModel
from recspark.models.items.item_knn import ItemKNN
from recspark.models.items.popular import Popular
from recspark.models.items.transitions import Transitions
from recspark.testing import synth
from tests.conftest import spark_conf

GROUPS = tuple(FEATURES)


def lists_and_retrievers(data: Dataset) -> tuple[DataFrame, dict[str, RetrieverModel]]:
    """Lists of two of three retrievers in both modes: `mode, model, user_idx, item_idx, rank,
    score`.
    """
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
    return reduce(DataFrame.unionByName, lists), retrievers


@pytest.mark.spark
def test_every_retriever_scores_every_pair(spark: SparkSession) -> None:
    data = synth.dataset(spark, synth.power_law(60, 40))
    lists, retrievers = lists_and_retrievers(data)
    pairs = proposed(lists, ("popular", "item_knn"))
    catalogue = Catalogue.of(data.item_features)
    vectors = np.random.default_rng(1).normal(size=(len(catalogue.items), 6))
    words = ItemVectors.of(catalogue.items, vectors)
    described = describe_pairs(
        pairs, data.histories, retrievers, catalogue, micros(data.cutoff), GROUPS, {"words": words}
    )
    assert described.columns[4:] == [
        "popular_score", "popular_relative", "item_knn_score", "item_knn_relative",
        "transitions_score", "transitions_relative", *names(GROUPS), *similarity_names(["words"]),
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
    users = data.histories.toArrow().sort_by("user_idx")
    user = users.column("user_idx").to_numpy()
    histories = parse_histories(users.column("history").combine_chunks())
    similar = similarities(
        np.searchsorted(user, rows["user_idx"]), rows["item_idx"].to_numpy(), histories,
        micros(data.cutoff), words,
    )  # fmt: skip
    for name, value in zip(similarity_names(["words"]), similar, strict=True):
        np.testing.assert_allclose(rows[name], value, rtol=1e-6)
    best = rows.groupby(["mode", "user_idx"])["popular_score"].apply(
        lambda scores: scores.nlargest(5).iloc[-1]
    )
    divisor = best.loc[list(zip(rows["mode"], rows["user_idx"], strict=True))].to_numpy()
    np.testing.assert_allclose(rows["popular_relative"], rows["popular_score"] / divisor, rtol=1e-6)


@pytest.mark.spark
def test_a_sample_has_the_bits_that_all_pairs_have(spark: SparkSession) -> None:
    """The pairs that do not stay still count in `relative`. Pairs are shuffled once, by user."""
    data = synth.dataset(spark, synth.power_law(60, 40))
    lists, retrievers = lists_and_retrievers(data)
    lists = lists.localCheckpoint()
    later = data.cutoff - timedelta(days=20)  # what came after it stands for the horizon
    truths = truths_of(data.histories, later, 100)
    settings = Examples(n_negatives=3)  # type: ignore[call-arg]

    def described(pairs: DataFrame) -> DataFrame:
        catalogue = Catalogue.of(data.item_features)
        return describe_pairs(
            pairs, data.histories, retrievers, catalogue, micros(data.cutoff), GROUPS
        )

    all_pairs = labelled(proposed(lists, ("popular", "item_knn")), truths)
    with spark_conf(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}):
        sample = described(sampled(all_pairs, settings, seed=1))
        plan = sample._jdf.queryExecution().executedPlan().toString()
    # The lists, the truths, and the histories.
    assert plan.count("Exchange hashpartitioning(user_idx") == 3
    assert plan.count("Exchange hashpartitioning(") == 3
    key = ["mode", "user_idx", "item_idx"]
    of_sample = sample.toPandas().set_index(key).sort_index()
    of_all = described(all_pairs).toPandas().set_index(key).sort_index()
    assert 300 < len(of_sample) < len(of_all)
    n_negatives = (of_sample["label"] == 0).groupby(level=[0, 1]).sum()
    assert n_negatives.max() == 3
    assert {*of_all.index[of_all["label"] > 0]} <= {*of_sample.index}
    same_pairs = of_all.loc[of_sample.index]
    for name in of_sample.columns.drop("sources"):
        assert of_sample[name].to_numpy().tobytes() == same_pairs[name].to_numpy().tobytes(), name


def test_relative_to_the_fifth_best() -> None:
    nan = float("nan")
    score = np.array([6.0, 5, 4, 3, 2, 1, nan, -1, -2, 0.5])
    row = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 3])
    assert relative(score, row) == pytest.approx(
        [3, 2.5, 2, 1.5, 1, 0.5, nan, nan, nan, 1], nan_ok=True
    )
    assert relative(score[:0], row[:0]).shape == (0,)
