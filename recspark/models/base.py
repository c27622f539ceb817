"""The contract of every model: settings only (`Recommender`), or fitted (`RecommenderModel`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import ValidationError
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config import Section, Train
from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.errors import ModelError
from recspark.layers import explain_settings
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


class Recommender(ABC, Generic[S]):
    """A model that is not fitted: settings and nothing else. `fit` changes nothing in it."""

    settings_class: ClassVar[type[Settings]]
    # Of a class that has no registry line, since it comes from another package: see `ModelSpec`.
    model_class: ClassVar[type[RecommenderModel]]
    tags: ClassVar[frozenset[str]] = frozenset({"personal"})
    training_tables: ClassVar[tuple[str, ...]] = ()

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
    def training_table(self) -> str | None:
        """The table that `data.training` has to be of, as the settings say; None = none."""
        return None

    @abstractmethod
    def fit(self, data: Dataset, options: FitOptions) -> RecommenderModel:
        """Return the fitted model. Runs Spark jobs; leaves nothing persisted behind."""


class RecommenderModel(ABC):
    """A fitted model.

    Parameters
    ----------
    settings : as fitted
    cutoff : of the data it was fitted on; ages are measured to it
    items : item_idx int32 (n_items,), ascending: the local vocabulary; local index = position
    """

    def __init__(self, settings: Settings, cutoff: datetime, items: Array) -> None:
        self.settings = settings
        self.cutoff = cutoff
        self.items = items

    @abstractmethod
    def scorer(self) -> topk.Scorer:
        """Return what turns a block of queries into scores of all items; runs in executors."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Return the arrays that make up the model, by name; `items` is saved beside them."""

    @classmethod
    @abstractmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """Return the model that `arrays()` was taken from."""

    @property
    def rates(self) -> bool:
        """Whether scores are ratings: estimates of the weight that the user's event would have."""
        return False

    def recommend(self, queries: DataFrame, k: int) -> DataFrame:
        """Return the k best items of each query: `user_idx, item_idx, rank, score`.

        Ranks start at 1 without gaps; scores do not increase; ties by the smaller item_idx; nothing
        from `seen`. A user for whom the model knows nothing gets no row. Lazy: no Spark job starts.
        Raises ModelError on a wrong schema or k < 1.
        """
        check_k(k)
        have = {f.name: f.dataType.simpleString() for f in queries.schema.fields}
        want = {f.name: f.dataType.simpleString() for f in schema.QUERIES.fields}
        wrong = [
            f"{name} is {have.get(name, 'missing')}, expected {kind}"
            for name, kind in want.items()
            if have.get(name) != kind
        ]
        if wrong:
            raise ModelError(f"queries: {'; '.join(wrong)}; there are {sorted(have)}")
        return topk.recommend(queries.select(*want), self.items, self.scorer(), k)

    def neighbours(self, k: int) -> DataFrame:
        """Return `item_idx, rank, neighbour_idx, score`: what acting on only that item would bring.

        For models tagged `neighbours`. The item itself is left out; an item that the model knows
        nothing about has no row. Lazy: no Spark job starts. Raises ModelError on k < 1.
        """
        check_k(k)
        spark = SparkSession.active()
        return topk.neighbours(spark, self.items, self.scorer(), micros(self.cutoff), k)


def check_k(k: int) -> None:
    """Raise ModelError on k < 1."""
    if k < 1:
        raise ModelError(f"k = {k}: ask for at least one item")
