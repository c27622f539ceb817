"""The contract of every model.

A model that is not fitted is an `Algorithm`: it has settings and nothing else. `Algorithm.fit`
returns a `FittedModel`, of one of three kinds. A retriever (`RetrieverModel`) recommends items from
the whole catalogue. A ranker (`RankerModel`) scores pairs of a user and an item. An encoder
(`EncoderModel`) turns the content of an item into a vector.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from recspark import schema
from recspark.config import Section, Train
from recspark.config.load import explain_settings
from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.data.feature_encoding import Encoding, parse_encoded
from recspark.errors import ConfigError, ModelError
from recspark.models.kinds import Kind
from recspark.models.scoring import topk
from recspark.train.curve import Curve


class Settings(Section):
    """Base class of a model's hyper-parameters.

    Settings are frozen. An unknown key and a number that is not finite are errors.

    A field that `recspark tune` may search carries its range in
    `json_schema_extra={"tune": {...}}`: `{"low": 1, "high": 1000, "log": True}` or
    `{"choices": [...]}`. With `"unless": {field: value}` in it, the field is not searched while
    that other field has that value.
    """


@dataclass(frozen=True)
class FitOptions:
    """What a fit needs to know about the machine and the run; never a setting of the model."""

    train: Train = field(default_factory=Train)  # type: ignore[arg-type]
    scratch: str = ""  # URI of a folder that this fit may use (checkpoints); "" = none
    in_process: bool = False  # True: ranks run inside this process (tests of a model's contract)
    # The same model of an earlier night, for an algorithm with `carried_days`; None = there is none
    previous: FittedModel | None = None
    # Called with a line of text after each epoch, for a person to read.
    progress: Callable[[str], None] = lambda _text: None
    # Called with the training curve of a neural model.
    record: Callable[[Curve], None] = lambda _curve: None

    @property
    def seed(self) -> int:
        """The seed of all random numbers of the fit."""
        return self.train.seed

    @contextmanager
    def scratch_folder(self) -> Iterator[str]:
        """Give `scratch`; without one, a local folder that is removed at the end."""
        if self.scratch:
            yield self.scratch
            return
        with tempfile.TemporaryDirectory(prefix="recspark-fit-") as folder:
            yield folder


S = TypeVar("S", bound=Settings)


class FittedModel(ABC):
    """A fitted model of any kind.

    Parameters
    ----------
    settings : the settings that the model was fitted with
    cutoff : the cutoff of the data that it was fitted on
    """

    kind: ClassVar[Kind]

    def __init__(self, settings: Settings, cutoff: datetime) -> None:
        self.settings = settings
        self.cutoff = cutoff

    @property
    def user_encoding(self) -> Encoding | None:
        """The encoding of the user features that the model reads; None = it reads no features.

        A model with an encoding needs queries with a column `features` (`feature_encoding.with_features`).
        """
        return None

    @property
    def rates(self) -> bool:
        """Whether scores are ratings: estimates of the weight of the user's event on the item."""
        return False

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Return the arrays that the model consists of, by name."""

    def saved_arrays(self) -> dict[str, Array]:
        """Return all arrays that are saved; settings and cutoff are saved beside them."""
        return self.arrays()

    @classmethod
    @abstractmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """Return the model whose `saved_arrays()` are `arrays`."""


# Name -> fitted model: the models that another model is built on (`needs` in
# conf/models/NAME.yaml).
Needed = Mapping[str, FittedModel]
NOTHING: Needed = MappingProxyType({})


class Algorithm(ABC, Generic[S]):
    """A model that is not fitted: it has settings and nothing else. `fit` does not change it."""

    settings_class: ClassVar[type[Settings]]
    # The fitted class. Only an algorithm from another package sets it: such an algorithm has no
    # registry line (`ModelSpec`) that names the fitted class.
    model_class: ClassVar[type[FittedModel]]
    tags: ClassVar[frozenset[str]] = frozenset({"personal"})
    # False if `fit` reads no data. The vectors of such an encoder are kept from night to night, and
    # such a ranker has no examples.
    learns: ClassVar[bool] = True

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the algorithm with `values` in place of the defaults.

        Raises ConfigError, which names the wrong settings.
        """
        try:
            return cls(cls.settings_class(**values))  # type: ignore[arg-type]
        except ValidationError as error:
            raise explain_settings(error, cls.settings_class, f"conf of {cls.__name__}") from None

    @property
    def training_tables(self) -> tuple[str, ...]:
        """The tables whose training sets `fit` reads from `data.training` with these settings."""
        return ()

    @property
    def keeps_vectors(self) -> bool:
        """Whether vectors of earlier nights stay valid; only asked of encoders.

        That is so where nothing decides the vector of an item but its content, these settings and the
        code. Else all items are encoded again when the encoder is fitted anew.
        """
        return not self.learns

    @property
    def needs_examples(self) -> bool:
        """Whether `fit` reads `data.examples` with these settings; only asked of rankers.

        Where it does not, the night makes no examples for the ranker. The plan follows from the
        settings alone, so a ranker whose registry line does not say it must say `learns: false`.
        """
        return self.learns

    @property
    def carried_days(self) -> int:
        """How many days old the model of an earlier night may be that `fit` goes on from, 0 = none.

        Where a night finds such a model, made by the same recipe, `FitOptions.previous` is that.
        """
        return 0

    @property
    def refit_days(self) -> int:
        """For how many days in a row an encoder is used before it is fitted anew; 1 = fitted every
        night. It is the setting of this name, where the encoder has one. Only asked of encoders.
        """
        return int(getattr(self.settings, "refit_days", 1))

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """Raise ConfigError if this model cannot be built on the models of its `needs`.

        `kinds` : the kind of each model of `needs`, by name and in the order of `needs`. By default
        any model is an error.
        """
        if kinds:
            raise ConfigError(
                f"{type(self).__name__} is built on no other model: needs = {[*kinds]}"
            )

    @abstractmethod
    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> FittedModel:
        """Return the fitted model. Runs Spark jobs; no DataFrame or RDD stays persisted.

        `needed` : the models of `needs`, in the order that `check_needs` was called with. Each of
        them is fitted on data of the same cutoff.
        """


class RetrieverModel(FittedModel):
    """A fitted model that recommends items from the whole catalogue.

    Parameters
    ----------
    settings : the settings that the model was fitted with
    cutoff : the cutoff of the data that it was fitted on; the age of an event is its time before
        the cutoff
    items : int32 (n_items,), ascending: the item_idx of each item of the vocabulary. The position
        of an item in this array is its local index.
    """

    kind = "retriever"

    def __init__(self, settings: Settings, cutoff: datetime, items: Array) -> None:
        super().__init__(settings, cutoff)
        self.items = items

    @abstractmethod
    def scorer(self) -> topk.Scorer | topk.ListScorer:
        """Return the object that scores all items for a block of queries; it runs in executors."""

    @classmethod
    @abstractmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """Return the model whose `arrays()` are `arrays`."""

    def saved_arrays(self) -> dict[str, Array]:
        """See `FittedModel`. These are `arrays()` and `items`."""
        return {"items": self.items, **self.arrays()}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        model_arrays = {name: array for name, array in arrays.items() if name != "items"}
        return cls.from_arrays(settings, cutoff, arrays["items"], model_arrays)

    def recommend(self, queries: DataFrame, k: int, allowed: Array | None = None) -> DataFrame:
        """Return the k best items of each query: `user_idx, item_idx, rank, score`.

        The items in the column `seen` of a query are not recommended to that user. Ranks start at 1
        and have no gaps. Scores do not increase with the rank; of items with equal scores, the one
        with the smaller item_idx comes first. A user about whom the model knows nothing gets no
        row.

        `allowed` : the item_idx of the items that may be recommended, to any user; None = all
        items.

        Lazy: no Spark job starts. Raises ModelError on a wrong schema or k < 1.
        """
        check_k(k)
        checked_queries = self._checked(queries)
        return topk.recommend(checked_queries, self.items, self.scorer(), k, allowed)

    def score(self, pairs: DataFrame) -> DataFrame:
        """Return `user_idx, item_idx, score`, with a row for each item in each row of `pairs`.

        `pairs` : queries with one more column, `items array<int>`: the items to score for the user.
        The column `seen` has no effect: seen items are scored too. The score is null if the model
        does not know the user or the item, or if it would never recommend the item to the user.

        Lazy and narrow. The cost grows with the number of pairs, not with the size of the
        catalogue. Raises ModelError on a wrong schema.
        """
        checked_pairs = self._checked(pairs, ("items", schema.ITEM_IDXS.simpleString()))
        return topk.score_pairs(checked_pairs, self.items, self.scorer())

    def _checked(self, queries: DataFrame, *more: tuple[str, str]) -> DataFrame:
        """Return the columns of `queries` that the kernel reads.

        They are the columns of `schema.QUERIES`, `features` if the model reads user features, and
        `more` columns, each as (name, type). Raises ModelError, which names all wrong columns.
        """
        expected_types = {f.name: f.dataType.simpleString() for f in schema.QUERIES.fields}
        if self.user_encoding is not None:
            expected_types["features"] = schema.ENCODED.simpleString()
        return check_columns(queries, {**expected_types, **dict(more)}, "queries")

    def item_vectors(self) -> Array | None:
        """Return the vector of each of `items`, float32 (n_items, size).

        None = the model has none. Models built on this one, rules and features compare items by
        them.
        """
        return None

    def user_states(self) -> DataFrame | None:
        """Return what the model keeps of each user, `schema.USER_STATES` without cutoff and model.

        None = nothing, as with most models: a user is folded in from the history. Lazy and narrow.
        """
        return None

    def neighbours(self, k: int, allowed: Array | None = None) -> DataFrame:
        """Return the k nearest neighbours of each item: `item_idx, rank, neighbour_idx, score`.

        The neighbours of an item are what the model would recommend to a user whose history is one
        event on that item, at the cutoff. For models with the tag `neighbours`. An item is not its
        own neighbour. An item about which the model knows nothing has no row. Lazy: no Spark job
        starts. Raises ModelError on k < 1.

        `allowed` : the item_idx of the items that may be a neighbour; None = all items.
        """
        check_k(k)
        spark = SparkSession.active()
        return topk.neighbours(spark, self.items, self.scorer(), micros(self.cutoff), k, allowed)


class ArraysModel(RetrieverModel):
    """A retriever that holds its arrays just as they are saved: by name, in `_arrays`."""

    # The array that holds a vector for each item; None = the model has no vectors of items
    vectors_array: ClassVar[str | None] = None

    def __init__(
        self, settings: Any, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> None:
        super().__init__(settings, cutoff, items)
        self._arrays = arrays

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return self._arrays

    def item_vectors(self) -> Array | None:
        """See `RetrieverModel`."""
        return None if self.vectors_array is None else self._arrays[self.vectors_array]

    def shared_arrays(self) -> dict[str, topk.Shared]:
        """Return the arrays in the form in which a scorer takes them to the executors."""
        return {name: topk.Shared(array) for name, array in self._arrays.items()}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        return cls(settings, cutoff, items, arrays)


@dataclass(frozen=True)
class PairBlock:
    """A batch of p pairs of a user and an item, with the features of each pair.

    `user_idx` int64 (p,) and `item_idx` int32 (p,); `numbers` float32 (p, n_numbers), where NaN
    means missing; `fields` int32 (p, n_fields), codes of `Encoding`.
    """

    user_idx: Array
    item_idx: Array
    numbers: Array
    fields: Array


class PairScorer(Protocol):
    """Scores pairs. It is sent to the executors, so it can be pickled."""

    def score(self, block: PairBlock) -> Array:
        """Return the score of each pair, float32 (p,). It depends on no other pair of the block."""


class ExplainedScorer(Protocol):
    """A `PairScorer` that can say what each feature of a pair adds to the score of the pair."""

    def feature_contributions(self, block: PairBlock) -> Array:
        """Return what each feature adds, float32 (p, n_numbers + n_fields + 1).

        The columns of `numbers` come first, then those of `fields`. The last column is the same for
        all pairs: what no feature adds. A row adds up to the score, but for rounding.
        """


def explained(scorer: PairScorer) -> ExplainedScorer | None:
    """Return `scorer` if it can say what each feature adds to a score, else None."""
    explained_scorer: Any = scorer
    return explained_scorer if hasattr(scorer, "feature_contributions") else None


class RankerModel(FittedModel):
    """A fitted model that scores pairs of a user and an item by their features.

    Parameters
    ----------
    settings, cutoff : the settings and the cutoff that the model was fitted with
    encoding : the features that the model reads; the pairs to be scored are encoded by it. Usually
        the encoding of the examples that the model was fitted on. A model that reads only some
        features has an encoding with only these, which is cheaper (`pipeline.pairs`)
    """

    kind = "ranker"

    def __init__(self, settings: Settings, cutoff: datetime, encoding: Encoding) -> None:
        super().__init__(settings, cutoff)
        self.encoding = encoding

    @abstractmethod
    def pair_scorer(self) -> PairScorer:
        """Return the object that scores a block of pairs; it runs in executors."""

    @classmethod
    @abstractmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> Self:
        """Return the model whose `arrays()` are `arrays`."""

    def saved_arrays(self) -> dict[str, Array]:
        """See `FittedModel`. These are `arrays()` and the arrays of the encoding."""
        return {**self.encoding.to_arrays(), **self.arrays()}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        encoding, model_arrays = Encoding.of_arrays(arrays)
        return cls.from_arrays(settings, cutoff, encoding, model_arrays)

    def score(self, pairs: DataFrame) -> DataFrame:
        """Return `user_idx, item_idx, score` (`schema.SCORED`), with a row for each row of `pairs`.

        `pairs` : `schema.PAIRS`, encoded by `encoding`. Lazy and narrow. Raises ModelError on a
        wrong schema. A score that is NaN or infinite raises ModelError when Spark computes the
        result.
        """
        expected_types = {f.name: f.dataType.simpleString() for f in schema.PAIRS.fields}
        checked_pairs = check_columns(pairs, expected_types, "pairs")
        shared = checked_pairs.sparkSession.sparkContext.broadcast(
            (self.encoding, self.pair_scorer())
        )
        name = type(self).__name__

        def score_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            encoding, scorer = shared.value
            for batch in batches:
                user_idx, item_idx = batch.column("user_idx"), batch.column("item_idx")
                numbers, fields = parse_encoded(batch, encoding)
                block = PairBlock(user_idx.to_numpy(), item_idx.to_numpy(), numbers, fields)
                score = scorer.score(block)
                if not np.isfinite(score).all():
                    raise ModelError(f"{name}: a score is NaN or infinite")
                yield pa.RecordBatch.from_arrays(
                    [user_idx, item_idx, pa.array(score, pa.float32())], names=schema.SCORED.names
                )

        return checked_pairs.mapInArrow(score_batches, schema.SCORED)


class Coder(Protocol):
    """Turns items into vectors. It is sent to the executors, so it can be pickled."""

    def encode(self, batch: pa.RecordBatch) -> Array:
        """Return the vectors, float32 (n, size), of the n items of a batch of `content_schema`.

        A row of NaN means that the item has no vector.
        """


class ExplainingCoder(Protocol):
    """A `Coder` that can say why an item has no vector."""

    def encode_or_explain(self, batch: pa.RecordBatch) -> tuple[Array, list[str | None]]:
        """Return what `Coder.encode` returns, and for each item why it has no vector.

        The reason is a short text that many items share, so that reasons can be counted. None = the
        item has a vector, or there is nothing to say.
        """


class ArraysRanker(RankerModel):
    """A ranker that holds its arrays just as they are saved: by name, in `_arrays`."""

    def __init__(
        self, settings: Any, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> None:
        super().__init__(settings, cutoff, encoding)
        self._arrays = arrays

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return self._arrays

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> Self:
        """See `RankerModel`."""
        return cls(settings, cutoff, encoding, arrays)


class EncoderModel(FittedModel):
    """A fitted model that turns the content of an item into a vector.

    The content is `schema.CONTENT` (name, category, price, text, media); events play no part.
    """

    kind = "encoder"
    # True if an item takes milliseconds: the items are then spread over all task slots first.
    is_costly: ClassVar[bool] = False

    @property
    def reads_item_ids(self) -> bool:
        """Whether the items to encode need a column `item_id` too (`schema.CONTENT_AND_ID`)."""
        return False

    @property
    def content_schema(self) -> StructType:
        """The columns of the items to encode."""
        return schema.CONTENT_AND_ID if self.reads_item_ids else schema.CONTENT

    @abstractmethod
    def coder(self) -> Coder:
        """Return the object that encodes a batch of items; it runs in executors."""

    def encode(self, items: DataFrame) -> DataFrame:
        """Return `item_idx, vector` (`schema.VECTORS`), with a row for each item that has a vector.

        `items` : `content_schema`. The vector of an item depends on no other item. Lazy and narrow.
        Raises ModelError on a wrong schema.
        """
        coded_items = self.encode_or_explain(items)
        return coded_items.where(F.col("vector").isNotNull()).select(*schema.VECTORS.names)

    def encode_or_explain(self, items: DataFrame) -> DataFrame:
        """Return `item_idx, vector, problem` (`schema.VECTORS_OR_PROBLEMS`), a row for each item.

        A vector is null where the item has none; `problem` then says why, if the encoder says so.
        Otherwise as `encode`. Where `is_costly`, the items are shuffled: into four partitions per
        task slot, because Spark would put a few thousand small rows into one.
        """
        expected_types = {f.name: f.dataType.simpleString() for f in self.content_schema.fields}
        checked_items = check_columns(items, expected_types, "items")
        context = checked_items.sparkSession.sparkContext
        if self.is_costly:
            checked_items = checked_items.repartition(4 * context.defaultParallelism)
        shared = context.broadcast(self.coder())

        def encode_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            coder: Any = shared.value
            for batch in batches:
                problems: list[str | None] = [None] * batch.num_rows
                if hasattr(coder, "encode_or_explain"):
                    vectors, problems = coder.encode_or_explain(batch)
                else:
                    vectors = coder.encode(batch)
                has_vector = np.isfinite(vectors).all(axis=1)
                # The offset of an item without a vector is null: so is then its list.
                ends = np.cumsum(has_vector, dtype=np.int32) * np.int32(vectors.shape[1])
                offsets = pa.array(
                    np.concatenate([np.zeros(1, np.int32), ends]),
                    mask=np.concatenate([~has_vector, np.zeros(1, bool)]),
                )
                values = pa.array(vectors[has_vector].ravel(), pa.float32())
                yield pa.RecordBatch.from_arrays(
                    [
                        batch.column("item_idx"),
                        pa.ListArray.from_arrays(offsets, values),
                        pa.array(problems, pa.string()),
                    ],
                    names=schema.VECTORS_OR_PROBLEMS.names,
                )

        return checked_items.mapInArrow(encode_batches, schema.VECTORS_OR_PROBLEMS)


def check_columns(
    frame: DataFrame, expected_types: Mapping[str, str], frame_name: str
) -> DataFrame:
    """Return those columns of `frame` that `expected_types` (name to type) lists.

    A column that is missing or has another type raises ModelError. The error names all wrong
    columns and begins with `frame_name`.
    """
    actual_types = {f.name: f.dataType.simpleString() for f in frame.schema.fields}
    errors = [
        f"{name} is {actual_types.get(name, 'missing')}, expected {expected_type}"
        for name, expected_type in expected_types.items()
        if actual_types.get(name) != expected_type
    ]
    if errors:
        raise ModelError(f"{frame_name}: {'; '.join(errors)}; there are {sorted(actual_types)}")
    return frame.select(*expected_types)


def check_k(k: int) -> None:
    """Raise ModelError on k < 1."""
    if k < 1:
        raise ModelError(f"k = {k}: ask for at least one item")
