"""The checks of encoders: models that turn the content of an item into a vector."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, ModelError
from recspark.models import artifacts
from recspark.models.base import EncoderModel
from recspark.models.registry import make
from recspark.testing import synth
from recspark.testing.case import BaseCase
from recspark.testing.check import check, raises

ENCODER = ("encoder",)


class EncoderCase(BaseCase):
    """An encoder, fitted on the events of `synth.power_law` and on a catalogue of their items."""

    def first_data(self) -> Dataset:
        """See `BaseCase`. An encoder that needs a retriever gets a factor model."""
        tables = {table: f"{self.folder}/{table}" for table in self.algorithm.training_tables}
        data = synth.dataset(self.spark, synth.power_law(150, 60), 2, tables)
        media = synth.write_media(self.spark, data.items, f"{self.folder}/media")
        data = replace(data, catalogue=synth.with_media(data.items, media))
        if self._needs_a_retriever():
            settings = {"embedding_size": 4, "iterations": 2, "n_blocks": 2}
            factor_model = make("als", settings).fit(data, self.options)
            self.needed = {"als": factor_model}
        return data

    def _needs_a_retriever(self) -> bool:
        try:
            self.algorithm.check_needs({"als": "retriever"})
        except ConfigError:
            return False
        return True

    @property
    def model(self) -> EncoderModel:
        """The fitted model."""
        assert isinstance(self.fitted, EncoderModel)
        return self.fitted

    @cached_property
    def content(self) -> DataFrame:
        """The catalogue and two more items: a copy of the first one (10^6), one without content."""
        assert self.data.catalogue is not None
        catalogue = self.data.catalogue
        first_item = catalogue.orderBy("item_idx").limit(1)
        twin_item = first_item.withColumn("item_idx", F.lit(10**6).cast("int"))
        empty_item = self.spark.createDataFrame([(10**6 + 1, *[None] * 5)], schema.CONTENT)
        rows = (
            catalogue.unionByName(twin_item).unionByName(empty_item).toArrow().sort_by("item_idx")
        )
        return self.spark.createDataFrame(rows, schema.CONTENT)

    @cached_property
    def vectors(self) -> pa.Table:
        """The vectors of `content`, sorted by item."""
        return encoded(self.model, self.content)


def encoded(model: EncoderModel, items: DataFrame) -> pa.Table:
    """Return the vectors of `items`, sorted by item. Runs one Spark job."""
    return model.encode(items).toArrow().sort_by("item_idx")


def matrix(vectors: pa.Table) -> Array:
    """Return the vectors as one matrix, float32 (n_items, size)."""
    return np.array(vectors.column("vector").to_pylist(), np.float32)


@check(kinds=ENCODER)
def vectors_are_of_one_size(case: EncoderCase) -> None:
    """The vectors have the schema and one length, are finite and not all equal.

    An item has at most one vector.
    """
    assert case.model.encode(case.content).schema == schema.VECTORS
    item = case.vectors.column("item_idx").to_numpy()
    assert len(item) > 1
    assert len(np.unique(item)) == len(item)
    assert set(item.tolist()) <= set(case.content.toArrow().column("item_idx").to_pylist())
    assert len({len(vector) for vector in case.vectors.column("vector").to_pylist()}) == 1
    values = matrix(case.vectors)
    assert np.isfinite(values).all()
    assert values.std(axis=0).max() > 0


@check(kinds=ENCODER)
def same_content_same_vector(case: EncoderCase) -> None:
    """Two items with equal content have equal vectors."""
    item, values = case.vectors.column("item_idx").to_numpy(), matrix(case.vectors)
    vector_of_first = values[item == item.min()]
    assert np.array_equal(values[item == 10**6], vector_of_first)


@check(kinds=ENCODER)
def an_item_has_its_vector_whoever_is_beside(case: EncoderCase) -> None:
    """An item's vector has the same bits in another order, in other partitions, and alone."""
    shuffled = case.content.orderBy(F.xxhash64("item_idx")).repartition(5)
    assert encoded(case.model, shuffled) == case.vectors
    first_item = int(case.vectors.column("item_idx")[0].as_py())
    vector_alone = encoded(case.model, case.content.where(F.col("item_idx") == first_item))
    assert vector_alone.to_pylist() == case.vectors.slice(0, 1).to_pylist()


@check(kinds=ENCODER)
def refit_gives_the_same_encoder(case: EncoderCase) -> None:
    """A second fit on the same data gives the same bits."""
    refitted = case.fit(case.data)
    for name, array in case.model.arrays().items():
        assert np.array_equal(refitted.arrays()[name], array), f"array '{name}' differs"


@check(kinds=ENCODER)
def a_saved_encoder_gives_the_same_vectors(case: EncoderCase) -> None:
    """A model that was saved and loaded has the same settings, and gives the same bits."""
    loaded = artifacts.load(case.saved, case.spec)
    assert isinstance(loaded, EncoderModel)
    assert loaded.settings == case.model.settings
    assert encoded(loaded, case.content) == case.vectors


@check(kinds=ENCODER)
def wrong_items_are_named(case: EncoderCase) -> None:
    """A missing column is a ModelError that names it and lists the columns of the frame."""
    with raises(ModelError, "text is missing", "'price'"):
        case.model.encode(case.content.drop("text"))


@check(kinds=ENCODER)
def no_items_no_vectors(case: EncoderCase) -> None:
    """An empty frame of items gives an empty frame of vectors."""
    assert case.model.encode(case.content.limit(0)).toArrow().num_rows == 0
