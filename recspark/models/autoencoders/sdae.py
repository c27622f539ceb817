"""SDAE: a stacked denoising autoencoder, trained layer by layer, then all layers together.

Source: Vincent et al. 2010. The network is trained by Horovod ranks on Spark executors, from the
files of one version of `training_bags`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field, PositiveInt
from torch import nn

from recspark.data.dataset import Dataset
from recspark.models.autoencoders.autoencoder import AutoencoderModel, Layers
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.neural import (
    Job,
    NetworkTask,
    NeuralSettings,
    check_catalogue_size,
    corrupted,
    entries,
    fit_network,
    log_shares,
    net_arrays,
    scaled_to_unit_length,
)
from recspark.models.setting_types import Epochs, LearningRate, ScoringHalfLifeDays
from recspark.nets.sdae import SdaeNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed
from recspark.train.loop import LoopOptions, Trained, load_weights, train_network
from recspark.train.losses import multinomial_nll

_COLUMNS = ("items", "weights")


class SdaeSettings(NeuralSettings):
    """Settings of `Sdae`."""

    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (200, 64),
        min_length=1,
        description="units of each layer, from the items to the code (the last one). Guess: the "
        "sizes of multvae",
    )
    corruption: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of a layer's inputs that is set to 0 in training (masking noise). "
        "Paper, section 4: 0.1 to 0.5. Measured on the validation part of MovieLens 1M: .213 with "
        ".5, .178 without corruption",
        json_schema_extra={"tune": {"low": 0.1, "high": 0.8}},
    )
    pretraining_epochs: int = Field(
        4, ge=0, description="passes over the training set to pretrain each layer. Guess"
    )
    half_life_days: ScoringHalfLifeDays = 30.0
    epochs: Epochs = Field(
        20,
        description="passes over the training set to train all layers together",
    )
    learning_rate: LearningRate = 5e-3
    max_items: int = Field(
        100_000,
        ge=1,
        description="largest catalogue, in items; a rank takes about 72 bytes per item and unit of "
        "layer 1",
    )


class Sdae(Algorithm[SdaeSettings]):
    """Learn to rebuild a user's items from a corrupted version of them.

    Pretraining comes first, layer by layer: layer k learns to rebuild its clean input from a
    corrupted version of it, while the layers before it stay fixed. The input of layer 1 is the
    user's items, the input of layer k > 1 is the output of layer k - 1. Then all layers together
    learn to rebuild the items.

    The loss is the multinomial likelihood for items (as in Mult-VAE), and the squared error for the
    outputs of a hidden layer. Inputs that corruption leaves are divided by their share. A layer's
    inputs then have the same mean in training as at scoring, where nothing is corrupted. All layers
    use tanh (see `SdaeNet` for the reason). The bias of the last layer starts at the log of each
    item's share of the training set. Source: Vincent et al. 2010, sections 3.2 and 3.5.
    """

    settings_class = SdaeSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> SdaeModel:
        """See `Algorithm.fit`. The driver holds the vocabulary and weights, nothing per user."""
        settings, items = self.settings, data.vocabulary()
        bytes_per_item = 72 * settings.hidden_sizes[0]
        check_catalogue_size("sdae", items, settings.max_items, bytes_per_item, "als")
        trained = fit_network("sdae", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return SdaeModel(settings, data.cutoff, items, net_arrays(net))


class SdaeModel(AutoencoderModel):
    """A trained `Sdae`: the network's arrays, named as in `SdaeNet`."""

    @property
    def layers(self) -> Layers:
        """See `AutoencoderModel`."""
        assert isinstance(self.settings, SdaeSettings)
        return layers_of(len(self.settings.hidden_sizes))


def layers_of(depth: int) -> Layers:
    """Return the layers before the last, for `depth` hidden sizes; see `autoencoder.Layers`.

    They lead from the items down to the code, and from the code up again to the size of layer 1.

    >>> layers_of(2)
    (('items_in', 'tanh'), ('down_2', 'tanh'), ('up_2', 'tanh'))
    """
    down = [f"down_{k}" for k in range(2, depth + 1)]
    up = [f"up_{k}" for k in range(depth, 1, -1)]
    return tuple((name, "tanh") for name in ("items_in", *down, *up))


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank, layer by layer, then all layers; see `recspark.train.launch`."""
    task = NetworkTask(comm, job, _COLUMNS)
    settings, vocabulary = task.settings, task.vocabulary
    net = make_net(settings, task.n_items, task.seed)
    net.items_out_bias.data = log_shares(comm, task.feed.epoch(0), vocabulary)

    def layer_loss(k: int, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return pretraining_loss(net, vocabulary, settings, k, batch, generator)

    pretrain(comm, net, task.feed, job.loop, settings.pretraining_epochs, layer_loss)

    def loss(batch: Batch, generator: torch.Generator | None, done: float) -> torch.Tensor:
        return row_loss(net, vocabulary, settings, batch, generator)

    return task.train(net, loss)


def make_net(settings: SdaeSettings, n_items: int, seed: int) -> SdaeNet:
    """Return the network with first weights drawn from `seed`."""
    return SdaeNet(n_items, settings.hidden_sizes, torch.Generator().manual_seed(seed))


def row_loss(
    net: SdaeNet,
    vocabulary: torch.Tensor,
    settings: SdaeSettings,
    batch: Batch,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the negative log likelihood of each row's items, rebuilt through all layers, (B,).

    `vocabulary` int64 (n_items,) ascending: the item_idx of each local item. Without a `generator`
    nothing is corrupted.
    """
    rows, items, values = entries(batch, vocabulary)  # (P,) each
    n_rows = len(batch.weight)
    inputs = _corrupted_inputs(rows, values, n_rows, settings, generator)  # (P,)
    code = net.encode(rows, items, inputs, n_rows, net.depth)  # (B, HK)
    return multinomial_nll(net.logits(net.decode(code)), rows, items, values)  # (B,)


def pretraining_loss(
    net: SdaeNet,
    vocabulary: torch.Tensor,
    settings: SdaeSettings,
    k: int,
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return how badly layer k (from 1) rebuilds its clean input from a corrupted one, (B,).

    For k = 1 this is the negative log likelihood of each row's items, for k > 1 the squared error
    of the outputs of layer k - 1.
    """
    rows, items, values = entries(batch, vocabulary)  # (P,) each
    n_rows = len(batch.weight)
    if k == 1:
        inputs = _corrupted_inputs(rows, values, n_rows, settings, generator)  # (P,)
        hidden = net.first(rows, items, inputs, n_rows)  # (B, H1)
        return multinomial_nll(net.logits(hidden), rows, items, values)  # (B,)
    with torch.no_grad():  # the layers before layer k stay as they are
        inputs = _corrupted_inputs(rows, values, n_rows, settings, None)  # (P,): clean
        clean = net.encode(rows, items, inputs, n_rows, k - 1)  # (B, Hk-1)
    rebuilt = net.up(net.down(corrupted(clean, settings.corruption, generator), k), k)  # (B, Hk-1)
    return ((rebuilt - clean) ** 2).sum(dim=1)  # (B,)


def _corrupted_inputs(
    rows: torch.Tensor,
    values: torch.Tensor,
    n_rows: int,
    settings: SdaeSettings,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the values scaled to length 1 in each row, then corrupted, (P,).

    Without a `generator` they are not corrupted.
    """
    return corrupted(scaled_to_unit_length(values, rows, n_rows), settings.corruption, generator)


def pretrain(
    comm: Comm,
    net: SdaeNet,
    feed: Feed,
    options: LoopOptions,
    epochs: int,
    layer_loss: Callable[[int, Batch, torch.Generator], torch.Tensor],
) -> None:
    """Train one layer after the other for `epochs` each, with the layers before it fixed.

    Also trains the way back from each layer (`SdaeNet.parameters_of`). With `epochs` = 0 nothing is
    trained.

    Parameters
    ----------
    options : those of the training of all layers; `layer_options` adapts them to one layer
    layer_loss : called with k, batch and generator; returns how badly layer k rebuilds its clean
        input from a corrupted one, (B,)
    """
    for k in range(1, net.depth + 1) if epochs else ():
        if comm.rank == 0:
            comm.tell(f"layer {k} of {net.depth}")

        def loss(batch: Batch, generator: torch.Generator, done: float, k: int = k) -> torch.Tensor:
            return layer_loss(k, batch, generator)

        layer_parameters = nn.ParameterDict(net.parameters_of(k))
        train_network(comm, layer_parameters, loss, feed, layer_options(options, epochs, k))
    if epochs and comm.rank == 0:
        comm.tell("all layers")


def layer_options(options: LoopOptions, epochs: int, k: int) -> LoopOptions:
    """Return the options for pretraining layer k, with a checkpoint folder for this layer only."""
    folder = options.checkpoints
    return replace(
        options,
        epochs=epochs,
        patience=0,
        checkpoints=f"{folder}-layer-{k}" if folder else "",
        identity={**options.identity, "layer": k},
    )
