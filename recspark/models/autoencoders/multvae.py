"""Mult-VAE: a variational autoencoder of a user's items with a multinomial likelihood.

A user's taste is a latent vector, from which all of the user's items are rebuilt. Source: Liang et
al. 2018. The network is trained by Horovod ranks on Spark executors, from the files of one version
of `training_bags`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.models.autoencoders.autoencoder import AutoencoderModel, Layers
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.neural import (
    Job,
    NetworkTask,
    NeuralSettings,
    check_catalogue_size,
    entries,
    fit_network,
    log_shares,
    net_arrays,
)
from recspark.models.setting_types import LearningRate, ScoringHalfLifeDays
from recspark.nets.multvae import MultVaeNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_weights
from recspark.train.losses import kl_to_standard_normal, multinomial_nll

# From the bag of items to the user's vector; see `autoencoder.Layers`.
LAYERS: Layers = (("items_in", "tanh"), ("to_latent", "identity"), ("from_latent", "tanh"))
_COLUMNS = ("items", "weights")


class MultVaeSettings(NeuralSettings):
    """Settings of `MultVae`. "Bundled" = chosen on the bundled data at cutoff 2010-11-10."""

    hidden_size: int = Field(
        200,
        ge=1,
        description="units of the hidden layer before the latent layer, and of the one after it. "
        "Paper: 600; bundled: 200",
        json_schema_extra={"tune": {"choices": [100, 200, 400, 600]}},
    )
    latent_size: int = Field(
        64,
        ge=1,
        description="length of the latent vector. Paper: 200; bundled: 64",
        json_schema_extra={"tune": {"choices": [32, 64, 128, 200]}},
    )
    dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of a user's items that is hidden from the encoder in training. Paper, "
        "section 3.3",
        json_schema_extra={"tune": {"low": 0.2, "high": 0.8}},
    )
    beta: float = Field(
        0.2,
        ge=0,
        description="weight of the KL term once it is fully grown. Paper, section 2.2.2: 0.2",
        json_schema_extra={"tune": {"low": 0.02, "high": 1.0, "log": True}},
    )
    anneal: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the training during which the weight of the KL term grows from 0 to "
        "beta. Paper: most of the training; the figure is a guess",
    )
    input_weights: Literal["binary", "weights"] = Field(
        "binary",
        description="what the encoder reads in training: 1 per item, or the weights of the "
        "training set. The weights are rebuilt in both cases. Bundled: binary",
    )
    half_life_days: ScoringHalfLifeDays = Field(
        30.0,
        description="days; at scoring an event this old counts half; null = no decay. Bundled",
    )
    epochs: int = Field(
        12,
        ge=1,
        description="passes over the training set. Bundled",
        json_schema_extra={"tune": {"choices": [6, 12, 24]}},
    )
    batch_size: int = Field(
        256, ge=1, description="users per step, all ranks together; the ranks share them. Bundled"
    )
    learning_rate: LearningRate = Field(
        5e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Bundled",
    )
    max_items: int = Field(
        100_000,
        ge=1,
        description="largest catalogue, in items; a rank takes about 72 bytes per item and hidden "
        "unit (1.4 GB for 100,000 items and 200 units). Guess: what an executor of 4 GB leaves to "
        "Python",
    )


class MultVae(Algorithm[MultVaeSettings]):
    """Maximise E[log p(x | z)] - beta KL(q(z | x) || N(0, I)), summed over users.

    x are the weights of a user's items, z is the user's latent vector, q the encoder, and p is
    multinomial over all items. Source: Liang et al. 2018, equations 1 to 7.

    The bias of the last layer starts at the log of each item's share of the training set. Otherwise
    the first epochs would only learn these shares.
    """

    settings_class = MultVaeSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> MultVaeModel:
        """See `Algorithm.fit`. The driver holds the vocabulary and weights, nothing per user."""
        settings = self.settings
        items = data.vocabulary()
        check_catalogue_size("multvae", items, settings.max_items, 72 * settings.hidden_size, "als")
        trained = fit_network("multvae", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return MultVaeModel(settings, data.cutoff, items, scoring_arrays(net))


class MultVaeModel(AutoencoderModel):
    """A trained `MultVae`: the arrays that scoring needs, named as in `MultVaeNet`."""

    @property
    def layers(self) -> Layers:
        """See `AutoencoderModel`."""
        return LAYERS


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    task = NetworkTask(comm, job, _COLUMNS)
    net = make_net(task.settings, task.n_items, task.seed)
    net.items_out_bias.data = log_shares(comm, task.feed.epoch(0), task.vocabulary)
    return task.train(net, partial(row_loss, net, task.vocabulary, task.settings))


def make_net(settings: MultVaeSettings, n_items: int, seed: int) -> MultVaeNet:
    """Return the network with first weights drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return MultVaeNet(n_items, settings.hidden_size, settings.latent_size, generator)


def row_loss(
    net: MultVaeNet,
    vocabulary: torch.Tensor,
    settings: MultVaeSettings,
    batch: Batch,
    generator: torch.Generator | None,
    done: float,
) -> torch.Tensor:
    """Return the loss of each row, (B,): the negative ELBO with the KL term weighted by beta.

    Parameters
    ----------
    vocabulary : int64 (n_items,) ascending, the item_idx of each local item
    generator : draws dropout and the latent vector; None = nothing is dropped, and the latent
        vector is its mean
    done : share of the training that is over, in [0, 1]; beta grows with it until `settings.anneal`
    """
    rows, items, targets = entries(batch, vocabulary)  # (P,) each
    inputs = torch.ones_like(targets) if settings.input_weights == "binary" else targets  # (P,)
    logits, mean, log_variance = net(
        rows, items, inputs, len(batch.weight), settings.dropout, generator
    )  # (B, n_items), (B, Z), (B, Z)
    beta = settings.beta * min(1.0, done / settings.anneal)
    return multinomial_nll(logits, rows, items, targets) + beta * kl_to_standard_normal(
        mean, log_variance
    )  # (B,)


def scoring_arrays(net: MultVaeNet) -> dict[str, Array]:
    """Return the arrays that scoring needs, by name.

    The network computes mean and log variance of the latent vector side by side. Scoring uses the
    mean only, so the second half of `to_latent` and of its bias is left out.
    """
    arrays = net_arrays(net)
    latent_size = arrays["from_latent"].shape[0]
    arrays["to_latent"] = arrays["to_latent"][:, :latent_size].copy()
    arrays["to_latent_bias"] = arrays["to_latent_bias"][:latent_size].copy()
    return arrays
