"""Encoders that learn item factors from pictures and sounds: they place items nobody acted on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Train
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import Algorithm, FitOptions, RetrieverModel
from recspark.models.content.audio import Audio
from recspark.models.content.colours import ColoursModel, ColoursSettings
from recspark.models.content.image import Image
from recspark.models.factors.als import AlsModel, AlsSettings
from recspark.models.items.popular import PopularModel, PopularSettings
from recspark.testing import synth
from tests.models.content.planted import N_CLASSES, ndcg, pictures, sounds

pytestmark = [pytest.mark.spark, pytest.mark.torch]

N_WARM, N_COLD = 160, 80
OPTIONS = FitOptions(train=Train(ranks=1), in_process=True)  # type: ignore[call-arg]
CLASSES = np.arange(N_WARM + N_COLD) % N_CLASSES
WARM, COLD = CLASSES[:N_WARM], CLASSES[N_WARM:]
# The users who like a class have this factor, and its items too, but for noise.
LIKES = 2.0 * np.eye(N_CLASSES, 6, dtype=np.float32)
IMAGE = {"image_size": 32, "width": 8, "epochs": 16, "batch_size": 16}
AUDIO = {"excerpt_seconds": 0.5, "hidden_size": 24, "epochs": 16, "batch_size": 16}
AUDIO["learning_rate"] = 0.01


def factor_model(classes: np.ndarray) -> RetrieverModel:
    noise = np.random.default_rng(1).normal(0, 0.2, (len(classes), 6))
    factors = (LIKES[classes] + 0.3 + noise).astype(np.float32)
    items = np.arange(len(classes), dtype=np.int32)
    return AlsModel(AlsSettings(), synth.CUTOFF, items, factors)


def content(addresses: list[str], first: int = 0) -> pa.Table:
    """`schema.CONTENT` of items that have nothing but these media."""
    n = len(addresses)
    return pa.table(
        {
            "item_idx": pa.array(np.arange(first, first + n), pa.int32()),
            "item_name": pa.nulls(n, pa.string()),
            "category": pa.nulls(n, pa.list_(pa.string())),
            "price": pa.nulls(n, pa.float64()),
            "text": pa.nulls(n, pa.string()),
            "media": pa.array([[address] for address in addresses]),
        }
    )


def dataset(spark: SparkSession, addresses: list[str]) -> Dataset:
    log = synth.Log(
        np.zeros(N_WARM, np.int64),
        np.arange(N_WARM, dtype=np.int32),
        np.ones(N_WARM),
        np.ones(N_WARM, np.float32),
    )
    catalogue = spark.createDataFrame(content(addresses), schema.CONTENT)
    return replace(synth.dataset(spark, log), catalogue=catalogue)


def cold_ndcg(
    spark: SparkSession, algorithm: Algorithm[Any], addresses: list[str], warm: np.ndarray
) -> float:
    """Fit on the warm items, as if they had the classes `warm`, and rank the cold ones."""
    needed = {"als": factor_model(warm)}
    fitted: Any = algorithm.fit(dataset(spark, addresses), OPTIONS, needed)
    return ndcg(LIKES @ vectors_of(fitted, addresses[N_WARM:]).T, COLD)


def vectors_of(fitted: Any, addresses: list[str]) -> np.ndarray:
    [batch] = content(addresses).to_batches()
    return np.asarray(fitted.coder().encode(batch))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return pictures(CLASSES, tmp_path_factory.mktemp("pictures"), 5)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sounds(CLASSES, tmp_path_factory.mktemp("sounds"), 5)


MODELS: dict[str, tuple[type[Algorithm[Any]], dict[str, Any]]] = {
    "shown": (Image, IMAGE),
    "heard": (Audio, AUDIO),
}


@pytest.mark.parametrize("media", MODELS)
def test_cold_items_are_placed_by_what_is_shown_or_heard(
    media: str, spark: SparkSession, request: pytest.FixtureRequest
) -> None:
    """Nearly perfect with the right factors; by chance (0.25 on average) with those of other items."""
    algorithm, settings = MODELS[media]
    addresses = request.getfixturevalue(media)
    encoder = algorithm.from_dict(settings)
    assert cold_ndcg(spark, encoder, addresses, WARM) >= 0.9
    shuffled = np.random.default_rng(3).permutation(WARM)
    assert cold_ndcg(spark, encoder, addresses, shuffled) < 0.5


def test_colours_do_not_tell_these_classes(shown: list[str]) -> None:
    """The bar: what the network sees is not in the histogram."""
    vectors = vectors_of(ColoursModel(ColoursSettings(), synth.CUTOFF), shown)
    centres = np.stack([vectors[:N_WARM][k == WARM].mean(axis=0) for k in range(N_CLASSES)])
    assert ndcg(centres @ vectors[N_WARM:].T, COLD) < 0.6


def test_vectors_can_be_features(spark: SparkSession, shown: list[str]) -> None:
    encoder = Image.from_dict({**IMAGE, "epochs": 1, "vector": "features"})
    fitted: Any = encoder.fit(dataset(spark, shown), OPTIONS, {"als": factor_model(WARM)})
    vectors = vectors_of(fitted, shown[:3])
    assert vectors.shape == (3, 4 * IMAGE["width"])
    assert (vectors >= 0).all()  # means of what a ReLU gives


def test_needs_and_data_that_do_not_suit_are_named(
    spark: SparkSession, shown: list[str], tmp_path: Path
) -> None:
    image = Image.from_dict(IMAGE)
    for kinds in ({}, {"words": "encoder"}, {"als": "retriever", "mf": "retriever"}):
        with pytest.raises(ConfigError, match=r"item factors of one model.*needs = \["):
            image.check_needs(kinds)  # type: ignore[arg-type]
    items = np.arange(N_WARM, dtype=np.int32)
    popular = PopularModel(PopularSettings(), synth.CUTOFF, items, np.ones(N_WARM, np.float32))
    with pytest.raises(ModelError, match="'popular' has none"):
        image.fit(dataset(spark, shown), OPTIONS, {"popular": popular})
    missing = dataset(spark, [f"{tmp_path}/{n}.png" for n in range(N_WARM)])
    with pytest.raises(
        EmptyDataError, match="of 160 items with factors, none has a readable image"
    ):
        image.fit(missing, OPTIONS, {"als": factor_model(WARM)})
