"""What rankers that are networks of fields share: settings, training, artifact and scoring.

Such a ranker predicts from the features of a row alone whether the row is positive. The rows are
the examples of a night, or those of any table with a label (`learn`). The network is trained by
Horovod ranks on Spark executors, from the files of `recspark.data.training_fields`.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, Examples, TrainingSet
from recspark.data.feature_encoding import Encoding
from recspark.data.training_fields import (
    Quantiles,
    counted,
    quantiles_of,
    write_training_rows,
)
from recspark.data.training_rows import n_training_files
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import (
    NOTHING,
    Algorithm,
    ArraysRanker,
    FitOptions,
    Needed,
    PairBlock,
)
from recspark.models.kinds import Kind
from recspark.models.neural import (
    Job,
    NetworkTask,
    NeuralSettings,
    train_on_ranks,
)
from recspark.models.setting_types import LearningRate, Patience, ValidationShare
from recspark.nets.fields import Tower
from recspark.train.comm import Comm
from recspark.train.feed import Batch, split_files
from recspark.train.loop import Trained, load_weights
from recspark.train.optimisers import Adam, Optimiser

# Rows that are scored at once. Always this many (short blocks are filled up), because the rounding
# of a BLAS product depends on the shape of its matrices.
_BLOCK_ROWS = 256
_NO_ITEMS = np.zeros(0, np.int32)  # these networks have no vocabulary of items
_QUANTILES = "quantiles"  # name of the array in a saved model


class FieldsSettings(NeuralSettings):
    """Settings of every ranker that is a network of fields."""

    embedding_size: int = Field(
        8,
        ge=1,
        description="length of the embedding of each field. Guess",
        json_schema_extra={"tune": {"choices": [4, 8, 16]}},
    )
    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (128, 64), min_length=1, description="units of each layer of the tower. Guess"
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the units of each layer that a training step leaves out. Guess",
        json_schema_extra={"tune": {"choices": [0.0, 0.1, 0.3, 0.5]}},
    )
    batch_norm: bool = Field(
        False, description="batch normalisation in each layer; each rank normalises its own rows"
    )
    embedding_reg: float = Field(
        0.0,
        ge=0,
        description="L2 penalty on all embeddings, at every step. BARS has 0.05 to 0.1 on Frappe",
        json_schema_extra={"tune": {"low": 1e-6, "high": 0.1, "log": True}},
    )
    n_quantiles: int = Field(
        100,
        ge=2,
        le=10_000,
        description="points of the distribution of each number, between which its position is "
        "interpolated. Guess",
    )
    epochs: int = Field(10, ge=1, description="passes over the training rows, at most")
    batch_size: int = Field(
        1024, ge=1, description="rows per step, all ranks together; the ranks share them"
    )
    learning_rate: LearningRate = Field(
        1e-3,
        description="learning rate at the first step; that of Adam falls linearly to 0",
        json_schema_extra={"tune": {"low": 3e-4, "high": 1e-2, "log": True}},
    )
    validation: ValidationShare = Field(
        0.1,
        description="share of the training rows that is held out for validation: a hash sample of "
        "the users. The model gets the weights of the epoch with the smallest loss on them",
    )
    patience: Patience = 2


S = TypeVar("S", bound=FieldsSettings)


@dataclass(frozen=True)
class Inputs:
    """What a network reads of a row: how many codes each field has, and how many numbers there are.

    Parameters
    ----------
    names : of the fields, then of the numbers
    sizes : codes of each field; with `n_buckets`, then those of each number as a field
    n_numbers : numbers
    n_buckets : buckets of equal probability that a number falls into where it is read as a field;
        None = numbers are not read as fields
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    n_numbers: int
    n_buckets: int | None = None

    @classmethod
    def of(cls, encoding: Encoding, n_buckets: int | None = None) -> Inputs:
        """Return the inputs of rows that `encoding` encodes."""
        bucket_sizes = () if n_buckets is None else (n_buckets + 1,) * len(encoding.numbers)
        names = (*encoding.fields, *encoding.numbers)
        sizes = (*encoding.sizes, *bucket_sizes)
        return cls(names[: len(sizes)], sizes, len(encoding.numbers), n_buckets)

    @property
    def n_codes(self) -> int:
        """The number of codes of all fields together."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each field in a table with a row for each code."""
        return tuple(int(n) for n in np.cumsum([0, *self.sizes])[:-1])

    def codes(self, fields: Array, positions: Array) -> Array:
        """Return the code of each field, int64 (n, len(sizes)).

        `fields` int32 (n, n_fields); `positions` (n, n_numbers), NaN = missing. A number as a field
        has the code 0 where it is missing, and 1 to n_buckets for its bucket.
        """
        codes = fields.astype(np.int64)
        if self.n_buckets is not None:
            buckets = np.minimum((np.nan_to_num(positions) * self.n_buckets), self.n_buckets - 1)
            number_codes = np.where(np.isnan(positions), 0, 1 + buckets.astype(np.int64))
            codes = np.concatenate([codes, number_codes], axis=1)
        return codes

    def rows(self, codes: Array) -> Array:
        """Return the row of each code in a table with a row for each code, int64, as `codes`.

        A code beyond the vocabulary of its field is an error of the caller.
        """
        return codes + np.asarray(self.starts, np.int64)


class FieldsAlgorithm(Algorithm[S]):
    """A network that reads the fields and numbers of a row, and gives one logit."""

    name: ClassVar[str]

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. At least one retriever."""
        if "retriever" not in kinds.values():
            raise ConfigError(
                f"{self.name} ranks what retrievers list: name one in needs, which are {[*kinds]}"
            )

    @abstractmethod
    def inputs(self, encoding: Encoding) -> Inputs:
        """Return what the network reads. Raises ConfigError where settings do not fit the data."""

    @abstractmethod
    def make_net(self, inputs: Inputs, seed: int) -> nn.Module:
        """Return the network, with first weights drawn from `seed`."""

    @abstractmethod
    def logits(self, net: Any, inputs: Inputs, batch: FieldsBatch) -> torch.Tensor:
        """Return the logit of each row, (B,)."""

    @abstractmethod
    def fitted(
        self, cutoff: datetime, encoding: Encoding, arrays: dict[str, Array]
    ) -> FieldsRankerModel:
        """Return the fitted model with these arrays."""

    def optimisers(self) -> dict[str, Optimiser]:
        """Return what moves the parameters, by name; see `LoopOptions.optimisers`."""
        settings = self.settings
        adam = Adam(settings.learning_rate, settings.weight_decay)
        return {"": adam, "embedding": replace(adam, weight_decay=settings.embedding_reg)}

    def prepare(self, net: Any, inputs: Inputs, task: NetworkTask) -> None:
        """Set what of `net` follows from the training rows; the same on every rank."""

    def row_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the logistic loss of each row, (B,); a label above 0 is positive."""
        return functional.binary_cross_entropy_with_logits(
            logits, (labels > 0).to(logits.dtype), reduction="none"
        )

    def report(self, model: FieldsRankerModel) -> str:
        """Return a line about the fitted model for a person to read; "" = none."""
        return ""

    def fit(
        self, data: Dataset, options: FitOptions, needed: Needed = NOTHING
    ) -> FieldsRankerModel:
        """See `Algorithm.fit` and `learn`."""
        assert data.examples is not None
        return self.learn(data.examples, options, cutoff=data.cutoff)

    def learn(
        self,
        examples: Examples,
        options: FitOptions,
        *,
        held_out: Examples | None = None,
        cutoff: datetime = datetime(1970, 1, 1, tzinfo=UTC),
    ) -> FieldsRankerModel:
        """Return the model fitted on `examples`, which need no users and items.

        Parameters
        ----------
        held_out : rows to validate on, with the same encoding; None = `validation` of the examples
        cutoff : noted in the model

        Three jobs that read the examples once each (counts; a sample for the distributions of
        numbers; the training rows, with one shuffle), then the training. The driver holds the
        sample and the weights. Raises EmptyDataError where no row is positive or all are.
        """
        encoding, spark = examples.encoding, examples.rows.sparkSession
        if held_out is not None and held_out.encoding != encoding:
            raise ModelError(f"{self.name}: the rows held out are encoded otherwise")
        inputs = self.inputs(encoding)
        counts = counted(examples)
        if counts.n_positive in (0, counts.n_rows):
            raise EmptyDataError(
                f"{self.name}: {counts.n_positive:,} of {counts.n_rows:,} examples are positive; "
                "it learns from both kinds"
            )
        settings = self.settings
        quantiles = quantiles_of(examples, counts.n_rows, settings.n_quantiles, options.seed)
        n_files = n_training_files(options.train.ranks)
        with _scratch(options) as folder:

            def written(rows: Examples, part: str, checksum: int) -> TrainingSet:
                key = digest([encoding.to_dict(), checksum, quantiles.values.tolist(), n_files])
                uri = storage.join(folder, f"{part}-{key}")
                return write_training_rows(rows, quantiles, uri, n_files)

            training = written(examples, "training_rows", counts.checksum)
            if held_out is None:
                self._check_can_be_split(training)
                training, validation = split_files(
                    training, settings.validation, options.train.ranks
                )
            else:
                validation = written(held_out, "held_out_rows", counted(held_out).checksum)
            rank = partial(train_rank, self, inputs)
            trained = train_on_ranks(
                self.name, spark, options, settings, _NO_ITEMS, rank, training, validation
            )
            net = self.make_net(inputs, options.seed)
            load_weights(net, trained)
        arrays = {_QUANTILES: quantiles.values, **scoring_arrays(net)}
        model = self.fitted(cutoff, encoding, arrays)
        if line := self.report(model):
            options.progress(line)
        return model

    def _check_can_be_split(self, training: TrainingSet) -> None:
        """Raise EmptyDataError where all rows are in one file, so that none can be held out."""
        n_files = sum(n_rows > 0 for _, n_rows in training.files)
        if self.settings.validation > 0 and n_files < 2:
            raise EmptyDataError(
                f"{self.name}: the examples are of too few users to hold some out for validation; "
                f"set models.{self.name}.validation to 0"
            )


@contextmanager
def _scratch(options: FitOptions) -> Iterator[str]:
    """Give the folder for training rows; without one in the options, a local one until the end."""
    if options.scratch:
        yield options.scratch
        return
    with tempfile.TemporaryDirectory(prefix="recspark-fields-") as folder:
        yield folder


@dataclass(frozen=True)
class FieldsBatch:
    """The rows of a step: `label` (B,), `codes` int64 (B, F) and `rows` of codes, `positions`."""

    label: torch.Tensor
    codes: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


def fields_batch(batch: Batch, inputs: Inputs) -> FieldsBatch:
    """Return the tensors that networks of fields read of a batch; see `Inputs.codes`."""
    label = batch.tensors["label"]  # (B,)
    device, n_rows = label.device, len(label)
    positions = batch.tensors.get("numbers", torch.zeros(n_rows, 0, device=device))  # (B, n)
    codes = batch.tensors.get("codes", torch.zeros(n_rows, 0, device=device)).long()  # (B, m)
    if inputs.n_buckets is not None:
        buckets = torch.nan_to_num(positions) * inputs.n_buckets  # (B, n)
        buckets = 1 + buckets.clamp_max(inputs.n_buckets - 1).long()  # (B, n)
        codes = torch.cat([codes, torch.where(torch.isnan(positions), 0, buckets)], dim=1)
    starts = torch.tensor(inputs.starts, dtype=torch.int64, device=device)  # (F,)
    return FieldsBatch(label, codes, codes + starts, positions)


def train_rank(algorithm: FieldsAlgorithm[Any], inputs: Inputs, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    job = replace(job, loop=replace(job.loop, optimisers=algorithm.optimisers()))
    task = NetworkTask(comm, job, columns_read(inputs))
    net = algorithm.make_net(inputs, task.seed)
    algorithm.prepare(net, inputs, task)

    def loss(batch: Batch, generator: torch.Generator | None, done: float) -> torch.Tensor:
        fields = fields_batch(batch, inputs)
        logits = algorithm.logits(net, inputs, fields)  # (B,)
        return algorithm.row_loss(logits, fields.label) * batch.tensors["weight"]  # (B,)

    return task.train(net, loss)


def columns_read(inputs: Inputs) -> tuple[str, ...]:
    """Return the columns of the training rows that have something in them."""
    n_fields = len(inputs.sizes) - (inputs.n_numbers if inputs.n_buckets is not None else 0)
    numbers = ("numbers",) if inputs.n_numbers else ()
    codes = ("codes",) if n_fields else ()
    return ("label", "weight", *numbers, *codes)


def scoring_arrays(net: nn.Module) -> dict[str, Array]:
    """Return a copy of what scoring needs of a trained network: its own parameters, its tower."""
    tensors = {
        name: value.detach()
        for name, value in net.named_parameters()
        if not name.startswith("tower.")
    }
    tower: Tower = net.get_submodule("tower")  # type: ignore[assignment]
    arrays = {**tensors, **{f"tower.{name}": value for name, value in tower.arrays().items()}}
    return {name: value.numpy().copy() for name, value in arrays.items()}


class FieldsRankerModel(ArraysRanker):
    """A trained network of fields.

    Its arrays are those of the network, named as there, with `tower.` before those of
    `nets.fields.Tower.arrays`, and `quantiles` float32 (n_numbers, n_quantiles).
    """

    @property
    def inputs(self) -> Inputs:
        """What the network reads."""
        raise NotImplementedError

    def pair_scorer(self) -> FieldsScorer:
        """See `RankerModel`."""
        raise NotImplementedError


class FieldsScorer:
    """Computes the network in float64 with numpy, in blocks of one size.

    The operations on a row come in the same order wherever the row stands, so its score does not
    depend on the rows beside it.
    """

    def __init__(self, settings: Any, inputs: Inputs, arrays: Mapping[str, Array]) -> None:
        self.settings, self.inputs = settings, inputs
        self.quantiles = Quantiles(arrays[_QUANTILES])
        self._stored = dict(arrays)

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """The small arrays in float64; a table stays as it is until rows of it are read."""
        return {
            name: array.astype(np.float64)
            for name, array in self._stored.items()
            if name.startswith("tower.") or name == "theta"
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to the executors; they make the float64 arrays themselves."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}

    def score(self, block: PairBlock) -> Array:
        """See `PairScorer`."""
        return self.served(self.logits(block)).astype(np.float32)

    def served(self, logits: Array) -> Array:
        """Return the score of each logit, float64: the probability that the row is positive."""
        return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))  # the sigmoid; nothing overflows

    def logits(self, block: PairBlock) -> Array:
        """Return the logit of each row, float64 (n,)."""
        positions = self.quantiles.positions(block.numbers)
        codes = self.inputs.codes(block.fields, positions)
        n_rows = len(codes)
        logits = np.zeros(n_rows)
        for begin in range(0, n_rows, _BLOCK_ROWS):
            end = min(begin + _BLOCK_ROWS, n_rows)
            # The last block is filled up with its own first row.
            rows = np.arange(begin, begin + _BLOCK_ROWS)
            rows[end - begin :] = begin
            logits[begin:end] = self.block_logits(codes[rows], positions[rows])[: end - begin]
        return logits

    def block_logits(self, codes: Array, positions: Array) -> Array:
        """Return the logit of each row of a full block, float64 (256,).

        `codes` int64 (256, F); `positions` float32 (256, n_numbers), NaN = missing.
        """
        raise NotImplementedError

    def embedded(self, codes: Array) -> Array:
        """Return the embeddings of the codes, float64 (256, F, D)."""
        return np.asarray(self._stored["embedding"][self.inputs.rows(codes)].astype(np.float64))

    def tower(self, inputs: Array, added: Array | float = 0.0) -> Array:
        """Return the output of the tower, float64 (256,); see `nets.fields.Tower.forward`."""
        arrays, hidden, k = self.arrays, inputs, 1
        while f"tower.layer_{k}" in arrays:
            name = f"tower.layer_{k}"
            hidden = hidden @ arrays[name] + arrays[f"{name}_bias"]
            if k == 1:
                hidden = hidden + added
            if f"{name}_scale" in arrays:
                hidden = hidden * arrays[f"{name}_scale"] + arrays[f"{name}_shift"]
            hidden, k = np.maximum(hidden, 0), k + 1
        return np.asarray((hidden @ arrays["tower.out"] + arrays["tower.out_bias"])[:, 0])


def number_inputs(positions: Array, powers: Sequence[float] = (1.0,)) -> Array:
    """Return what a tower reads of numbers, float64; see `nets.fields.number_inputs`."""
    is_missing = np.isnan(positions)
    present = np.where(is_missing, 0, positions).astype(np.float64)
    return np.concatenate([*(present**power for power in powers), is_missing], axis=1)
