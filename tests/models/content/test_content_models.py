"""Content kNN and factors from content: against numpy, and on planted catalogues with items that
nobody acted on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.data.blocks import Array, QueryBlock, Ragged, parse_histories
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import FitOptions, Needed, RetrieverModel, Settings
from recspark.models.content.content_factors import (
    ContentFactors,
    category_block,
    combine,
    price_block,
)
from recspark.models.content.content_knn import ContentKNN
from recspark.models.factors.als import Als, AlsModel
from recspark.models.items.popular import Popular
from recspark.testing import synth
from recspark.testing.case import PlantedEncoder

pytestmark = [pytest.mark.spark, pytest.mark.timeout(300)]

N_USERS, N_WARM, N_COLD, N_GROUPS = 120, 48, 12, 4
RNG = np.random.default_rng(4)
# Users of group g act on items of group g. Items N_WARM and above have no event.
GROUP = np.arange(N_WARM + N_COLD) % N_GROUPS
WEIGHTS = {"words": 2.0, "pictures": 0.5}


def events() -> synth.Log:
    rows = [
        (user, item, float(RNG.uniform(1, 60)))
        for user in range(N_USERS)
        for item in RNG.choice(np.flatnonzero(GROUP[:N_WARM] == user % N_GROUPS), 7, replace=False)
    ]
    return synth.log(rows)


LOG = events()
VECTORS = {
    "words": np.eye(N_GROUPS)[GROUP] + 0.3 * RNG.normal(size=(N_WARM + N_COLD, N_GROUPS)),
    "pictures": RNG.normal(size=(N_WARM + N_COLD, 3)),
}
HAS_PICTURE = np.arange(N_WARM + N_COLD) % 5 > 0


@pytest.fixture(scope="module")
def data(spark: SparkSession) -> Dataset:
    """The catalogue says the group of every item as its category; ten items have no picture."""
    everything = np.arange(N_WARM + N_COLD)
    catalogue = synth.with_media(synth.items(spark, everything)).toArrow()
    made = synth.dataset(spark, LOG)
    return replace(
        made,
        catalogue=spark.createDataFrame(catalogue, schema.CONTENT),
        vectors={
            "words": vectors_of(spark, everything, VECTORS["words"]),
            "pictures": vectors_of(
                spark, everything[HAS_PICTURE], VECTORS["pictures"][HAS_PICTURE]
            ),
        },
    )


def vectors_of(spark: SparkSession, item_idx: Array, vectors: Array) -> Any:
    rows = pa.table(
        {
            "item_idx": pa.array(item_idx, pa.int32()),
            "vector": pa.array(list(vectors.astype(np.float32)), pa.list_(pa.float32())),
        }
    )
    return spark.createDataFrame(rows, schema.VECTORS)


def encoders(*names: str) -> Needed:
    return {name: PlantedEncoder(Settings(), synth.CUTOFF) for name in names}


@pytest.fixture(scope="module")
def als(data: Dataset) -> AlsModel:
    settings = {"embedding_size": 8, "iterations": 5, "n_blocks": 2, "half_life_days": None}
    model = Als.from_dict(settings).fit(data, FitOptions())
    assert isinstance(model, AlsModel)
    return model


def scores(model: RetrieverModel, log: synth.Log = LOG) -> Array:
    """Of every user for every item of the model, exactly; (n_users, n_items)."""
    users, column = synth.history_column(log)
    nothing_seen = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    scored = model.scorer().score(QueryBlock(users, parse_histories(column), nothing_seen))
    rows, items = np.divmod(np.arange(len(users) * len(model.items)), len(model.items))
    return np.asarray(scored.exact(rows, items)).reshape(len(users), -1)


def units(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cosines() -> Array:
    """Of all items with all items, by both encoders as `WEIGHTS` weighs them."""
    pictures = np.where(HAS_PICTURE[:, None], units(VECTORS["pictures"]), 0)
    parts = [WEIGHTS["words"] * units(VECTORS["words"]), WEIGHTS["pictures"] * pictures]
    joined = units(np.concatenate(parts, axis=1))
    return np.asarray(joined @ joined.T)


def decayed() -> Array:
    weights = np.zeros((N_USERS, N_WARM + N_COLD))
    np.add.at(weights, (LOG.user_idx, LOG.item_idx), 0.5 ** (LOG.age / 20))
    return weights


@pytest.mark.parametrize("items", ["all", "cold"])
def test_content_knn_is_the_decayed_sum_of_the_nearest_items(data: Dataset, items: str) -> None:
    """Each item keeps its three nearest items with events, whichever item it is."""
    settings = {"weights": WEIGHTS, "n_neighbours": 3, "half_life_days": 20, "items": items}
    model = ContentKNN.from_dict(settings).fit(data, FitOptions(), encoders(*WEIGHTS))
    assert model.items.tolist() == [*range(N_WARM + N_COLD)]
    nearest = cosines()[:, :N_WARM]  # of every item to those with events
    kept = np.zeros_like(nearest)
    best = np.argsort(-nearest, axis=1)[:, :3]
    np.put_along_axis(kept, best, np.take_along_axis(nearest, best, axis=1), axis=1)
    expected = decayed()[:, :N_WARM] @ np.maximum(kept, 0).T
    got = scores(model)
    is_listed = np.isfinite(got)
    assert got[is_listed] == pytest.approx(expected[is_listed], rel=1e-4, abs=1e-5)
    assert (expected[:, N_WARM:][~is_listed[:, N_WARM:]] == 0).all()
    assert is_listed[:, :N_WARM].any() == (items == "all")
    of_group = GROUP[N_WARM:] == np.arange(N_USERS)[:, None] % N_GROUPS
    cold = np.where(is_listed[:, N_WARM:], got[:, N_WARM:], 0)
    assert np.take_along_axis(of_group, cold.argmax(axis=1)[:, None], axis=1).mean() > 0.95


def test_content_knn_with_all_neighbours_ranks_by_the_sum_of_cosines(data: Dataset) -> None:
    settings = {"weights": WEIGHTS, "n_neighbours": None, "half_life_days": 20, "items": "cold"}
    model = ContentKNN.from_dict(settings).fit(data, FitOptions(), encoders(*WEIGHTS))
    got, expected = scores(model), decayed() @ cosines().T
    assert np.isneginf(got[:, :N_WARM]).all()
    ratio = got[:, N_WARM:] / expected[:, N_WARM:]
    assert ratio.std(axis=1).max() < 1e-4  # of each user the same: the length of the sum


def test_an_encoder_of_weight_0_is_not_read(data: Dataset) -> None:
    settings = {"weights": {"pictures": 0}, "n_neighbours": 3}
    both = ContentKNN.from_dict(settings).fit(data, FitOptions(), encoders(*WEIGHTS))
    one = ContentKNN.from_dict({"n_neighbours": 3}).fit(data, FitOptions(), encoders("words"))
    assert np.array_equal(both.arrays()["vectors"], one.arrays()["vectors"])


def fitted(data: Dataset, als: AlsModel, *names: str, **settings: Any) -> Any:
    return ContentFactors.from_dict(settings).fit(
        data, FitOptions(), {"als": als, **encoders(*names)}
    )


def test_items_with_events_keep_their_factors_to_the_bit(data: Dataset, als: AlsModel) -> None:
    model = fitted(data, als, "words", "pictures")
    warm = np.isin(model.items, als.items)
    assert np.array_equal(model.items[warm], als.items)
    assert np.array_equal(model.factors[warm], als.factors)
    assert np.array_equal(scores(model)[:, warm], scores(als))
    assert model.items[~warm].tolist() == [*range(N_WARM, N_WARM + N_COLD)]


def test_a_category_places_an_item_without_events(data: Dataset, als: AlsModel) -> None:
    """Each user's best items among those without events are the three of the own group."""
    model = fitted(data, als, fields=["category"], items="cold")
    assert model.items.tolist() == [*range(N_WARM, N_WARM + N_COLD)]
    top = np.argsort(-scores(model), axis=1)[:, : N_COLD // N_GROUPS]
    assert (GROUP[model.items][top] == np.arange(N_USERS)[:, None] % N_GROUPS).all()


def test_noise_beside_a_good_block_changes_nothing(data: Dataset, als: AlsModel) -> None:
    """The pictures say nothing: they are left out."""
    told: list[str] = []
    options = FitOptions(progress=told.append)
    needed = {"als": als, **encoders("pictures")}
    with_noise = ContentFactors.from_dict({"fields": ["category"]}).fit(data, options, needed)
    without = fitted(data, als, fields=["category"])
    assert "pictures off" in told[0]
    assert np.array_equal(with_noise.factors, without.factors)


def test_evidence_blends_own_and_predicted_factors(data: Dataset, als: AlsModel) -> None:
    own, predicted = RNG.normal(size=(2, 3, 2))
    of_base, n_users = np.array([0, 1, -1]), np.array([6.0, 2.0, 0.0])
    got = combine(predicted, own, of_base, n_users, 2.0)
    expected = [0.75 * own[0] + 0.25 * predicted[0], (own[1] + predicted[1]) / 2, predicted[2]]
    assert got == pytest.approx(np.array(expected), abs=1e-6)
    blended = fitted(data, als, fields=["category"], evidence=5.0)
    assert not np.array_equal(blended.factors[:N_WARM], als.factors)
    assert np.array_equal(blended.base.factors, als.factors)  # users are folded in by these


def test_factors_of_items_without_events_are_never_read(data: Dataset, als: AlsModel) -> None:
    """A model of events that has factors of such items, wild ones, gives the same answers."""
    wild = np.full((N_COLD, 8), 50, np.float32)
    leaky = AlsModel(
        als.settings,
        als.cutoff,
        np.arange(N_WARM + N_COLD, dtype=np.int32),
        np.concatenate([als.factors, wild]),
    )
    honest, told = fitted(data, als, "words"), fitted(data, leaky, "words")
    assert np.array_equal(honest.items, told.items)
    assert np.array_equal(honest.factors, told.factors)


def test_categories_and_prices_become_blocks() -> None:
    """Categories of an item share its weight; a price lies between two marks."""
    categories = pa.array([["a", "b"], None, ["b", "b"], []], pa.list_(pa.string()))
    block = category_block(categories)
    half = 0.5**0.5
    assert block.values == pytest.approx(np.array([[half, half], [0, 0], [1, 0], [0, 0]]))  # b, a
    assert block.is_known.tolist() == [True, False, True, False]
    prices = pa.array([1.0, 10.0, 100.0, None, 0.0, -2.0])
    block = price_block(prices)
    assert block.is_known.tolist() == [True, True, True, False, False, False]
    assert block.values[:3].sum(axis=1) == pytest.approx(1)
    assert len(np.unique(block.values[:3], axis=0)) == 3


def test_wrong_settings_and_empty_data_are_named(data: Dataset, als: AlsModel) -> None:
    for algorithm, kinds, message in (
        (ContentKNN.from_dict({}), {}, "built on encoders, at least one"),
        (ContentKNN.from_dict({}), {"als": "retriever"}, r"needs = \['als'\]"),
        (
            ContentKNN.from_dict({"weights": {"word": 1}}),
            {"words": "encoder"},
            "Did you mean 'words'",
        ),
        (ContentKNN.from_dict({"weights": {"words": 0}}), {"words": "encoder"}, "weighs 0"),
        (ContentFactors.from_dict({}), {"words": "encoder"}, "one model with item factors"),
        (ContentFactors.from_dict({"fields": []}), {"als": "retriever"}, "no content to read"),
        (
            ContentFactors.from_dict({}),
            {"als": "retriever", "price": "encoder"},
            r"encoders \['price'\] are called like",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            algorithm.check_needs(kinds)  # type: ignore[arg-type]
    popular = Popular.from_dict({}).fit(data, FitOptions())
    assert isinstance(popular, RetrieverModel)
    nothing = replace(data, vectors={name: v.limit(0) for name, v in data.vectors.items()})
    with pytest.raises(EmptyDataError, match="no item with an event before 2020-07-01"):
        ContentKNN.from_dict({}).fit(nothing, FitOptions(), encoders("words"))
    with pytest.raises(EmptyDataError, match="0 items have both factors by 'als' and content"):
        fitted(nothing, als, "words", fields=[])
    ease = SimilarOnly(Settings(), data.cutoff, als.items)
    with pytest.raises(ModelError, match="built on 'ease', which has no item factors"):
        ContentFactors.from_dict({}).fit(data, FitOptions(), {"ease": ease})


class SimilarOnly(AlsModel):
    """A retriever whose scores are no products of two vectors."""

    def __init__(self, settings: Any, cutoff: Any, items: Array) -> None:
        RetrieverModel.__init__(self, settings, cutoff, items)

    def scorer(self) -> Any:
        class Scorer:
            def score(self, block: QueryBlock) -> None:
                return None

        return Scorer()
