"""What neural models share: settings of a training, and how ranks are given their part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models.base import FitOptions, Settings
from recspark.train.buffers import persistent_buffers
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed, ShardPlan, plan_shards, split_files
from recspark.train.launch import launcher
from recspark.train.loop import LoopOptions, Loss, Trained, Validation, train

_VALIDATION_SEED = 7


class NeuralSettings(Settings):
    """Settings of every training; a model gives them its own defaults and sources."""

    epochs: int = Field(12, ge=1, description="passes over the training set at most")
    batch_size: int = Field(
        256, ge=1, description="rows of a step, of all ranks together; ranks share them"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="of Adam at the first step, falling linearly to 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="L2 on all parameters a step moves")
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training set that is not trained on: whole files, each a hash "
        "sample of the rows, of which a rank has ten. The epoch that is best on it gives the weights",
    )
    patience: int = Field(
        0,
        ge=0,
        description="epochs in a row no better on the validation rows that end it; 0 = never",
    )


@dataclass(frozen=True)
class Job:
    """What a rank trains on, small enough to travel.

    `items` int32 (n_items,): the vocabulary. `validation` is None where every row is trained on.
    """

    settings: Any  # the model's own
    items: Array
    training: ShardPlan
    validation: ShardPlan | None
    loop: LoopOptions

    def feed(self, comm: Comm, columns: Sequence[str]) -> Feed:
        """Return this rank's training rows; a step is read in `loop.accumulate` parts."""
        part = -(-self.settings.batch_size // self.loop.accumulate)
        return Feed(self.training, comm.rank, columns, part, self.loop.seed)

    def validation_feed(self, comm: Comm, columns: Sequence[str]) -> Feed | None:
        """Return this rank's validation rows."""
        if self.validation is None:
            return None
        size = self.settings.batch_size
        return Feed(self.validation, comm.rank, columns, size, self.loop.seed)


class NetworkTask:
    """What one rank trains on: its rows, the vocabulary and the settings; and the loop over them.

    `feed` : the rank's training rows; `held_out` : its validation rows, None without; `vocabulary`
    int64 (n_items,): item_idx of each local item
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
        """Give each of the rank's rows once, those for validation too."""
        for feed in (self.feed, self.held_out):
            if feed is not None:
                yield from feed.epoch(0)

    def train(
        self,
        net: nn.Module,
        loss: Loss,
        value: Callable[[Batch], torch.Tensor] | None = None,
    ) -> Trained:
        """Run the loop; see `recspark.train.loop.train`.

        `value` : of validation rows, (B,); default: the loss without anything random, of a generator
        that is None.
        """
        validation = None
        if self.held_out is not None:
            clean: Any = loss
            validation = Validation(self.held_out, value or (lambda batch: clean(batch, None, 1.0)))
        return train(self.comm, net, loss, self.feed, self.job.loop, validation)


def with_the_same_draws(loss: Loss) -> Callable[[Batch], torch.Tensor]:
    """Return the loss of validation rows that draws the same items for them at every epoch."""

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
    """Run `train_rank` on every rank; return what rank 0 returned; its curve goes to `options.record`.

    `train_rank` is a module-level function: it travels to the executors. `table` : the training set
    that the ranks read, of a model that has several. Raises ModelError where `data` does not have
    it, FeedError where it is empty, and what a rank raises. Driver: the weights.
    """
    if table is None:
        if len(data.training) != 1:
            raise ModelError(
                f"{name}: this data has the training sets {sorted(data.training)}, and one is read; run "
                "build_features with this model among `models`"
            )
        [table] = data.training
    whole = data.training_set(table)
    train = options.train
    training, held_out = split_files(whole, settings.validation, train.ranks)
    loop = LoopOptions(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        patience=settings.patience,
        seed=options.seed,
        accumulate=train.accumulate,
        precision=train.precision,
        compression=train.compression,
        device=train.device,
        checkpoints=storage.join(options.scratch, "checkpoints") if options.scratch else "",
        checkpoint_every_s=train.checkpoint_every_s,
        identity={
            "model": name,
            "settings": settings.model_dump(),
            "table": whole.table,
            "version": whole.version,
            "files": digest(whole.files),
            "items": digest(items.tolist()),
            "train": train.arithmetic(),
        },
    )
    job = Job(
        settings,
        items,
        plan_shards(training, train.ranks),
        plan_shards(held_out, train.ranks) if held_out else None,
        loop,
    )
    ranks = launcher(
        data.histories.sparkSession,
        train,
        in_process=options.in_process,
        tell=options.progress,
    )
    trained = ranks.run(train_rank, job)[0].value
    options.record(trained.curve)
    return trained


def check_catalogue(
    name: str, items: Array, max_items: int, bytes_an_item: float, instead: str
) -> None:
    """Raise CatalogueTooLargeError, before memory is taken, above `max_items`."""
    if len(items) > max_items:
        raise CatalogueTooLargeError(
            f"{name}: {len(items):,} items before the cutoff, max_items is {max_items:,}; raise "
            f"models.{name}.max_items if the ranks have {1e-9 * bytes_an_item * len(items):,.1f} "
            f"GB each, or use {instead}"
        )


def entries(
    batch: Batch, vocabulary: torch.Tensor, *, ratings: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row (ascending), local item and weight of each item of a batch of bags, (P,) each.

    Padding, items outside the vocabulary and, unless weights are `ratings`, items of weight 0 and
    below are left out.
    """
    items, weights = batch.tensors["items"], batch.tensors["weights"]  # (B, L) each
    counted = items >= 0 if ratings else weights > 0  # (B, L)
    rows, columns = torch.nonzero(counted, as_tuple=True)  # (P,) each
    local, known = local_index(items[rows, columns], vocabulary)  # (P,) each
    return rows[known], local[known], weights[rows, columns][known]


def unit(values: torch.Tensor, rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return the values of each row at length 1, (P,); `rows` int64 (P,)."""
    squares = values.new_zeros(n_rows).index_add(0, rows, values**2)  # (B,)
    return values / squares.sqrt().clamp_min(1e-12)[rows]  # (P,)


def corrupted(
    values: torch.Tensor, share: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Return `values` with a share of them set to 0; without a `generator` as they are.

    The rest is divided by 1 - share: a sum of them has the mean that it has without corruption, as at
    scoring.
    """
    if generator is None:
        return values
    kept = torch.rand_like(values, generator=generator) >= share  # as values
    return values * kept / (1 - share)


def local_index(
    values: torch.Tensor, vocabulary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places in the ascending `vocabulary`, and where they are right: the rest is not in it.

    Both are shaped as `values`. Padding is no item's index.
    """
    values, vocabulary = values.long(), vocabulary.to(values.device)  # any shape, (n_items,)
    local = torch.searchsorted(vocabulary, values).clamp_max(len(vocabulary) - 1)
    return local, vocabulary[local] == values


def local_items(batch: Batch, vocabulary: torch.Tensor, length: int) -> torch.Tensor:
    """Return the newest `length` items of each row as local indices, int64 (B, L), -1 after them.

    L is what the longest row needs. Items outside the vocabulary are left out.
    """
    local, known = local_index(batch.tensors["items"], vocabulary)  # (B, L) each
    order = torch.argsort((~known).int(), dim=1, stable=True)  # (B, L): known ones first
    local = torch.where(known, local, -1).gather(1, order)  # (B, L)
    n_known = known.sum(dim=1)  # (B,)
    width = min(length, max(2, int(n_known.max())))
    first = (n_known - length).clamp_min(0)  # (B,)
    return local.gather(1, first[:, None] + torch.arange(width, device=first.device))  # (B, width)


def log_shares(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return the log of each item's share of all weights of all ranks, (n_items,).

    An item counts a hundredth of the mean on top, so that none has a share of 0.
    """
    total = torch.zeros(len(vocabulary))  # (n_items,)
    for batch in batches:
        rows, items, weights = entries(batch, vocabulary)  # (P,) each
        total.index_add_(0, items, weights * batch.weight[rows])
    total = comm.allreduce(total)
    total += 0.01 * total.mean() + torch.finfo(total.dtype).tiny
    return torch.log(total / total.sum())


def net_arrays(net: nn.Module) -> dict[str, Array]:
    """Return a copy of every parameter and persistent buffer, by its name."""
    tensors = {**dict(net.named_parameters()), **persistent_buffers(net)}
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
