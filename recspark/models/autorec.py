"""AutoRec: a user's row of values rebuilt through one layer (Sedhain et al. 2015).

Trained by Horovod ranks on Spark executors, from the files of one version of `training_bags`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from pydantic import Field

from recspark.data.dataset import Dataset
from recspark.models.base import FitOptions, Recommender
from recspark.models.encoder import EncoderModel, Layers
from recspark.models.neural import (
    Job,
    NeuralSettings,
    check_catalogue,
    entries,
    fit_network,
    net_arrays,
)
from recspark.nets.autorec import AutoRecNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, Validation, load_weights, train
from recspark.train.losses import squared_over_all

LAYERS: Layers = (("items_in", "sigmoid"),)
_COLUMNS = ("items", "weights")


class AutoRecSettings(NeuralSettings):
    """Settings of `AutoRec`. "Bundled" = chosen on the bundled data at cutoff 2010-11-10."""

    hidden_size: int = Field(
        200,
        ge=1,
        description="units of the hidden layer. Paper: 500",
        json_schema_extra={"tune": {"choices": [50, 100, 200, 500]}},
    )
    unobserved: float = Field(
        0.05,
        ge=0,
        description="weight of items without an event, whose value is 0. Paper: 0, for ratings; "
        "where all values are events, 0 would learn that everything is liked",
        json_schema_extra={"tune": {"low": 0.003, "high": 0.5, "log": True}},
    )
    half_life_days: float | None = Field(
        30.0,
        gt=0,
        description="days; at scoring an event this old counts half; null = no decay",
        json_schema_extra={"tune": {"low": 10, "high": 200, "log": True}},
    )
    epochs: int = Field(
        20,
        ge=1,
        description="passes over the training set",
        json_schema_extra={"tune": {"choices": [10, 20, 40]}},
    )
    learning_rate: float = Field(
        5e-3,
        gt=0,
        description="of Adam at the first step, falling linearly to 0",
        json_schema_extra={"tune": {"low": 1e-3, "high": 2e-2, "log": True}},
    )
    max_items: int = Field(
        200_000,
        ge=1,
        description="largest catalogue; a rank takes 32 bytes an item and hidden unit",
    )


class AutoRec(Recommender[AutoRecSettings]):
    """Minimise sum over observed (r - h(r))^2 + unobserved * sum over the rest h(r)^2, by user.

    h(r) = W sigmoid(V r + mu) + b, and r are the decayed weights of a user's items. Source: Sedhain
    et al. 2015, equation 2; with `unobserved` = 0 it is theirs.
    """

    settings_class = AutoRecSettings

    @property
    def training_table(self) -> str:
        """See `Recommender`."""
        return "training_bags"

    def fit(self, data: Dataset, options: FitOptions) -> AutoRecModel:
        """See `Recommender.fit`. The driver holds items and weights, nothing of users."""
        settings, items = self.settings, data.vocabulary()
        check_catalogue("autorec", items, settings.max_items, 32 * settings.hidden_size, "als")
        trained = fit_network("autorec", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return AutoRecModel(settings, data.cutoff, items, net_arrays(net))


class AutoRecModel(EncoderModel):
    """The network's arrays; names as in `AutoRecNet`."""

    unit = False

    @property
    def layers(self) -> Layers:
        """See `EncoderModel`."""
        return LAYERS


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    settings: AutoRecSettings = job.settings
    feed, held_out = job.feed(comm, _COLUMNS), job.validation_feed(comm, _COLUMNS)
    net = make_net(settings, len(job.items), job.loop.seed)
    vocabulary = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    value = partial(row_loss, net, vocabulary, settings.unobserved)

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return value(batch)

    validation = None if held_out is None else Validation(held_out, value)
    return train(comm, net, loss, feed, job.loop, validation)


def make_net(settings: AutoRecSettings, n_items: int, seed: int) -> AutoRecNet:
    """Return the network with the weights of `seed`."""
    return AutoRecNet(n_items, settings.hidden_size, torch.Generator().manual_seed(seed))


def row_loss(
    net: AutoRecNet, vocabulary: torch.Tensor, unobserved: float, batch: Batch
) -> torch.Tensor:
    """Return the squared error of each row, (B,)."""
    rows, items, values = entries(batch, vocabulary)  # (P,) each
    hidden = net(rows, items, values, len(batch.weight))  # (B, H)
    rebuilt = net.rebuilt(hidden, rows, items)  # (P,)
    return squared_over_all(
        hidden, net.items_out, net.items_out_bias, rebuilt, values, rows, unobserved
    )  # (B,)
