"""The case that the checks of a model run on: one fitted model, its data and its lists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data.dataset import Dataset
from recspark.data.encoded import with_features
from recspark.models import artifacts
from recspark.models.base import (
    NOTHING,
    Algorithm,
    FitOptions,
    FittedModel,
    Needed,
    RetrieverModel,
    Settings,
)
from recspark.models.registry import ModelSpec
from recspark.testing import synth

K = 10


class BaseCase:
    """One model of any kind under test, fitted once.

    Parameters
    ----------
    spark : session
    spec : registry line of the model
    settings : over its defaults, to keep the fit short
    folder : URI; saved models and training sets go below it
    options : of every fit; ranks in process
    """

    data: Dataset

    def __init__(
        self,
        spark: SparkSession,
        spec: ModelSpec,
        settings: dict[str, Any],
        folder: str,
        options: FitOptions,
    ) -> None:
        self.spark, self.spec, self.settings = spark, spec, settings
        self.folder, self.options = folder, options
        self.algorithm = self.make()
        self.needed: Needed = NOTHING
        self.data = self.first_data()
        before = left_behind(spark)
        self.fitted = self.fit(self.data)
        self.left_behind = left_behind(spark) - before

    def first_data(self) -> Dataset:
        """Return what the model is fitted on; sets `needed` where it is built on others."""
        raise NotImplementedError

    def make(self, **settings: Any) -> Algorithm[Settings]:
        """Return the model that is not fitted, with `settings` over those of the case."""
        return self.spec.load().from_dict({**self.settings, **settings})

    def fit(self, data: Dataset, **settings: Any) -> FittedModel:
        """Return the model fitted on `data`."""
        return self.make(**settings).fit(data, self.options, self.needed)

    @cached_property
    def saved(self) -> str:
        """Where the model is saved."""
        folder = storage.join(self.folder, "saved")
        artifacts.save(self.fitted, folder)
        return folder


class Case(BaseCase):
    """A retriever, fitted on `synth.power_law`, each user's newest event held out."""

    def first_data(self) -> Dataset:
        """See `BaseCase`."""
        self.log, self.truth = synth.hold_out_newest(synth.power_law(150, 60))
        return self.dataset(self.log, "shared")

    @property
    def model(self) -> RetrieverModel:
        """The fitted model."""
        assert isinstance(self.fitted, RetrieverModel)
        return self.fitted

    def dataset(self, log: synth.Log, name: str, n_partitions: int = 2) -> Dataset:
        """Return what the model is fitted on; a neural one gets a training set below `folder`."""
        tables = self.make().training_tables
        folders = {table: storage.join(self.folder, name, table) for table in tables}
        return synth.dataset(self.spark, log, n_partitions, folders)

    def refit(
        self, log: synth.Log, name: str, n_partitions: int = 2, **settings: Any
    ) -> tuple[RetrieverModel, Dataset]:
        """Return (model, data) of a fit on `log`."""
        data = self.dataset(log, name, n_partitions)
        model = self.fit(data, **settings)
        assert isinstance(model, RetrieverModel)
        return model, data

    def ask(self, data: Dataset, model: RetrieverModel, mode: str = "novel") -> DataFrame:
        """Return the queries of all users of `data`, with their features where the model reads them."""
        return with_features(synth.ask(data, mode), data.user_features, model.user_encoding)

    @cached_property
    def queries(self) -> DataFrame:
        """The novel queries of all users, by user, as a local frame: computed once."""
        asked = self.ask(self.data, self.model)
        return self.spark.createDataFrame(asked.toArrow().sort_by("user_idx"), asked.schema)

    def queries_of(self, rows: Sequence[tuple[Any, ...]]) -> DataFrame:
        """Return queries of `schema.QUERIES` rows; nothing is known of their users' features."""
        queries = self.spark.createDataFrame(rows, schema.QUERIES)
        if self.model.user_encoding is None:
            return queries
        return queries.withColumn("features", F.lit(None).cast(schema.ENCODED))

    @cached_property
    def lists(self) -> pa.Table:
        """The K best of every user, sorted by user and rank."""
        return ordered(self.model.recommend(self.queries, K))


def ordered(lists: DataFrame) -> pa.Table:
    """Return the rows of `lists` by user and rank. One job."""
    return lists.toArrow().sort_by([("user_idx", "ascending"), ("rank", "ascending")])


def left_behind(spark: SparkSession) -> set[str]:
    """Return what a session holds on to: persisted RDDs (also those of cached frames) and views."""
    context: Any = spark.sparkContext
    persisted = {f"RDD {key}" for key in dict(context._jsc.getPersistentRDDs())}
    return persisted | {f"view {row.viewName}" for row in spark.sql("SHOW VIEWS").collect()}
