"""What neural models share: training settings, the run of a training, and how a rank reads rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from pyspark.sql import SparkSession
from torch import nn

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, TrainingSet
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models.base import FitOptions, Settings
from recspark.models.setting_types import Patience, ValidationShare
from recspark.train.buffers import persistent_buffers
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed, ShardPlan, plan_shards, split_files
from recspark.train.launch import launcher
from recspark.train.loop import LoopOptions, Loss, Trained, Validation, train_network

T = TypeVar("T")
_VALIDATION_SEED = 7  # seed of what is drawn for validation rows


class NeuralSettings(Settings):
    """Settings of every training. A model may override their defaults and descriptions."""

    epochs: int = Field(12, ge=1, description="passes over the training set at most")
    batch_size: int = Field(
        256, ge=1, description="rows per step, all ranks together; the ranks share them"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="learning rate of Adam at the first step; it falls linearly to 0"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="L2 penalty on all parameters that a step moves"
    )
    validation: ValidationShare = 0.0
    patience: Patience = 0


@dataclass(frozen=True)
class Job:
    """What all ranks train on. It is sent to the executors, so it holds file names and no rows.

    Parameters
    ----------
    settings : the model's settings, a subclass of `NeuralSettings`
    items : item_idx int32 (n_items,), ascending: the vocabulary
    training : the training files of each rank
    validation : the validation files of each rank; None = every row is trained on
    loop : options of the training loop
    """

    settings: Any
    items: Array
    training: ShardPlan
    validation: ShardPlan | None
    loop: LoopOptions

    def feed(self, comm: Comm, columns: Sequence[str]) -> Feed:
        """Return the feed of this rank's training rows.

        The loop adds up `loop.accumulate` batches for a step, so one batch has
        batch_size / accumulate rows (rounded up), all ranks together.
        """
        rows_per_batch = -(-self.settings.batch_size // self.loop.accumulate)
        return Feed(self.training, comm.rank, columns, rows_per_batch, self.loop.seed)

    def validation_feed(self, comm: Comm, columns: Sequence[str]) -> Feed | None:
        """Return the feed of this rank's validation rows; None without validation."""
        if self.validation is None:
            return None
        rows_per_batch = self.settings.batch_size
        return Feed(self.validation, comm.rank, columns, rows_per_batch, self.loop.seed)


class NetworkTask:
    """A job as one rank sees it: its rows, the vocabulary, the settings and the training loop.

    `feed` has the rank's training rows. `held_out` has its validation rows; None = no validation.
    `vocabulary` int64 (n_items,) ascending is the item_idx of each local item. `columns` are the
    columns of the training set to read.
    """

    def __init__(self, comm: Comm, job: Job, columns: Sequence[str]) -> None:
        self.comm, self.job, self.settings = comm, job, job.settings
        self.feed = job.feed(comm, columns)
        self.held_out = job.validation_feed(comm, columns)
        self.vocabulary = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)

    @property
    def n_items(self) -> int:
        """Size of the vocabulary."""
        return len(self.vocabulary)

    @property
    def seed(self) -> int:
        """Seed of the network's first weights."""
        return self.job.loop.seed

    def batches(self) -> Iterator[Batch]:
        """Yield batches with each of the rank's rows once: training rows, then validation rows."""
        for feed in (self.feed, self.held_out):
            if feed is not None:
                yield from feed.epoch(0)

    def train(
        self,
        net: nn.Module,
        loss: Loss,
        value: Callable[[Batch], torch.Tensor] | None = None,
    ) -> Trained:
        """Train `net` on this rank; see `recspark.train.loop.train_network`.

        `value` returns the figure of each validation row, (B,). Default: `loss` with None in place
        of the generator, which must then leave out everything random.
        """
        validation = None
        if self.held_out is not None:
            untyped_loss: Any = loss  # a `Loss` takes a generator; this call passes None
            validation = Validation(
                self.held_out, value or (lambda batch: untyped_loss(batch, None, 1.0))
            )
        return train_network(self.comm, net, loss, self.feed, self.job.loop, validation)


def with_the_same_draws(loss: Loss) -> Callable[[Batch], torch.Tensor]:
    """Return `loss` as a figure of validation rows, with a generator that restarts at every batch.

    A batch then gets the same draws (of negative items, for example) after every epoch, so the
    values of different epochs can be compared.
    """

    def value(batch: Batch) -> torch.Tensor:
        generator = torch.Generator(batch.weight.device).manual_seed(_VALIDATION_SEED)
        return loss(batch, generator, 1.0)

    return value


def fit_network(
    name: str,
    data: Dataset,
    options: FitOptions,
    settings: NeuralSettings,
    items: Array,
    train_rank: Callable[[Comm, Job], Trained],
    *,
    table: str | None = None,
) -> Trained:
    """Run `train_rank` on every rank, and return what rank 0 returned.

    Its learning curve goes to `options.record`.

    Parameters
    ----------
    name : of the model, for messages and for the identity of checkpoints
    items : item_idx int32 (n_items,), ascending: the vocabulary
    train_rank : a module-level function (or a `partial` of one), because it is sent to the
        executors
    table : the training set that the ranks read; None = the only one that `data` has

    Raises ModelError where `data` does not have the training set, FeedError where the training set
    is empty, and whatever a rank raises. The driver holds the weights.
    """
    if table is None:
        if len(data.training) != 1:
            raise ModelError(
                f"{name}: this data has the training sets {sorted(data.training)}, and one is read; run "
                "build_features with this model among `models`"
            )
        [table] = data.training
    training, held_out = split_files(
        data.training_set(table), settings.validation, options.train.ranks
    )
    spark = data.histories.sparkSession
    return train_on_ranks(name, spark, options, settings, items, train_rank, training, held_out)


def train_on_ranks(
    name: str,
    spark: SparkSession,
    options: FitOptions,
    settings: NeuralSettings,
    items: Array,
    train_rank: Callable[[Comm, Job], Trained],
    training: TrainingSet,
    held_out: TrainingSet | None,
) -> Trained:
    """Run `train_rank` on every rank, and return what rank 0 returned; see `fit_network`.

    `training` are the files to train on, `held_out` those to validate on; None = no validation.
    """
    job = make_job(name, options, settings, items, training, held_out)
    trained = run_on_ranks(spark, options, train_rank, job)
    options.record(trained.curve)
    return trained


def make_job(
    name: str,
    options: FitOptions,
    settings: NeuralSettings,
    items: Array,
    training: TrainingSet,
    held_out: TrainingSet | None,
) -> Job:
    """Return the job of all ranks; see `train_on_ranks`."""
    train_options = options.train
    all_files = training.files + (held_out.files if held_out else ())
    loop = LoopOptions(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        patience=settings.patience,
        seed=options.seed,
        accumulate=train_options.accumulate,
        precision=train_options.precision,
        compression=train_options.compression,
        device=train_options.device,
        checkpoints=storage.join(options.scratch, "checkpoints") if options.scratch else "",
        checkpoint_every_s=train_options.checkpoint_every_s,
        identity={
            "model": name,
            "settings": settings.model_dump(),
            "table": training.table,
            "version": training.version,
            "files": digest(all_files),
            "items": digest(items.tolist()),
            "train": train_options.arithmetic(),
        },
    )
    return Job(
        settings,
        items,
        plan_shards(training, train_options.ranks),
        plan_shards(held_out, train_options.ranks) if held_out else None,
        loop,
    )


def run_on_ranks(
    spark: SparkSession, options: FitOptions, function: Callable[[Comm, Job], T], job: Job
) -> T:
    """Run `function` on every rank, and return what it returned on rank 0."""
    rank_launcher = launcher(
        spark,
        options.train,
        in_process=options.in_process,
        tell=options.progress,
    )
    return rank_launcher.run(function, job)[0].value


def check_catalogue_size(
    name: str, items: Array, max_items: int, bytes_per_item: float, instead: str
) -> None:
    """Raise CatalogueTooLargeError if there are more than `max_items` items.

    Call this before memory is taken. The message says how much a rank would need (`bytes_per_item`
    for each item) and names the model to use `instead`.
    """
    if len(items) > max_items:
        raise CatalogueTooLargeError(
            f"{name}: {len(items):,} items before the cutoff, max_items is {max_items:,}; raise "
            f"models.{name}.max_items if the ranks have {1e-9 * bytes_per_item * len(items):,.1f} "
            f"GB each, or use {instead}"
        )


def entries(
    batch: Batch, vocabulary: torch.Tensor, *, ratings: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row (ascending), local item and weight of each item of a batch of bags, (P,) each.

    Padding and items outside the vocabulary are left out. So are items of weight 0 or below, unless
    the weights are `ratings`.

    Example: bags [[5, 8], [8, -1]] with weights [[1, 2], [3, 0]] and the vocabulary [3, 5, 8] give
    rows [0, 0, 1], items [1, 2, 2] and weights [1, 2, 3].
    """
    items, weights = batch.tensors["items"], batch.tensors["weights"]  # (B, L) each
    has_entry = items >= 0 if ratings else weights > 0  # (B, L)
    rows, columns = torch.nonzero(has_entry, as_tuple=True)  # (P',) each, with unknown items
    local, is_known = look_up(items[rows, columns], vocabulary)  # (P',) each
    return rows[is_known], local[is_known], weights[rows, columns][is_known]


def scaled_to_unit_length(values: torch.Tensor, rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return the values divided by the Euclidean length of their row, (P,).

    `values` (P,) belong to the rows `rows` int64 (P,).
    """
    squares = values.new_zeros(n_rows).index_add(0, rows, values**2)  # (B,)
    return values / squares.sqrt().clamp_min(1e-12)[rows]  # (P,)


def corrupted(
    values: torch.Tensor, share: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Return `values` with a random `share` of them set to 0; same shape.

    The other values are divided by 1 - share. A sum of the values then has the same mean as at
    scoring, where nothing is corrupted. Without a `generator` the values are returned as they are.
    """
    if generator is None:
        return values
    is_kept = torch.rand_like(values, generator=generator) >= share  # shaped as values
    return values * is_kept / (1 - share)


def look_up(values: torch.Tensor, vocabulary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position of each value in the ascending `vocabulary`, and whether it is in there.

    Both results, int64 and bool, have the shape of `values`. A value outside the vocabulary, such
    as padding (-1), gets some position and False.

    Example: the values [9, 4] and the vocabulary [3, 5, 9] give [2, 1] and [True, False].
    """
    values, vocabulary = values.long(), vocabulary.to(values.device)  # any shape, (n_items,)
    local = torch.searchsorted(vocabulary, values).clamp_max(len(vocabulary) - 1)
    return local, vocabulary[local] == values


def local_items(batch: Batch, vocabulary: torch.Tensor, length: int) -> torch.Tensor:
    """Return the newest `length` known items of each row as local indices, int64 (B, W).

    Items outside the vocabulary are left out before the newest are taken. Rows keep their time
    order and are padded at the end with -1. W is the largest number of items that a row has, but at
    least 2 and at most `length`.

    Example: with the vocabulary [3, 5, 8], `length` 2 and rows [3, 99, 5, 8] and [8, -1, -1, -1],
    the result is [[1, 2], [2, -1]].
    """
    local, is_known = look_up(batch.tensors["items"], vocabulary)  # (B, L) each
    order = torch.argsort((~is_known).int(), dim=1, stable=True)  # (B, L): known items first
    local = torch.where(is_known, local, -1).gather(1, order)  # (B, L)
    n_known = is_known.sum(dim=1)  # (B,)
    width = min(length, max(2, int(n_known.max())))
    first = (n_known - length).clamp_min(0)  # (B,): column of the oldest item that is returned
    return local.gather(1, first[:, None] + torch.arange(width, device=first.device))  # (B, W)


def log_shares(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return the log of each item's share of the weights in the rows of all ranks, (n_items,).

    A hundredth of the mean weight of an item is added to every item, so that no share is 0.
    `batches` are batches of bags; see `entries`.
    """
    total = torch.zeros(len(vocabulary))  # (n_items,)
    for batch in batches:
        rows, items, weights = entries(batch, vocabulary)  # (P,) each
        total.index_add_(0, items, weights * batch.weight[rows])
    total = comm.allreduce(total)
    total += 0.01 * total.mean() + torch.finfo(total.dtype).tiny
    return torch.log(total / total.sum())


def net_arrays(net: nn.Module) -> dict[str, Array]:
    """Return a copy of every parameter and persistent buffer of `net`, by name."""
    tensors = {**dict(net.named_parameters()), **persistent_buffers(net)}
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside the `with` block: a Spark task has one core."""
    n_threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads_before)
