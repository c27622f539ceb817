"""AutoRec: a user's row of values, or an item's, rebuilt through one layer (Sedhain et al. 2015).

Trained by Horovod ranks on Spark executors, from the files of one version of `training_bags`, or of
`training_item_bags`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from recspark.data.dataset import Dataset
from recspark.engines.als_objective import Objective
from recspark.errors import CatalogueTooLargeError
from recspark.models.autoencoders.autoencoder import AutoencoderModel, Layers
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.factors.factor_model import FactorScorer
from recspark.models.neural import (
    Job,
    NetworkTask,
    NeuralSettings,
    check_catalogue,
    corrupted,
    entries,
    fit_network,
    net_arrays,
    unit,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import Epochs, LearningRate, ScoringHalfLifeDays
from recspark.models.weights import HistoryWeights
from recspark.nets.autorec import AutoRecNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_weights
from recspark.train.losses import squared_over_all

_COLUMNS = ("items", "weights")
_LEAST_REG = 1e-6  # of a user's solve, where nothing decays


class AutoRecSettings(NeuralSettings):
    """Settings of `AutoRec`. "Bundled" = chosen on the bundled data at cutoff 2010-11-10."""

    by: Literal["user", "item"] = Field(
        "user",
        description="whose rows are rebuilt; item: ratings only, as in the paper's best row",
    )
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
    input_dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of a user's items hidden from the network in training; of ratings "
        "(unobserved 0) none is. Source: as multvae's; without it the network learns to repeat its "
        "input",
        json_schema_extra={"tune": {"low": 0.2, "high": 0.8}},
    )
    half_life_days: ScoringHalfLifeDays = 30.0
    epochs: Epochs = 20
    learning_rate: LearningRate = 5e-3
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="L2 on all parameters. Measured: MovieLens 1M, validation part",
        json_schema_extra={"tune": {"low": 1e-4, "high": 0.1, "log": True}},
    )
    max_items: int = Field(
        200_000,
        ge=1,
        description="largest catalogue; a rank takes 32 bytes an item and hidden unit",
    )
    max_users: int = Field(
        200_000,
        ge=1,
        description="by item: most users; a rank takes 32 bytes a user and hidden unit",
    )

    @model_validator(mode="after")
    def _items_rate(self) -> Self:
        if self.by == "item" and self.unobserved != 0:
            raise ValueError("by item rebuilds ratings only: set unobserved to 0, or by to user")
        return self

    @property
    def ratings(self) -> bool:
        """Whether only observed values count, as in the paper."""
        return self.unobserved == 0

    @property
    def activation(self) -> Literal["tanh", "sigmoid"]:
        """Of the hidden layer: the paper's sigmoid for ratings; see `AutoRec` for the rest."""
        return "sigmoid" if self.ratings else "tanh"


class AutoRec(Algorithm[AutoRecSettings]):
    """Minimise sum over observed (r - h(r))^2 + unobserved * sum over the rest h(r)^2, by user.

    h(r) = W g(V r + mu) + b, and r are the decayed weights of a user's items. Source: Sedhain et al.
    2015, equation 2; with `unobserved` = 0 it is theirs, g the sigmoid.

    Where the rest counts too, lists are what is wanted, and ratings are none: V then takes r at length
    1, a part of it hidden in training, and g is tanh, which is 0 where such a row leaves it. (A
    sigmoid stays near .5 there, the same for everyone.)

    By item (I-AutoRec), r are the users' ratings of an item, and user u's row of W and b says what u
    makes of an item's hidden units. Nothing of a user is kept: at scoring that row is solved for
    again, from the user's own ratings, by the same objective with the hidden units fixed
    (sum (r - w z)^2 + lambda |w|^2, z the hidden units and a 1), so new users have one too.
    """

    settings_class = AutoRecSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags" if self.settings.by == "user" else "training_item_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> AutoRecModel:
        """See `Algorithm.fit`. The driver holds items and weights, nothing of users."""
        settings, items = self.settings, data.vocabulary()
        check_catalogue("autorec", items, settings.max_items, 32 * settings.hidden_size, "als")
        if settings.by == "item":
            trained = fit_network("autorec", data, options, settings, items, train_items)
            assert trained.weights is not None
            return AutoRecModel(settings, data.cutoff, items, trained.weights)
        trained = fit_network("autorec", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return AutoRecModel(settings, data.cutoff, items, net_arrays(net))


class AutoRecModel(AutoencoderModel):
    """The network's arrays; names as in `AutoRecNet`.

    By item: `hidden` float32 (n_items, hidden_size + 1), the last column 1.
    """

    @property
    def unit(self) -> bool:
        """See `AutoencoderModel`."""
        assert isinstance(self.settings, AutoRecSettings)
        return not self.settings.ratings

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        settings = self.settings
        assert isinstance(settings, AutoRecSettings)
        if settings.by == "user":
            return super().scorer()
        # The loop's mean over items plus weight_decay / 2 |w|^2, times the items.
        reg = max(settings.weight_decay * len(self.items) / 2, _LEAST_REG)
        objective = Objective(reg, reg_exponent=0.0, feedback="explicit")
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days, ratings=True)
        return FactorScorer(weights, self.items, topk.Shared(self._arrays["hidden"]), objective)

    @property
    def weights(self) -> HistoryWeights:
        """See `AutoencoderModel`: where only what was observed counts, ratings of any sign."""
        settings = self.settings
        assert isinstance(settings, AutoRecSettings)
        ratings = settings.unobserved == 0
        return HistoryWeights.sums(self.cutoff, settings.half_life_days, ratings=ratings)

    @property
    def rates(self) -> bool:
        """See `RetrieverModel`: where only what was observed counts."""
        assert isinstance(self.settings, AutoRecSettings)
        return self.settings.ratings and self.settings.half_life_days is None

    @property
    def layers(self) -> Layers:
        """See `AutoencoderModel`."""
        assert isinstance(self.settings, AutoRecSettings)
        return layers_of(self.settings)


def layers_of(settings: AutoRecSettings) -> Layers:
    """Return the layer that leads to the items' product."""
    return (("items_in", settings.activation),)


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    task = NetworkTask(comm, job, _COLUMNS)
    net = make_net(task.settings, task.n_items, task.seed)
    value = partial(row_loss, net, task.vocabulary, task.settings)

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return value(batch, generator)

    return task.train(net, loss, value)


def train_items(comm: Comm, job: Job) -> Trained:
    """Train by item on one rank; rank 0 returns the hidden units of all items, and no weights."""
    settings: AutoRecSettings = job.settings
    columns = ("item_idx", "users", "weights")
    task = NetworkTask(comm, job, columns)
    own = torch.empty(0, dtype=torch.int64)
    for batch in task.batches():
        acted = batch.tensors["users"][batch.tensors["users"] >= 0]
        own = torch.unique(torch.cat([own, acted.long()]))  # so far: never more than a batch above
    users = torch.unique(comm.allgather(own))  # (n_users,), on every rank
    if len(users) > settings.max_users:
        raise CatalogueTooLargeError(
            f"autorec: {len(users):,} users, max_users is {settings.max_users:,}; raise "
            f"models.autorec.max_users if the ranks have "
            f"{32e-9 * settings.hidden_size * len(users):,.1f} GB each, or set by: user"
        )
    net = make_net(settings, len(users), task.seed)

    def value(batch: Batch) -> torch.Tensor:
        return row_loss(net, users, settings, of_users(batch))

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return value(batch)

    trained = task.train(net, loss, value)
    net.to("cpu")  # every rank reads its rows there
    if comm.rank == 0:
        load_weights(net, trained)
    for parameter in net.parameters():
        parameter.data = comm.broadcast(parameter.data)
    items = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    hidden = torch.sigmoid(net.items_in_bias.detach()).repeat(len(items), 1)  # (n_items, H)
    with torch.no_grad():
        parts = [encoded(net, users, batch) for batch in task.batches()]
    found = comm.allgather(torch.cat([item for item, _ in parts]))  # (u,)
    hidden[torch.searchsorted(items, found)] = comm.allgather(torch.cat([h for _, h in parts]))
    whole = torch.cat([hidden, torch.ones(len(items), 1)], dim=1)  # (n_items, H + 1)
    return replace(trained, place="", weights={"hidden": whole.numpy()} if comm.rank == 0 else None)


def encoded(
    net: AutoRecNet, users: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the items of a batch that count, int64 (B',), and their hidden units (B', H)."""
    counted = batch.weight > 0  # (B,)
    rows, user, values = entries(of_users(batch), users, ratings=True)  # (P,) each
    hidden = net(rows, user, values, len(batch.weight))  # (B, H)
    return batch.tensors["item_idx"][counted].long(), hidden[counted]


def of_users(batch: Batch) -> Batch:
    """Return `batch` with users where `entries` looks for items."""
    return Batch(
        {"items": batch.tensors["users"], "weights": batch.tensors["weights"]}, batch.weight
    )


def make_net(settings: AutoRecSettings, n_items: int, seed: int) -> AutoRecNet:
    """Return the network with the weights of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return AutoRecNet(n_items, settings.hidden_size, generator, settings.activation)


def row_loss(
    net: AutoRecNet,
    vocabulary: torch.Tensor,
    settings: AutoRecSettings,
    batch: Batch,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return the squared error of each row, (B,). Without a `generator` nothing is hidden."""
    rows, items, values = entries(batch, vocabulary, ratings=settings.ratings)  # (P,) each
    seen = values  # (P,)
    if not settings.ratings:
        seen = corrupted(unit(values, rows, len(batch.weight)), settings.input_dropout, generator)
    hidden = net(rows, items, seen, len(batch.weight))  # (B, H)
    rebuilt = net.rebuilt(hidden, rows, items)  # (P,)
    return squared_over_all(
        hidden, net.items_out, net.items_out_bias, rebuilt, values, rows, settings.unobserved
    )  # (B,)
