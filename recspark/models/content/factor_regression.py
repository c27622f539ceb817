"""Encoders that learn to predict the factors of items from their pictures or sounds.

A factor model (`als`, `mf`) is fitted on the events first. The network then learns, on the items
that have factors, to predict them from content alone, and predicts them for every item with
content, cold ones too. The network is trained by Horovod ranks from files that Petastorm reads.
Source: van den Oord, Dieleman, Schrauwen 2013, "Deep content-based music recommendation", section 4.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.media import Kind, Source
from recspark.data.media_inputs import Reader, write_training_media
from recspark.data.training_rows import n_training_files
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import (
    NOTHING,
    Algorithm,
    EncoderModel,
    FitOptions,
    Needed,
    RetrieverModel,
    Settings,
)
from recspark.models.content.media import MaxFileMb, MediaCoder, MediaFolder, source_of
from recspark.models.kinds import Kind as ModelKind
from recspark.models.neural import Job, NetworkTask, NeuralSettings, net_arrays, train_on_ranks
from recspark.models.scoring import topk
from recspark.models.setting_types import LearningRate, RefitDays, ValidationShare
from recspark.train.comm import Comm
from recspark.train.feed import Batch, split_files
from recspark.train.loop import Trained, load_weights

# Names of two arrays of a saved model, beside those of the network.
CENTRE, SCALE = "factors.centre", "factors.scale"


class FactorRegressionSettings(NeuralSettings):
    """Settings of every encoder that learns to predict item factors."""

    vector: Literal["factors", "features"] = Field(
        "factors",
        description="what an item's vector is: factors = the predicted factors; features = what the "
        "last layer predicts them from",
    )
    folder: MediaFolder = ""
    max_file_mb: MaxFileMb = 50
    max_items: int = Field(
        200_000,
        ge=2,
        description="items to learn from, at most; of more, so many are drawn. Every task that writes "
        "training files holds their factors. Guess",
    )
    epochs: int = Field(30, ge=1, description="passes over the items with factors, at most. Guess")
    batch_size: int = Field(
        64, ge=1, description="items per step, all ranks together; the ranks share them"
    )
    learning_rate: LearningRate = Field(
        2e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Guess",
        json_schema_extra={"tune": {"low": 2e-4, "high": 1e-2, "log": True}},
    )
    weight_decay: float = Field(1e-5, ge=0, description="L2 penalty on all parameters. Guess")
    validation: ValidationShare = Field(
        0.1,
        description="share of the items that is held out for validation: a hash sample. The model "
        "gets the weights of the epoch with the smallest error on them",
    )
    refit_days: RefitDays = 7


S = TypeVar("S", bound=FactorRegressionSettings)


class FactorRegression(Algorithm[S]):
    """Minimise the mean squared error of predicted item factors, over the items that have some.

    Factors are centred, and all are divided by one number, so that their mean square is 1; a
    prediction is brought back. So the dot product of a user's factor and a predicted one is a score
    of the factor model, for items that it has never seen.
    """

    name: str

    @abstractmethod
    def reader(self) -> Reader:
        """Return what reads the files for the network."""

    @abstractmethod
    def fitted(self, cutoff: datetime, arrays: dict[str, Array]) -> FactorRegressionModel:
        """Return the fitted model with these arrays."""

    def check_needs(self, kinds: Mapping[str, ModelKind]) -> None:
        """See `Algorithm`. Exactly one model, a retriever; `fit` checks that it has factors."""
        if [*kinds.values()] != ["retriever"]:
            raise ConfigError(
                f"{self.name} learns to predict the item factors of one model, such as als or mf: "
                f"needs = {[*kinds]}, expected the name of one"
            )

    def fit(
        self, data: Dataset, options: FitOptions, needed: Needed = NOTHING
    ) -> FactorRegressionModel:
        """See `Algorithm.fit`.

        One job reads the files of the items with factors and writes the training files, then the
        ranks train. The driver holds the factors, 4 bytes per number, and the weights. Raises
        ModelError where the model of `needs` has no factors, EmptyDataError where no item with
        factors has a picture (sound) that can be read.
        """
        settings, reader = self.settings, self.reader()
        items, factors = item_factors(self.name, needed)
        if len(items) > settings.max_items:
            rng = np.random.default_rng(options.seed)
            drawn = np.sort(rng.choice(len(items), settings.max_items, replace=False))
            items, factors = items[drawn], factors[drawn]
        if data.catalogue is None:
            raise ModelError(f"{self.name}: this data has no catalogue, and so no media")
        spark = data.histories.sparkSession
        centre, scale = _centre_and_scale(factors)
        targets = ((factors - centre) / scale).astype(np.float32)  # (n_items, K)
        source = source_of(settings.folder, settings.max_file_mb)
        n_files = n_training_files(options.train.ranks)
        with options.scratch_folder() as folder:
            checksum = hashlib.sha256(targets.tobytes()).hexdigest()
            key = digest([items.tolist(), checksum, repr((source, reader)), n_files])
            content = data.catalogue.join(data.items.select("item_idx"), "item_idx", "left_semi")
            training = write_training_media(
                content,
                source,
                reader,
                items,
                targets,
                storage.join(folder, f"media-{key}"),
                n_files,
            )
            options.progress(
                f"  {self.name}: {training.n_rows:,} of {len(items):,} items with factors have a "
                f"readable {reader.kind} to learn from"
            )
            if training.n_rows == 0:
                raise EmptyDataError(
                    f"{self.name}: of {len(items):,} items with factors, none has a readable "
                    f"{reader.kind}. Look at items.media and at the setting folder = "
                    f"'{settings.folder}'; with the encoder colours among the night's models, the "
                    "column problem of item_vectors says what is wrong with each picture"
                )
            training, held_out = split_files(training, settings.validation, options.train.ranks)
            trained = train_on_ranks(
                self.name,
                spark,
                options,
                settings,
                items,
                partial(train_rank, self.fitted(data.cutoff, {}), targets.shape[1]),
                training,
                held_out,
            )
        model = self.fitted(data.cutoff, {CENTRE: centre, SCALE: np.array([scale], np.float32)})
        net = model.make_net(targets.shape[1], options.seed)
        load_weights(net, trained)
        return self.fitted(data.cutoff, {**model.arrays(), **net_arrays(net)})


def item_factors(name: str, needed: Needed) -> tuple[Array, Array]:
    """Return the items, int32 (n_items,), and the factors, float32 (n_items, K), of a factor model.

    It is the only one of `needed`. Raises ModelError where it has no vectors of items.
    """
    [(needed_name, model)] = needed.items()
    factors = model.item_vectors() if isinstance(model, RetrieverModel) else None
    if not isinstance(model, RetrieverModel) or factors is None:
        raise ModelError(
            f"{name} needs a model with item factors, such as als or mf; '{needed_name}' has none"
        )
    return np.asarray(model.items), np.asarray(factors, np.float32)


def _centre_and_scale(factors: Array) -> tuple[Array, float]:
    """Return the mean factor, float32 (K,), and the root mean square of what is left."""
    centre = factors.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.mean((factors - centre) ** 2)))
    return centre.astype(np.float32), scale or 1.0


def train_rank(model: FactorRegressionModel, size: int, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. `size` is the length of a factor."""
    task = NetworkTask(comm, job, (*model.reader().columns, "target"))
    net = model.make_net(size, task.seed)
    return task.train(net, partial(row_loss, model, net))


def row_loss(
    model: FactorRegressionModel,
    net: nn.Module,
    batch: Batch,
    generator: torch.Generator | None,
    done: float,
) -> torch.Tensor:
    """Return the mean squared error of each item's predicted factor, (B,).

    Without a `generator` nothing random changes the inputs.
    """
    predicted = model.predicted(net, batch.tensors, generator)  # (B, K)
    return ((predicted - batch.tensors["target"]) ** 2).mean(dim=1)  # (B,)


class FactorRegressionModel(EncoderModel):
    """A trained network: its parameters and buffers by name, and the factors' centre and scale."""

    is_costly = True

    def __init__(self, settings: Any, cutoff: datetime, arrays: dict[str, Array]) -> None:
        super().__init__(settings, cutoff)
        self._arrays = arrays

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return self._arrays

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        return cls(settings, cutoff, arrays)

    @abstractmethod
    def reader(self) -> Reader:
        """Return what reads the files for the network."""

    @abstractmethod
    def make_net(self, size: int, seed: int) -> nn.Module:
        """Return the network for factors of `size` numbers, with first weights drawn from `seed`."""

    @abstractmethod
    def predicted(
        self, net: nn.Module, inputs: Mapping[str, torch.Tensor], generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return the prediction for each row of the reader's columns, (B, size).

        `generator` : to draw changes of the inputs from, in training; None = no changes.
        """

    @property
    @abstractmethod
    def n_features(self) -> int:
        """The number of inputs of the last layer."""

    @abstractmethod
    def without_last_layer(self, net: nn.Module) -> None:
        """Make `net` return what its last layer reads, (B, n_features)."""

    def coder(self) -> FactorRegressionCoder:
        """See `EncoderModel`."""
        settings: Any = self.settings
        shared = {name: topk.Shared(array) for name, array in self._arrays.items()}
        source = source_of(settings.folder, settings.max_file_mb)
        return FactorRegressionCoder(source, type(self)(settings, self.cutoff, {}), shared)


@dataclass
class FactorRegressionCoder(MediaCoder):
    """Each worker builds the network once; weights of a local artifact are read from its files.

    `model` is the fitted model without its arrays, which are in `arrays_by_name`.
    """

    source: Source
    model: FactorRegressionModel
    arrays_by_name: dict[str, topk.Shared]

    @property
    def kind(self) -> Kind:
        """See `MediaCoder`."""
        return self.model.reader().kind

    @property
    def size(self) -> int:
        """See `MediaCoder`."""
        return self.model.n_features if self._gives_features else len(self._array(CENTRE))

    @property
    def _gives_features(self) -> bool:
        settings: Any = self.model.settings
        return bool(settings.vector == "features")

    @cached_property
    def _net(self) -> nn.Module:
        torch.set_num_threads(1)  # a Spark task has one core
        net = self.model.make_net(len(self._array(CENTRE)), 0)
        tensors = {
            name: torch.from_numpy(np.array(shared.array))
            for name, shared in self.arrays_by_name.items()
            if name not in (CENTRE, SCALE)
        }
        net.load_state_dict(tensors, strict=True)
        if self._gives_features:
            self.model.without_last_layer(net)
        return net.eval()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to the executors; they build the network themselves."""
        return {name: value for name, value in vars(self).items() if name != "_net"}

    def vector(self, data: bytes) -> Array:
        """See `MediaCoder`."""
        inputs = self.model.reader().read(data)
        tensors = {name: torch.from_numpy(np.asarray(v)[None]) for name, v in inputs.items()}
        with torch.inference_mode():
            output = self.model.predicted(self._net, tensors, None)[0].numpy()  # (size,)
        if self._gives_features:
            return np.asarray(output)
        return np.asarray(output * self._array(SCALE) + self._array(CENTRE))

    def _array(self, name: str) -> Array:
        return np.asarray(self.arrays_by_name[name].array)
