"""The case that the checks of a model run on: one fitted model, its data and its lists."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from recspark import schema, storage
from recspark.data.dataset import Dataset
from recspark.models import artifacts
from recspark.models.base import FitOptions, Recommender, RecommenderModel, Settings
from recspark.models.registry import ModelSpec
from recspark.testing import synth

K = 10


class Case:
    """One model under test: fitted once on `synth.power_law`, each user's newest event held out.

    Parameters
    ----------
    spark : session
    spec : registry line of the model
    settings : over its defaults, to keep the fit short
    folder : URI; saved models and training sets go below it
    options : of every fit; ranks in process
    """

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
        self.log, self.truth = synth.hold_out_newest(synth.power_law(150, 60))
        self.recommender = self.make()
        self.data = self.dataset(self.log, "shared")
        before = left_behind(spark)
        self.model = self.recommender.fit(self.data, options)
        self.left_behind = left_behind(spark) - before

    def make(self, **settings: Any) -> Recommender[Settings]:
        """Return the model that is not fitted, with `settings` over those of the case."""
        return self.spec.load().from_dict({**self.settings, **settings})

    def dataset(self, log: synth.Log, name: str, n_partitions: int = 2) -> Dataset:
        """Return what the model is fitted on; a neural one gets a training set below `folder`."""
        table = self.make().training_table
        training = None if table is None else (table, storage.join(self.folder, name))
        return synth.dataset(self.spark, log, n_partitions, training)

    def refit(
        self, log: synth.Log, name: str, n_partitions: int = 2, **settings: Any
    ) -> tuple[RecommenderModel, Dataset]:
        """Return (model, data) of a fit on `log`."""
        data = self.dataset(log, name, n_partitions)
        return self.make(**settings).fit(data, self.options), data

    @cached_property
    def queries(self) -> DataFrame:
        """The novel queries of all users, by user, as a local frame: computed once."""
        rows = synth.ask(self.data).toArrow().sort_by("user_idx")
        return self.spark.createDataFrame(rows, schema.QUERIES)

    @cached_property
    def lists(self) -> pa.Table:
        """The K best of every user, sorted by user and rank."""
        return ordered(self.model.recommend(self.queries, K))

    @cached_property
    def saved(self) -> str:
        """Where the model is saved."""
        folder = storage.join(self.folder, "saved")
        artifacts.save(self.model, folder)
        return folder


def ordered(lists: DataFrame) -> pa.Table:
    """Return the rows of `lists` by user and rank. One job."""
    return lists.toArrow().sort_by([("user_idx", "ascending"), ("rank", "ascending")])


def left_behind(spark: SparkSession) -> set[str]:
    """Return what a session holds on to: persisted RDDs (also those of cached frames) and views."""
    context: Any = spark.sparkContext
    persisted = {f"RDD {key}" for key in dict(context._jsc.getPersistentRDDs())}
    return persisted | {f"view {row.viewName}" for row in spark.sql("SHOW VIEWS").collect()}
