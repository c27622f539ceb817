"""recspark without conf files, tables or a night: for a notebook, or as a part of another job.

    import recspark

    model = recspark.fit("ease", events, reg=300)        # user, item, time, and weight if there is one
    model.recommend(k=10).show()
    model.evaluate(later_events)

These are the same models, on the same engines, as in the nightly run. Ids may be texts or whole
numbers.
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
from recspark.data import features, histories, sessions, training_rows, training_texts
from recspark.data.dataset import Dataset, TrainingSet
from recspark.data.feature_encoding import with_features
from recspark.data.ids import new_ids
from recspark.data.interactions import before, queries
from recspark.errors import ConfigError, EmptyDataError, ModelError, SchemaError
from recspark.eval import evaluate as scoring
from recspark.hybrid.reasons import Voice, with_reasons
from recspark.models.base import FitOptions, RetrieverModel, check_k
from recspark.models.registry import make, model_spec

_ID_TYPES = (StringType, ByteType, ShortType, IntegerType, LongType)
_MODEL = "model"  # the name of the only model, where models have names
_ANY_DAY = date(1970, 1, 1)  # `new_ids` needs the night that first saw an id; here there is none
# The weight of an event is its column `weight`. It does not decay, unless a model has its own
# half-life.
_FEATURES = Features(  # type: ignore[call-arg]
    explicit=True, other_weight=1.0, event_weights={}, half_life_days=None
)


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
    events : one row per event, with the columns `user`, `item` (texts or whole numbers), `time`
        (timestamp), and `weight` (number; 1 if the column is missing)
    cutoff : events from this moment on are left out, and ages are measured back from it; UTC.
        Default: the first midnight UTC after the newest event
    ranks, seed : number of ranks that train a network; seed of everything that is random
    scratch : URI of a folder that the driver and the executors can reach, for the training set and
        the checkpoints of a network. Default: a temporary folder, which suffices if both are on one
        machine
    settings : of the algorithm; a setting that is left out has its default

    Raises ConfigError for an unknown algorithm or setting, SchemaError for a column that is
    missing, has another type, or has no value in some row, EmptyDataError if there is no event
    before the cutoff. `events` are read three times. Histories and ids stay persisted until
    `Fitted.close`.
    """
    kind = model_spec(algorithm).kind
    if kind != "retriever":
        raise ConfigError(
            f"{algorithm} is of kind {kind}, which gives no lists of its own; run a night"
        )
    unfitted = make(algorithm, settings)
    types = _check_columns(events, {"user": _ID_TYPES, "item": _ID_TYPES, "time": (TimestampType,)})
    newest = _check_rows(events)
    cutoff = cutoff_of(newest.date()) if cutoff is None else _utc(cutoff)
    named_events = _to_event_schema(events).where(F.col("event_at") < F.lit(cutoff))
    users = _dictionary(named_events, "user_id", "user_idx")
    items = _dictionary(named_events, "item_id", "item_idx")
    persisted_frames = [users, items]
    temporary_folder = tempfile.TemporaryDirectory(prefix="recspark-") if scratch is None else None
    scratch_uri = (
        f"file://{temporary_folder.name}" if temporary_folder is not None else str(scratch)
    )
    try:
        user_histories = before(_user_histories(named_events, users, items), cutoff).persist(
            StorageLevel.MEMORY_AND_DISK
        )
        persisted_frames.append(user_histories)
        catalogue = items.select("item_idx", "item_id").withColumns(
            {name: F.lit(None).cast(sql_type) for name, sql_type in _DESCRIPTION_TYPES.items()}
        )
        data = Dataset(
            cutoff=cutoff,
            histories=user_histories,
            items=catalogue,
            user_features=features.user_features(user_histories, cutoff).drop("cutoff"),
            item_features=features.item_features(user_histories, catalogue, cutoff).drop("cutoff"),
            training={
                table: _training_set(table, user_histories, cutoff, scratch_uri, ranks)
                for table in unfitted.training_tables
            },
        )
        options = FitOptions(
            train=Train(ranks=ranks, seed=seed),  # type: ignore[call-arg]
            scratch=storage.join(scratch_uri, "checkpoints"),
        )
        model = unfitted.fit(data, options)
        assert isinstance(model, RetrieverModel)
    except BaseException:
        for frame in persisted_frames:
            frame.unpersist()
        raise
    finally:
        if temporary_folder is not None:
            temporary_folder.cleanup()
    return Fitted(algorithm, model, data, users, items, types, tuple(persisted_frames))


@dataclass(frozen=True)
class Fitted:
    """A fitted model, with the ids of its users and items as they were in the events.

    Parameters
    ----------
    algorithm : name of the algorithm
    model : the model itself, which works with integer ids (`recspark.models.base.RetrieverModel`)
    data : the data that the model was fitted on
    """

    algorithm: str
    model: RetrieverModel
    data: Dataset
    _users: DataFrame = field(repr=False)
    _items: DataFrame = field(repr=False)
    _types: Mapping[str, DataType] = field(repr=False)
    _persisted_frames: tuple[DataFrame, ...] = field(repr=False)

    def recommend(
        self, users: DataFrame | Iterable[Any] | None = None, k: int = 10, mode: Mode = "novel"
    ) -> DataFrame:
        """Return `user, item, rank, score`: the k best items of each user. Lazy.

        Parameters
        ----------
        users : ids, or a frame with a column `user`; default: all users. A user without events gets
            a list only if the model can answer cold users
        mode : `novel` leaves out the items that the user acted on before; `repeat` keeps them
        """
        if mode not in schema.MODES:
            raise ConfigError(f"mode = '{mode}': one of {', '.join(schema.MODES)}")
        user_histories = self.data.histories
        user_ids = self._users
        if users is not None:
            # A user without events gets a negative index, made from a hash of the id. All other
            # indexes are at least 0.
            requested_users = self._requested_users(users)
            user_ids = requested_users.join(self._users, on="user_id", how="left").withColumn(
                "user_idx", F.coalesce("user_idx", -1 - F.pmod(F.xxhash64("user_id"), F.lit(2**62)))
            )
            user_histories = self._histories_of(user_ids.select("user_idx"))
        lists = self.model.recommend(self._queries(user_histories, mode), k)
        return (
            lists.join(user_ids.select("user_id", "user_idx"), on="user_idx", how="inner")
            .join(self._items, on="item_idx", how="inner")
            .select(self._original_id("user"), self._original_id("item"), "rank", "score")
        )

    def neighbours(self, k: int = 10) -> DataFrame:
        """Return `item, rank, neighbour, score`: the items that a user would get who acted on
        `item` alone. Lazy.

        Raises ModelError if the algorithm has no neighbours (`recspark models` shows the tag
        `neighbours`).
        """
        check_k(k)
        spec = model_spec(self.algorithm)
        if "neighbours" not in spec.tags:
            raise ModelError(f"{self.algorithm} gives no neighbours of items")
        neighbour_ids = self._items.select(
            F.col("item_idx").alias("neighbour_idx"), F.col("item_id").alias("neighbour_id")
        )
        neighbour = F.col("neighbour_id").cast(self._types["item"]).alias("neighbour")
        return (
            self.model.neighbours(k)
            .join(self._items, on="item_idx", how="inner")
            .join(neighbour_ids, on="neighbour_idx", how="inner")
            .select(self._original_id("item"), "rank", neighbour, "score")
        )

    def explain(self, lists: DataFrame, n: int = 3) -> DataFrame:
        """Return `user, item, reason, share`: the user's own items that speak most for each item.

        Parameters
        ----------
        lists : columns `user`, `item`, such as `recommend` returns them
        n : reasons of an item, at most; each is a row. The shares are those of column `because`
            (docs/tables.md)

        An item that nothing of the user speaks for has no row. Lazy, but for one small job that
        brings the ids of the items to the driver. Raises ModelError if the scores of the algorithm
        are not sums over the user's items (`recspark models` shows the tag `reasons`).
        """
        check_k(n)
        voice = Voice.of(self.model)
        if voice is None:
            raise ModelError(f"{self.algorithm} cannot say which items speak for another")
        _check_columns(lists, {"user": _ID_TYPES, "item": _ID_TYPES})
        pairs = (
            lists.select(
                F.trim(F.col("user").cast("string")).alias("user_id"),
                F.trim(F.col("item").cast("string")).alias("item_id"),
            )
            .join(self._users, on="user_id", how="inner")
            .join(self._items, on="item_id", how="inner")
            .select("user_idx", "user_id", "item_idx", "item_id", F.lit(_MODEL).alias("model"))
        )
        queries = self._queries(self.data.histories, "repeat").withColumnsRenamed(
            {"features": f"features_{_MODEL}"}
        )
        names = self._items.select(
            "item_idx", "item_id", F.lit(None).cast("string").alias("item_name")
        )
        explained = with_reasons(
            pairs,
            queries.drop("seen"),
            {_MODEL: voice},
            {_MODEL: ((_MODEL,),)},
            names.toArrow().sort_by("item_idx").combine_chunks(),
            n,
        )
        reason = F.col("reason.item_id").cast(self._types["item"]).alias("reason")
        return explained.select("*", F.explode("because").alias("reason")).select(
            self._original_id("user"), self._original_id("item"), reason, "reason.share"
        )

    def evaluate(
        self, truth: DataFrame, ks: Sequence[int] = (10, 20), mode: Mode = "novel"
    ) -> dict[str, float]:
        """Return `ndcg@10` and the other metrics of docs/metrics.md, over all users of `truth`.

        Parameters
        ----------
        truth : columns `user`, `item`: what the users acted on after the cutoff
        ks : lengths of the lists that are evaluated
        mode : in `novel`, items that a user acted on before the cutoff are left out

        A user without a list counts as 0. An item without events is left out;
        `n_cold_items_in_truth` counts these items.
        """
        _check_columns(truth, {"user": _ID_TYPES, "item": _ID_TYPES})
        pairs = truth.select(
            F.trim(F.col("user").cast("string")).alias("user_id"),
            F.trim(F.col("item").cast("string")).alias("item_id"),
        ).distinct()
        users = _extended_dictionary(self._users, pairs, "user_id", "user_idx")
        items = _extended_dictionary(self._items, pairs, "item_id", "item_idx")
        truths = (
            pairs.join(users, on="user_id", how="inner")
            .join(items, on="item_id", how="inner")
            .groupBy("user_idx")
            .agg(F.array_sort(F.collect_list("item_idx")).alias("items"))
        )
        histories_and_activity = self.data.histories.select("user_idx", "seen").join(
            self.data.user_features.select("user_idx", "activity"), on="user_idx", how="inner"
        )
        population = scoring.population(truths, histories_and_activity)
        truth_histories = self._histories_of(truths.select("user_idx"))
        lists = self.model.recommend(self._queries(truth_histories, mode), max(ks)).select(
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
        """Release the memory that Spark holds for this model. It cannot be used afterwards."""
        for frame in self._persisted_frames:
            frame.unpersist()

    def _queries(self, user_histories: DataFrame, mode: str) -> DataFrame:
        """Return the queries of `user_histories`, with user features if the model reads them."""
        query_rows = queries(user_histories, mode)
        return with_features(query_rows, self.data.user_features, self.model.user_encoding)

    def _histories_of(self, users: DataFrame) -> DataFrame:
        """Return `user_idx, history, seen` of `users`. Both lists of a cold user are empty."""
        return users.join(self.data.histories, on="user_idx", how="left").select(
            "user_idx",
            F.coalesce("history", F.array().cast(schema.HISTORY)).alias("history"),
            F.coalesce("seen", F.array().cast(schema.ITEM_IDXS)).alias("seen"),
        )

    def _requested_users(self, users: DataFrame | Iterable[Any]) -> DataFrame:
        """Return the column `user_id` of the requested `users`, each user once."""
        if not isinstance(users, DataFrame):
            user_schema = StructType([StructField("user", self._types["user"])])
            rows = [(user,) for user in users]
            users = self._users.sparkSession.createDataFrame(rows, user_schema)
        _check_columns(users, {"user": _ID_TYPES})
        return users.select(F.trim(F.col("user").cast("string")).alias("user_id")).distinct()

    def _original_id(self, name: str) -> Any:
        """Return the column `user` or `item`, with the type that the ids had in the events."""
        return F.col(f"{name}_id").cast(self._types[name]).alias(name)


_DESCRIPTION_TYPES = {
    "item_name": "string",
    "category": "array<string>",
    "price": "double",
    "text": "string",
}


def _check_columns(
    frame: DataFrame, allowed_types: Mapping[str, tuple[type[DataType], ...]]
) -> dict[str, DataType]:
    """Return the types of the columns of `allowed_types`. Raises SchemaError, which names all
    columns that are missing or have another type.
    """
    types = {f.name: f.dataType for f in frame.schema.fields}
    problems = [
        f"{name} is {types[name].simpleString() if name in types else 'missing'}, expected "
        + " or ".join(dict.fromkeys(allowed_type().simpleString() for allowed_type in allowed))
        for name, allowed in allowed_types.items()
        if not isinstance(types.get(name), allowed)
    ]
    if problems:
        raise SchemaError(f"{'; '.join(problems)}; there are {sorted(types)}")
    return {name: types[name] for name in allowed_types}


def _check_rows(events: DataFrame) -> datetime:
    """Return the time of the newest event. One job.

    Raises SchemaError if a row has no user, item, time or weight, or a weight that is NaN or above
    1e30 in absolute value. Raises EmptyDataError if there is no row.
    """
    counts_of_invalid = {
        name: F.count_if(F.col(name).isNull()) for name in ("user", "item", "time")
    }
    if "weight" in events.columns:
        weight = F.col("weight").cast("double")
        counts_of_invalid["weight"] = F.count_if(
            weight.isNull() | F.isnan(weight) | (F.abs(weight) > 1e30)
        )
    newest = F.unix_micros(F.max("time")).alias("newest")
    row = events.agg(
        newest, *[column.alias(name) for name, column in counts_of_invalid.items()]
    ).collect()[0]
    problems = [f"{row[name]:,} rows have no {name}" for name in counts_of_invalid if row[name]]
    if problems:
        raise SchemaError(f"events: {', '.join(problems)} that can be read; leave those rows out")
    if row["newest"] is None:
        raise EmptyDataError("events: there is no row")
    return datetime.fromtimestamp(row["newest"] / 1e6, UTC)


def _to_event_schema(events: DataFrame) -> DataFrame:
    """Return `events` with the columns of the event schema that models read."""
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
    # Numbers the ids of `events`: returns `id_column, idx_column`, persisted.
    sql_type = "int" if idx_column == "item_idx" else "bigint"
    spark = events.sparkSession
    empty_dictionary = spark.createDataFrame([], f"{id_column} string, {idx_column} {sql_type}")
    ids = new_ids(events.select(id_column), empty_dictionary, id_column, idx_column, _ANY_DAY)
    return ids.drop("run_date").persist(StorageLevel.MEMORY_AND_DISK)


def _extended_dictionary(
    dictionary: DataFrame, pairs: DataFrame, id_column: str, idx_column: str
) -> DataFrame:
    """Return `dictionary` and, behind its rows, the ids of `pairs` that it lacks."""
    new = new_ids(pairs.select(id_column), dictionary, id_column, idx_column, _ANY_DAY)
    return dictionary.select(id_column, idx_column).unionByName(new.select(id_column, idx_column))


def _user_histories(events: DataFrame, users: DataFrame, items: DataFrame) -> DataFrame:
    """Return `user_idx, history`; a history has its newest act last."""
    settings = Sessions()  # type: ignore[call-arg]
    labelled = sessions.with_session_id(events, settings).withColumns(
        {"changed_at": F.timestamp_micros(F.lit(-(2**62))), "is_act": F.lit(True)}
    )
    rows = histories.suffixes(labelled, users, items, _FEATURES)
    return rows.select("user_idx", F.col("suffix").alias("history"))


def _training_set(
    table: str, user_histories: DataFrame, cutoff: datetime, scratch_uri: str, ranks: int
) -> TrainingSet:
    """Write the training set `table`, which a network reads, to a folder below `scratch_uri`."""
    if table not in training_rows.TRAINING_TABLES:
        missing_data = (
            "the words of items" if table == training_texts.TABLE else "what was shown to users"
        )
        raise ModelError(f"this model learns from {missing_data}, which events alone do not have")
    n_files = training_rows.n_training_files(ranks)
    rows = training_rows.TRAINING_TABLES[table](user_histories, cutoff, _FEATURES, n_files)
    folder = storage.join(scratch_uri, table)
    rows.drop("cutoff").write.parquet(folder)
    spark: SparkSession = user_histories.sparkSession
    return TrainingSet.of_files(table, 0, spark.read.parquet(folder).inputFiles())


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
