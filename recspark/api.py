"""recspark without conf files, tables or a night: for a notebook, or for somebody else's job.

    import recspark

    model = recspark.fit("ease", events, reg=300)        # user, item, time, and weight if there is one
    model.recommend(k=10).show()
    model.evaluate(later_events)

The same models on the same engines as the nightly run. Ids may be texts or whole numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ByteType,
    DataType,
    IntegerType,
    LongType,
    ShortType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from recspark import schema, storage
from recspark.config import Evaluate, Features, Mode, Sessions, Train, cutoff_of
from recspark.data import features, histories, sessions, texts, windows
from recspark.data.dataset import Dataset, TrainingSet
from recspark.data.encoded import with_features
from recspark.data.ids import new_ids
from recspark.data.interactions import before, queries
from recspark.errors import ConfigError, EmptyDataError, ModelError, SchemaError
from recspark.eval import evaluate as scoring
from recspark.models.base import FitOptions, RetrieverModel, check_k
from recspark.models.registry import make, model_spec

_IDS = (StringType, ByteType, ShortType, IntegerType, LongType)
_ANY_DAY = date(1970, 1, 1)  # dictionaries carry the night that first saw an id; here there is none
# The weight of an event is that of its column; nothing decays but by a model's own half-life.
_FEATURES = Features(  # type: ignore[call-arg]
    explicit=True, other_weight=1.0, event_weights={}, half_life_days=None
)

_KEY = ("user_id", "item_id", "value")  # and the time: what tells events from one another


def fit(
    algorithm: str,
    events: DataFrame,
    *,
    cutoff: datetime | None = None,
    ranks: int = 1,
    seed: int = 1,
    scratch: str | None = None,
    **settings: Any,
) -> Fitted:
    """Return `algorithm` fitted on `events`.

    Parameters
    ----------
    algorithm : one of `recspark models`, or `package.module:Class`
    events : `user`, `item` (texts or whole numbers), `time` (timestamp), and `weight` (number, 1 where
        the column is not there); one row an event
    cutoff : events from this moment on are left out, and ages are measured to it, UTC; default: the
        first midnight UTC after the newest event
    ranks, seed : of a network's training; everything random follows from the seed
    scratch : URI of a folder that driver and executors reach, for the training set and checkpoints of
        a network; default: a temporary folder, which will do where both are on one machine
    settings : of the algorithm; what is left out has its default

    Raises ConfigError for an unknown algorithm or setting, SchemaError for columns that are missing,
    of another type, or without a value in some row, EmptyDataError without an event before the
    cutoff. `events` are read three times; histories and ids stay persisted until `close`.
    """
    kind = model_spec(algorithm).kind
    if kind != "retriever":
        raise ConfigError(
            f"{algorithm} is of kind {kind}, which gives no lists of its own; run a night"
        )
    unfitted = make(algorithm, settings)
    types = _check_columns(events, {"user": _IDS, "item": _IDS, "time": (TimestampType,)})
    newest = _check_rows(events)
    cutoff = cutoff_of(newest.date()) if cutoff is None else _utc(cutoff)
    named = _named(events).where(F.col("event_at") < F.lit(cutoff))
    users = _dictionary(named, "user_id", "user_idx")
    items = _dictionary(named, "item_id", "item_idx")
    kept = [users, items]
    folder = tempfile.TemporaryDirectory(prefix="recspark-") if scratch is None else None
    place = f"file://{folder.name}" if folder is not None else str(scratch)
    try:
        sliced = before(_histories(named, users, items), cutoff).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        kept.append(sliced)
        catalogue = items.select("item_idx", "item_id").withColumns(
            {name: F.lit(None).cast(kind) for name, kind in _DESCRIPTION.items()}
        )
        data = Dataset(
            cutoff=cutoff,
            histories=sliced,
            items=catalogue,
            user_features=features.user_features(sliced, cutoff).drop("cutoff"),
            item_features=features.item_features(sliced, catalogue, cutoff).drop("cutoff"),
            training={
                table: _training_set(table, sliced, cutoff, place, ranks)
                for table in unfitted.training_tables
            },
        )
        options = FitOptions(
            train=Train(ranks=ranks, seed=seed),  # type: ignore[call-arg]
            scratch=storage.join(place, "checkpoints"),
        )
        model = unfitted.fit(data, options)
        assert isinstance(model, RetrieverModel)
    except BaseException:
        for frame in kept:
            frame.unpersist()
        raise
    finally:
        if folder is not None:
            folder.cleanup()
    return Fitted(algorithm, model, data, users, items, types, tuple(kept))


@dataclass(frozen=True)
class Fitted:
    """A fitted model with the ids of its users and items, as they were in the events.

    Parameters
    ----------
    algorithm : its name
    model : what answers in integers (`recspark.models.base.RetrieverModel`)
    data : what it was fitted on
    """

    algorithm: str
    model: RetrieverModel
    data: Dataset
    _users: DataFrame = field(repr=False)
    _items: DataFrame = field(repr=False)
    _types: Mapping[str, DataType] = field(repr=False)
    _kept: tuple[DataFrame, ...] = field(repr=False)

    def recommend(
        self, users: DataFrame | Iterable[Any] | None = None, k: int = 10, mode: Mode = "novel"
    ) -> DataFrame:
        """Return `user, item, rank, score`: the k best items of each user.

        `users` : ids, or a frame with a column `user`; default all. A user that the events do not have
        gets a list only from a model that answers cold users. `mode` novel leaves out what the user
        acted on; repeat does not. Lazy.
        """
        if mode not in schema.MODES:
            raise ConfigError(f"mode = '{mode}': one of {', '.join(schema.MODES)}")
        asked = self.data.histories
        known = self._users
        if users is not None:
            wanted = self._asked(users)
            known = wanted.join(self._users, on="user_id", how="left").withColumn(
                "user_idx", F.coalesce("user_idx", -1 - F.pmod(F.xxhash64("user_id"), F.lit(2**62)))
            )
            asked = self._histories_of(known.select("user_idx"))
        lists = self.model.recommend(self._queries(asked, mode), k)
        return (
            lists.join(known.select("user_id", "user_idx"), on="user_idx", how="inner")
            .join(self._items, on="item_idx", how="inner")
            .select(self._out("user"), self._out("item"), "rank", "score")
        )

    def neighbours(self, k: int = 10) -> DataFrame:
        """Return `item, rank, neighbour, score`: what acting on that item alone would bring. Lazy.

        Raises ModelError where the algorithm gives none (`recspark models`: tag `neighbours`).
        """
        check_k(k)
        spec = model_spec(self.algorithm)
        if "neighbours" not in spec.tags:
            raise ModelError(f"{self.algorithm} gives no neighbours of items")
        theirs = self._items.select(
            F.col("item_idx").alias("neighbour_idx"), F.col("item_id").alias("neighbour_id")
        )
        neighbour = F.col("neighbour_id").cast(self._types["item"]).alias("neighbour")
        return (
            self.model.neighbours(k)
            .join(self._items, on="item_idx", how="inner")
            .join(theirs, on="neighbour_idx", how="inner")
            .select(self._out("item"), "rank", neighbour, "score")
        )

    def evaluate(
        self, truth: DataFrame, ks: Sequence[int] = (10, 20), mode: Mode = "novel"
    ) -> dict[str, float]:
        """Return `ndcg@10` and the other metrics of docs/metrics.md, over all users of `truth`.

        `truth` : `user`, `item`: what they acted on later. In mode novel what a user had acted on
        before is left out. A user without a list counts 0. An item that the events do not have is left
        out, and `n_cold_items_in_truth` counts it.
        """
        _check_columns(truth, {"user": _IDS, "item": _IDS})
        pairs = truth.select(
            F.trim(F.col("user").cast("string")).alias("user_id"),
            F.trim(F.col("item").cast("string")).alias("item_id"),
        ).distinct()
        users = _with_new(self._users, pairs, "user_id", "user_idx")
        items = _with_new(self._items, pairs, "item_id", "item_idx")
        truths = (
            pairs.join(users, on="user_id", how="inner")
            .join(items, on="item_id", how="inner")
            .groupBy("user_idx")
            .agg(F.array_sort(F.collect_list("item_idx")).alias("items"))
        )
        known = self.data.histories.select("user_idx", "seen").join(
            self.data.user_features.select("user_idx", "activity"), on="user_idx", how="inner"
        )
        population = scoring.population(truths, known)
        asked = self._histories_of(truths.select("user_idx"))
        lists = self.model.recommend(self._queries(asked, mode), max(ks)).select(
            F.lit(self.algorithm).alias("model"), F.lit(mode).alias("mode"), "user_idx", "item_idx",
            "rank",
        )  # fmt: skip
        rows = scoring.evaluate(
            lists,
            population,
            scoring.catalogue(self.data.item_features),
            Evaluate(ks=tuple(ks), n_bootstrap=0),  # type: ignore[call-arg]
            run_date=self.data.cutoff.date() - timedelta(days=1),
            kind="backtest",
            cutoff=self.data.cutoff,
            models=(self.algorithm,),
            modes=(mode,),
        )
        return {
            f"{row.metric}@{row.k}" if row.k else row.metric: row.value
            for row in rows
            if row.segment == "all" and row.value is not None
        }

    def close(self) -> None:
        """Let Spark drop what this holds in memory; nothing can be asked afterwards."""
        for frame in self._kept:
            frame.unpersist()

    def _queries(self, asked: DataFrame, mode: str) -> DataFrame:
        """Return the queries of `asked`, with features where the model reads them."""
        rows = queries(asked, mode)
        return with_features(rows, self.data.user_features, self.model.user_encoding)

    def _histories_of(self, users: DataFrame) -> DataFrame:
        """Return `user_idx, history, seen` of `users`; those of a cold user are empty."""
        return users.join(self.data.histories, on="user_idx", how="left").select(
            "user_idx",
            F.coalesce("history", F.array().cast(schema.HISTORY)).alias("history"),
            F.coalesce("seen", F.array().cast(schema.ITEM_IDXS)).alias("seen"),
        )

    def _asked(self, users: DataFrame | Iterable[Any]) -> DataFrame:
        """Return `user_id` of the users that are asked for, each once."""
        if not isinstance(users, DataFrame):
            of_user = StructType([StructField("user", self._types["user"])])
            rows = [(user,) for user in users]
            users = self._users.sparkSession.createDataFrame(rows, of_user)
        _check_columns(users, {"user": _IDS})
        return users.select(F.trim(F.col("user").cast("string")).alias("user_id")).distinct()

    def _out(self, name: str) -> Any:
        """Return the column of an id, of the type that it had in the events."""
        return F.col(f"{name}_id").cast(self._types[name]).alias(name)


_DESCRIPTION = {
    "item_name": "string",
    "category": "array<string>",
    "price": "double",
    "text": "string",
}


def _check_columns(
    frame: DataFrame, wanted: Mapping[str, tuple[type[DataType], ...]]
) -> dict[str, DataType]:
    """Return the types of the columns `wanted`; SchemaError names all that are missing or wrong."""
    types = {f.name: f.dataType for f in frame.schema.fields}
    wrong = [
        f"{name} is {types[name].simpleString() if name in types else 'missing'}, expected "
        + " or ".join(dict.fromkeys(kind().simpleString() for kind in kinds))
        for name, kinds in wanted.items()
        if not isinstance(types.get(name), kinds)
    ]
    if wrong:
        raise SchemaError(f"{'; '.join(wrong)}; there are {sorted(types)}")
    return {name: types[name] for name in wanted}


def _check_rows(events: DataFrame) -> datetime:
    """Return the time of the newest event; raise for rows without a value, and for no row. A job."""
    checks = {name: F.count_if(F.col(name).isNull()) for name in ("user", "item", "time")}
    if "weight" in events.columns:
        weight = F.col("weight").cast("double")
        checks["weight"] = F.count_if(weight.isNull() | F.isnan(weight) | (F.abs(weight) > 1e30))
    newest = F.unix_micros(F.max("time")).alias("newest")
    row = events.agg(newest, *[column.alias(name) for name, column in checks.items()]).collect()[0]
    wrong = [f"{row[name]:,} rows have no {name}" for name in checks if row[name]]
    if wrong:
        raise SchemaError(f"events: {', '.join(wrong)} that can be read; leave those rows out")
    if row["newest"] is None:
        raise EmptyDataError("events: there is no row")
    return datetime.fromtimestamp(row["newest"] / 1e6, UTC)


def _named(events: DataFrame) -> DataFrame:
    """Return events in the words of the event schema, as far as models read it."""
    weight = F.col("weight").cast("double") if "weight" in events.columns else F.lit(1.0)
    return events.select(
        F.trim(F.col("user").cast("string")).alias("user_id"),
        F.trim(F.col("item").cast("string")).alias("item_id"),
        F.col("time").alias("event_at"),
        weight.alias("value"),
        F.lit("event").alias("event_type"),
        F.lit(None).cast("string").alias("session_key"),
        F.lit(None).cast("string").alias("order_id"),
    ).withColumn(
        "event_id",
        F.sha2(
            F.concat_ws("\u0001", "user_id", "item_id", F.unix_micros("event_at"), "value"), 256
        ),
    )


def _dictionary(events: DataFrame, id_column: str, idx_column: str) -> DataFrame:
    kind = "int" if idx_column == "item_idx" else "bigint"
    spark = events.sparkSession
    none = spark.createDataFrame([], f"{id_column} string, {idx_column} {kind}")
    ids = new_ids(events.select(id_column), none, id_column, idx_column, _ANY_DAY)
    return ids.drop("run_date").persist(StorageLevel.MEMORY_AND_DISK)


def _with_new(known: DataFrame, pairs: DataFrame, id_column: str, idx_column: str) -> DataFrame:
    """Return the dictionary with the ids of `pairs` that it lacks behind its own."""
    new = new_ids(pairs.select(id_column), known, id_column, idx_column, _ANY_DAY)
    return known.select(id_column, idx_column).unionByName(new.select(id_column, idx_column))


def _histories(events: DataFrame, users: DataFrame, items: DataFrame) -> DataFrame:
    """Return `user_idx, history`, newest last."""
    settings = Sessions()  # type: ignore[call-arg]
    labelled = sessions.with_session_id(events, settings).withColumns(
        {"changed_at": F.timestamp_micros(F.lit(-(2**62))), "is_act": F.lit(True)}
    )
    rows = histories.suffixes(labelled, users, items, _FEATURES)
    return rows.select("user_idx", F.col("suffix").alias("history"))


def _training_set(
    table: str, sliced: DataFrame, cutoff: datetime, place: str, ranks: int
) -> TrainingSet:
    """Write the training set that a network reads below `place`."""
    if table not in windows.TRAINING_TABLES:
        what = "the words of items" if table == texts.TABLE else "what was shown to users"
        raise ModelError(f"this model learns from {what}, which events alone do not have")
    n_files = windows.n_training_files(ranks)
    rows = windows.TRAINING_TABLES[table](sliced, cutoff, _FEATURES, n_files)
    folder = storage.join(place, table)
    rows.drop("cutoff").write.parquet(folder)
    spark: SparkSession = sliced.sparkSession
    return TrainingSet.of_files(table, 0, spark.read.parquet(folder).inputFiles())


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
