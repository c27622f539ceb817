"""SDAE: a stacked denoising autoencoder, trained layer by layer, then as a whole (Vincent et al.
2010).

Trained by Horovod ranks on Spark executors, from the files of one version of `training_bags`.
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
    check_catalogue,
    corrupted,
    entries,
    fit_network,
    log_shares,
    net_arrays,
    unit,
)
from recspark.models.setting_types import Epochs, LearningRate, ScoringHalfLifeDays
from recspark.nets.sdae import SdaeNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed
from recspark.train.loop import LoopOptions, Trained, load_weights, train
from recspark.train.losses import multinomial_nll

_COLUMNS = ("items", "weights")


class SdaeSettings(NeuralSettings):
    """Settings of `Sdae`."""

    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (200, 64),
        min_length=1,
        description="units of the layers from the items to the code. Guess: as multvae's",
    )
    corruption: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of a layer's inputs set to 0 (masking noise). Paper, section 4: 0.1 to 0.5; "
        "MovieLens 1M, validation part: .213 with .5, .178 without",
        json_schema_extra={"tune": {"low": 0.1, "high": 0.8}},
    )
    pretraining_epochs: int = Field(
        4, ge=0, description="passes over the training set for each layer. Guess"
    )
    half_life_days: ScoringHalfLifeDays = 30.0
    epochs: Epochs = Field(
        20,
        description="passes over the training set for the whole network",
    )
    learning_rate: LearningRate = 5e-3
    max_items: int = Field(
        100_000,
        ge=1,
        description="largest catalogue; a rank takes about 72 bytes an item and unit of layer 1",
    )


class Sdae(Algorithm[SdaeSettings]):
    """Rebuild a user's items from what corruption left of them.

    Layer k learns first to rebuild its clean input (the items; the layer before it) from a
    corrupted one, with the layers before it fixed; then all layers together rebuild the items. The
    items are rebuilt as a multinomial (as Mult-VAE does), hidden layers by their squared error.
    What corruption leaves is divided by its share, so that a layer sees in training what it will see
    at scoring, where nothing is corrupted. Layers are of tanh (see `SdaeNet`). The last bias starts
    at the items' log share of the training set. Source: Vincent et al. 2010, sections 3.2 and 3.5.
    """

    settings_class = SdaeSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> SdaeModel:
        """See `Algorithm.fit`. The driver holds items and weights, nothing of users."""
        settings, items = self.settings, data.vocabulary()
        size = 72 * settings.hidden_sizes[0]
        check_catalogue("sdae", items, settings.max_items, size, "als")
        trained = fit_network("sdae", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return SdaeModel(settings, data.cutoff, items, net_arrays(net))


class SdaeModel(AutoencoderModel):
    """The network's arrays; names as in `SdaeNet`."""

    @property
    def layers(self) -> Layers:
        """See `AutoencoderModel`."""
        assert isinstance(self.settings, SdaeSettings)
        return layers_of(len(self.settings.hidden_sizes))


def layers_of(depth: int) -> Layers:
    """Return the layers that lead to the items' product: all the way down and up again.

    >>> layers_of(2)
    (('items_in', 'tanh'), ('down_2', 'tanh'), ('up_2', 'tanh'))
    """
    down = [f"down_{k}" for k in range(2, depth + 1)]
    up = [f"up_{k}" for k in range(depth, 1, -1)]
    return tuple((name, "tanh") for name in ("items_in", *down, *up))


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank, layer by layer, then the whole; see `recspark.train.launch`."""
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
    """Return the network with the weights of `seed`."""
    return SdaeNet(n_items, settings.hidden_sizes, torch.Generator().manual_seed(seed))


def row_loss(
    net: SdaeNet,
    vocabulary: torch.Tensor,
    settings: SdaeSettings,
    batch: Batch,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the negative log likelihood of each row's items, (B,), through all layers.

    Without a `generator` nothing is corrupted.
    """
    rows, items, values = entries(batch, vocabulary)  # (P,) each
    n_rows = len(batch.weight)
    seen = _bag(rows, values, n_rows, settings, generator)  # (P,)
    code = net.encode(rows, items, seen, n_rows, net.depth)  # (B, HK)
    return multinomial_nll(net.logits(net.decode(code)), rows, items, values)  # (B,)


def pretraining_loss(
    net: SdaeNet,
    vocabulary: torch.Tensor,
    settings: SdaeSettings,
    k: int,
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return how badly layer k rebuilds its clean input from a corrupted one, of each row, (B,)."""
    rows, items, values = entries(batch, vocabulary)  # (P,) each
    n_rows = len(batch.weight)
    if k == 1:
        seen = _bag(rows, values, n_rows, settings, generator)  # (P,)
        hidden = net.first(rows, items, seen, n_rows)  # (B, H1)
        return multinomial_nll(net.logits(hidden), rows, items, values)  # (B,)
    with torch.no_grad():  # the layers before it stay as they are
        seen = _bag(rows, values, n_rows, settings, None)  # (P,)
        clean = net.encode(rows, items, seen, n_rows, k - 1)  # (B, Hk-1)
    rebuilt = net.up(net.down(corrupted(clean, settings.corruption, generator), k), k)  # (B, Hk-1)
    return ((rebuilt - clean) ** 2).sum(dim=1)  # (B,)


def _bag(
    rows: torch.Tensor,
    values: torch.Tensor,
    n_rows: int,
    settings: SdaeSettings,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the values of each row at length 1, then corrupted, (P,)."""
    return corrupted(unit(values, rows, n_rows), settings.corruption, generator)


def pretrain(
    comm: Comm,
    net: SdaeNet,
    feed: Feed,
    options: LoopOptions,
    epochs: int,
    layer_loss: Callable[[int, Batch, torch.Generator], torch.Tensor],
) -> None:
    """Train layer after layer, those before it fixed, `epochs` each; 0 = none.

    `layer_loss` : how badly layer k rebuilds its clean input from a corrupted one, (B,).
    """
    for k in range(1, net.depth + 1) if epochs else ():
        if comm.rank == 0:
            comm.tell(f"layer {k} of {net.depth}")

        def loss(batch: Batch, generator: torch.Generator, done: float, k: int = k) -> torch.Tensor:
            return layer_loss(k, batch, generator)

        part = nn.ParameterDict(net.parameters_of(k))
        train(comm, part, loss, feed, layer_options(options, epochs, k))
    if epochs and comm.rank == 0:
        comm.tell("all layers")


def layer_options(options: LoopOptions, epochs: int, k: int) -> LoopOptions:
    """Return the options of layer k's own training, with checkpoints of its own."""
    folder = options.checkpoints
    return replace(
        options,
        epochs=epochs,
        patience=0,
        checkpoints=f"{folder}-layer-{k}" if folder else "",
        identity={**options.identity, "layer": k},
    )
