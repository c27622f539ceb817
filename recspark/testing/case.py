"""Cases, which the checks of a model run on: one fitted model, its data and its lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.feature_encoding import with_features
from recspark.models import artifacts
from recspark.models.base import (
    NOTHING,
    Algorithm,
    Coder,
    EncoderModel,
    FitOptions,
    FittedModel,
    Needed,
    RetrieverModel,
    Settings,
)
from recspark.models.registry import MODELS, ModelSpec
from recspark.testing import synth

K = 10  # length of the recommended lists
ENCODER = "planted"  # the encoder whose vectors are `synth.content_vectors`
_ALS = {"embedding_size": 8, "iterations": 4, "n_blocks": 2, "half_life_days": None}


class PlantedEncoder(EncoderModel):
    """Stands for the encoder of `synth.content_vectors`, and encodes nothing itself."""

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return {}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        return cls(settings, cutoff)

    def coder(self) -> Coder:
        """See `EncoderModel`."""
        raise NotImplementedError


class BaseCase:
    """One model of any kind under test, fitted once.

    Parameters
    ----------
    spark : session
    spec : the model's line in the registry
    settings : settings of the model that differ from its defaults, to keep the fit short
    folder : URI of the folder for saved models and training sets
    options : options of every fit; ranks must run in this process
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
        left_before_fit = left_behind(spark)
        self.fitted = self.fit(self.data)
        self.left_behind = left_behind(spark) - left_before_fit

    def first_data(self) -> Dataset:
        """Return the data to fit on. Sets `needed` if the model is built on other models."""
        raise NotImplementedError

    def make(self, **settings: Any) -> Algorithm[Settings]:
        """Return the algorithm, not fitted; `settings` override the settings of the case."""
        return self.spec.load().from_dict({**self.settings, **settings})

    def fit(self, data: Dataset, **settings: Any) -> FittedModel:
        """Fit the algorithm on `data` and return the model; `settings` as for `make`."""
        return self.make(**settings).fit(data, self.options, self.needed_on(data))

    def needed_on(self, data: Dataset) -> Needed:
        """Return the models that the algorithm is built on, fitted on `data`."""
        return self.needed

    @cached_property
    def saved(self) -> str:
        """Folder with the saved model. The first use saves it."""
        folder = storage.join(self.folder, "saved")
        artifacts.save(self.fitted, folder)
        return folder


class Case(BaseCase):
    """A retriever, fitted on `synth.power_law` without each user's newest event (see `truth`).

    `log` holds the events of the fit, and `truth` the item of the held-out event, by user. It is an
    item that the user never acted on before. For a model with the tag `own_items` it is one that
    the user acted on before.
    """

    def first_data(self) -> Dataset:
        """See `BaseCase`."""
        events = synth.power_law(150, 60)
        hold_out = synth.hold_out_newest if self.mode == "novel" else hold_out_repeated
        self.log, self.truth = hold_out(events)
        return self.dataset(self.log, "shared")

    @property
    def mode(self) -> str:
        """The mode of `queries`: `repeat` for a model that lists only the user's own items."""
        return "repeat" if "own_items" in self.spec.tags else "novel"

    @property
    def model(self) -> RetrieverModel:
        """The fitted model."""
        assert isinstance(self.fitted, RetrieverModel)
        return self.fitted

    def dataset(self, log: synth.Log, name: str, n_partitions: int = 2) -> Dataset:
        """Return `log` as a `Dataset` to fit on.

        It has the training sets that the model asks for, as neural models do. They are written to
        `name` below the folder of the case.
        """
        tables = self.make().training_tables
        folders = {table: storage.join(self.folder, name, table) for table in tables}
        data = synth.dataset(self.spark, log, n_partitions, folders)
        if "encoders" not in self.spec.tags:
            return data
        return replace(data, vectors={ENCODER: synth.content_vectors(self.spark, log)})

    def needed_on(self, data: Dataset) -> Needed:
        """See `BaseCase`. Tags say what it is: see `recspark.models.registry.ModelSpec`."""
        needed: dict[str, FittedModel] = {}
        if "factors" in self.spec.tags:
            als = MODELS["als"].load().from_dict(_ALS)
            needed["als"] = als.fit(data, self.options)
        if "encoders" in self.spec.tags:
            needed[ENCODER] = PlantedEncoder(Settings(), data.cutoff)
        self.make().check_needs({name: model.kind for name, model in needed.items()})
        return needed

    def refit(
        self, log: synth.Log, name: str, n_partitions: int = 2, **settings: Any
    ) -> tuple[RetrieverModel, Dataset]:
        """Fit on `log` and return (model, data). Parameters are as for `dataset` and `make`."""
        data = self.dataset(log, name, n_partitions)
        model = self.fit(data, **settings)
        assert isinstance(model, RetrieverModel)
        return model, data

    def ask(self, data: Dataset, model: RetrieverModel, mode: str = "novel") -> DataFrame:
        """Return the queries of all users of `data`, with user features if the model reads them."""
        return with_features(synth.ask(data, mode), data.user_features, model.user_encoding)

    @cached_property
    def queries(self) -> DataFrame:
        """The queries of all users in `mode`, sorted by user: computed once, kept on the driver."""
        queries = self.ask(self.data, self.model, self.mode)
        return self.spark.createDataFrame(queries.toArrow().sort_by("user_idx"), queries.schema)

    def queries_of(self, rows: Sequence[tuple[Any, ...]]) -> DataFrame:
        """Return a frame of queries from rows of `schema.QUERIES`. All user features are null."""
        queries = self.spark.createDataFrame(rows, schema.QUERIES)
        if self.model.user_encoding is None:
            return queries
        return queries.withColumn("features", F.lit(None).cast(schema.ENCODED))

    @cached_property
    def lists(self) -> pa.Table:
        """The K best items of every user, sorted by user and rank."""
        return ordered(self.model.recommend(self.queries, K))


def hold_out_repeated(events: synth.Log) -> tuple[synth.Log, dict[int, int]]:
    """Return the log without each user's newest event, and the item of that event, by user.

    Nothing is held out for a user who did not act on that item before.
    """
    newest_first = np.lexsort((events.age, events.user_idx))
    _, first_positions = np.unique(events.user_idx[newest_first], return_index=True)
    newest = newest_first[first_positions]
    pair = np.stack([events.user_idx, events.item_idx], axis=1)
    _, pair_index, n_events = np.unique(pair, axis=0, return_inverse=True, return_counts=True)
    held_out = newest[n_events[pair_index[newest]] > 1]
    is_kept = np.ones(len(events.age), bool)
    is_kept[held_out] = False
    users, items = events.user_idx[held_out].tolist(), events.item_idx[held_out].tolist()
    return events.only(is_kept), dict(zip(users, items, strict=True))


def ordered(lists: DataFrame) -> pa.Table:
    """Return the rows of `lists`, sorted by user and rank. Runs one Spark job."""
    return lists.toArrow().sort_by([("user_idx", "ascending"), ("rank", "ascending")])


def left_behind(spark: SparkSession) -> set[str]:
    """Return names of the persisted RDDs (also those of cached frames) and views of a session."""
    context: Any = spark.sparkContext
    persisted_rdds = {f"RDD {rdd_id}" for rdd_id in dict(context._jsc.getPersistentRDDs())}
    return persisted_rdds | {f"view {row.viewName}" for row in spark.sql("SHOW VIEWS").collect()}
