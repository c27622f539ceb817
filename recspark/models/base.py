"""The contract of every model: settings only (`Algorithm`), or fitted, of one of three kinds.

A retriever answers from the whole catalogue, a ranker scores pairs of a user and an item that it is
given, an encoder turns what is known of an item into a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import ValidationError
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config import Section, Train
from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.data.encoded import Encoding, parse_encoded
from recspark.errors import ConfigError, ModelError
from recspark.layers import explain_settings
from recspark.models.kinds import Kind
from recspark.models.scoring import topk
from recspark.train.curve import Curve


class Settings(Section):
    """Base of a model's hyper-parameters: frozen, unknown key = error, numbers are finite.

    A field that `recspark tune` may search carries its range in
    `json_schema_extra={"tune": {...}}`: `{"low": 1, "high": 1000, "log": True}` or
    `{"choices": [...]}`; with `"unless": {field: value}` only where another field has another value.
    """


@dataclass(frozen=True)
class FitOptions:
    """What the machine decides about a fit; never a setting of the model."""

    train: Train = field(default_factory=Train)  # type: ignore[arg-type]
    scratch: str = ""  # URI of a folder that this fit may use (checkpoints); "" = none
    in_process: bool = False  # ranks run inside this process: for tests of a model's contract
    progress: Callable[[str], None] = lambda _text: None  # told of each epoch, for a person to see
    record: Callable[[Curve], None] = lambda _curve: None  # given the curve of a neural training

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return self.train.seed


S = TypeVar("S", bound=Settings)


class FittedModel(ABC):
    """A fitted model of any kind.

    Parameters
    ----------
    settings : as fitted
    cutoff : of the data it was fitted on
    """

    kind: ClassVar[Kind]

    def __init__(self, settings: Settings, cutoff: datetime) -> None:
        self.settings = settings
        self.cutoff = cutoff

    @property
    def user_encoding(self) -> Encoding | None:
        """How the user features that the model reads are encoded; None = it reads none.

        Where there is one, queries carry a column `features` (`encoded.with_features`).
        """
        return None

    @property
    def rates(self) -> bool:
        """Whether scores are ratings: estimates of the weight that the user's event would have."""
        return False

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Return the arrays that make up the model, by name."""

    def saved_arrays(self) -> dict[str, Array]:
        """Return all that is saved of the model but its settings and cutoff."""
        return self.arrays()

    @classmethod
    @abstractmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """Return the model that `saved_arrays()` was taken from."""


# Name -> the fitted model, of those that a model is built on: `needs` in conf/models/NAME.yaml.
Needed = Mapping[str, FittedModel]
NOTHING: Needed = MappingProxyType({})


class Algorithm(ABC, Generic[S]):
    """A model that is not fitted: settings and nothing else. `fit` changes nothing in it."""

    settings_class: ClassVar[type[Settings]]
    # Of a class that has no registry line, since it comes from another package: see `ModelSpec`.
    model_class: ClassVar[type[FittedModel]]
    tags: ClassVar[frozenset[str]] = frozenset({"personal"})
    # False where `fit` reads nothing: an encoder's vectors then stay from night to night.
    learns: ClassVar[bool] = True

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the model with `values` over its defaults; ConfigError names what is wrong."""
        try:
            return cls(cls.settings_class(**values))  # type: ignore[arg-type]
        except ValidationError as error:
            raise explain_settings(error, cls.settings_class, f"conf of {cls.__name__}") from None

    @property
    def training_tables(self) -> tuple[str, ...]:
        """The tables whose training sets `fit` reads from `data.training`, as the settings say."""
        return ()

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """Raise ConfigError where the models that this one is given do not suit it.

        `kinds` : name to kind of each model of `needs`, in that order. By default there may be none.
        """
        if kinds:
            raise ConfigError(
                f"{type(self).__name__} is built on no other model: needs = {[*kinds]}"
            )

    @abstractmethod
    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> FittedModel:
        """Return the fitted model. Runs Spark jobs; leaves nothing persisted behind.

        `needed` : what `check_needs` was told of, each fitted on the data of the same cutoff.
        """


class RetrieverModel(FittedModel):
    """A fitted model that answers from the whole catalogue.

    Parameters
    ----------
    settings : as fitted
    cutoff : of the data it was fitted on; ages are measured to it
    items : item_idx int32 (n_items,), ascending: the local vocabulary; local index = position
    """

    kind = "retriever"

    def __init__(self, settings: Settings, cutoff: datetime, items: Array) -> None:
        super().__init__(settings, cutoff)
        self.items = items

    @abstractmethod
    def scorer(self) -> topk.Scorer | topk.ListScorer:
        """Return what turns a block of queries into scores of all items; runs in executors."""

    @classmethod
    @abstractmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """Return the model that `arrays()` was taken from."""

    def saved_arrays(self) -> dict[str, Array]:
        """See `FittedModel`: `items` beside the others."""
        return {"items": self.items, **self.arrays()}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        others = {name: array for name, array in arrays.items() if name != "items"}
        return cls.from_arrays(settings, cutoff, arrays["items"], others)

    def recommend(self, queries: DataFrame, k: int, allowed: Array | None = None) -> DataFrame:
        """Return the k best items of each query: `user_idx, item_idx, rank, score`.

        Ranks start at 1 without gaps; scores do not increase; ties by the smaller item_idx; nothing
        from `seen`. A user for whom the model knows nothing gets no row. `allowed` : item_idx of the
        items that may be listed, whoever asks; None = all. Lazy: no Spark job starts. Raises
        ModelError on a wrong schema or k < 1.
        """
        check_k(k)
        asked = self._checked(queries)
        return topk.recommend(asked, self.items, self.scorer(), k, allowed)

    def score(self, pairs: DataFrame) -> DataFrame:
        """Return `user_idx, item_idx, score` of given items: a row for each item of each query.

        `pairs` : queries, and `items array<int>`: the items to score for that user; `seen` masks
        nothing. The score is null where the model does not know the user or the item, or would never
        list it. Lazy and narrow; cost follows the pairs, never the catalogue. Raises ModelError on a
        wrong schema.
        """
        asked = self._checked(pairs, ("items", schema.ITEM_IDXS.simpleString()))
        return topk.score_pairs(asked, self.items, self.scorer())

    def _checked(self, queries: DataFrame, *more: tuple[str, str]) -> DataFrame:
        """Return the columns that the kernel reads; ModelError names all that are wrong."""
        want = {f.name: f.dataType.simpleString() for f in schema.QUERIES.fields}
        if self.user_encoding is not None:
            want["features"] = schema.ENCODED.simpleString()
        return check_columns(queries, {**want, **dict(more)}, "queries")

    def neighbours(self, k: int) -> DataFrame:
        """Return `item_idx, rank, neighbour_idx, score`: what acting on only that item would bring.

        For models tagged `neighbours`. The item itself is left out; an item that the model knows
        nothing about has no row. Lazy: no Spark job starts. Raises ModelError on k < 1.
        """
        check_k(k)
        spark = SparkSession.active()
        return topk.neighbours(spark, self.items, self.scorer(), micros(self.cutoff), k)


class ArraysModel(RetrieverModel):
    """A retriever that keeps its arrays as they are saved, in `_arrays` by name."""

    def __init__(
        self, settings: Any, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> None:
        super().__init__(settings, cutoff, items)
        self._arrays = arrays

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return self._arrays

    def shared_arrays(self) -> dict[str, topk.Shared]:
        """Return the arrays as a scorer takes them to the executors."""
        return {name: topk.Shared(array) for name, array in self._arrays.items()}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        return cls(settings, cutoff, items, arrays)


@dataclass(frozen=True)
class PairBlock:
    """A batch of pairs with their features.

    `user_idx` int64 and `item_idx` int32 (p,); `numbers` float32 (p, n_numbers), NaN = missing;
    `fields` int32 (p, n_fields), codes of `Encoding`.
    """

    user_idx: Array
    item_idx: Array
    numbers: Array
    fields: Array


class PairScorer(Protocol):
    """Scores pairs; shipped to executors, so it pickles."""

    def score(self, block: PairBlock) -> Array:
        """Return float32 (p,); the score of a pair depends on that pair alone."""


class RankerModel(FittedModel):
    """A fitted model that scores given pairs of a user and an item by their features.

    Parameters
    ----------
    settings, cutoff : as fitted
    encoding : of the examples that it learned from; pairs are encoded by the same
    """

    kind = "ranker"

    def __init__(self, settings: Settings, cutoff: datetime, encoding: Encoding) -> None:
        super().__init__(settings, cutoff)
        self.encoding = encoding

    @abstractmethod
    def pair_scorer(self) -> PairScorer:
        """Return what scores a block of pairs; runs in executors."""

    @classmethod
    @abstractmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> Self:
        """Return the model that `arrays()` was taken from."""

    def saved_arrays(self) -> dict[str, Array]:
        """See `FittedModel`: the names and vocabularies of the encoding beside the others."""
        return {**self.encoding.to_arrays(), **self.arrays()}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        encoding, others = Encoding.of_arrays(arrays)
        return cls.from_arrays(settings, cutoff, encoding, others)

    def score(self, pairs: DataFrame) -> DataFrame:
        """Return `user_idx, item_idx, score` (`schema.SCORED`), a row for each of `pairs`.

        `pairs` : `schema.PAIRS`, encoded by `encoding`. Lazy and narrow. Raises ModelError on a wrong
        schema, and, when it is written, where a score is NaN or infinite.
        """
        want = {f.name: f.dataType.simpleString() for f in schema.PAIRS.fields}
        asked = check_columns(pairs, want, "pairs")
        shared = asked.sparkSession.sparkContext.broadcast((self.encoding, self.pair_scorer()))
        name = type(self).__name__

        def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            encoding, scorer = shared.value
            for batch in batches:
                user, item = batch.column("user_idx"), batch.column("item_idx")
                numbers, fields = parse_encoded(batch, encoding)
                block = PairBlock(user.to_numpy(), item.to_numpy(), numbers, fields)
                score = scorer.score(block)
                if not np.isfinite(score).all():
                    raise ModelError(f"{name}: a score is NaN or infinite")
                yield pa.RecordBatch.from_arrays(
                    [user, item, pa.array(score, pa.float32())], names=schema.SCORED.names
                )

        return asked.mapInArrow(run, schema.SCORED)


class Coder(Protocol):
    """Turns items into vectors; shipped to executors, so it pickles."""

    def encode(self, batch: pa.RecordBatch) -> Array:
        """Return float32 (n, size) of a batch of `schema.CONTENT`; a row of NaN = no vector."""


class EncoderModel(FittedModel):
    """A fitted model that turns what is known of an item, not who acted on it, into a vector."""

    kind = "encoder"

    @abstractmethod
    def coder(self) -> Coder:
        """Return what encodes a batch of items; runs in executors."""

    def encode(self, items: DataFrame) -> DataFrame:
        """Return `item_idx, vector` (`schema.VECTORS`) of each item that has one.

        `items` : `schema.CONTENT`. A vector depends on its item alone. Lazy and narrow. Raises
        ModelError on a wrong schema.
        """
        want = {f.name: f.dataType.simpleString() for f in schema.CONTENT.fields}
        asked = check_columns(items, want, "items")
        shared = asked.sparkSession.sparkContext.broadcast(self.coder())

        def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            coder = shared.value
            for batch in batches:
                vectors = coder.encode(batch)
                kept = np.isfinite(vectors).all(axis=1)
                start = np.arange(kept.sum() + 1, dtype=np.int32) * vectors.shape[1]
                values = pa.array(vectors[kept].ravel(), pa.float32())
                yield pa.RecordBatch.from_arrays(
                    [
                        batch.column("item_idx").filter(pa.array(kept)),
                        pa.ListArray.from_arrays(pa.array(start), values),
                    ],
                    names=schema.VECTORS.names,
                )

        return asked.mapInArrow(run, schema.VECTORS)


def check_columns(frame: DataFrame, want: Mapping[str, str], what: str) -> DataFrame:
    """Return the columns `want` (name to type) of `frame`; ModelError names all that are wrong."""
    have = {f.name: f.dataType.simpleString() for f in frame.schema.fields}
    wrong = [
        f"{name} is {have.get(name, 'missing')}, expected {kind}"
        for name, kind in want.items()
        if have.get(name) != kind
    ]
    if wrong:
        raise ModelError(f"{what}: {'; '.join(wrong)}; there are {sorted(have)}")
    return frame.select(*want)


def check_k(k: int) -> None:
    """Raise ModelError on k < 1."""
    if k < 1:
        raise ModelError(f"k = {k}: ask for at least one item")
