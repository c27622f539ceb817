"""AutoRec: rebuild a user's row of values, or an item's, through one hidden layer.

Source: Sedhain et al. 2015. The network is trained by Horovod ranks on Spark executors. They read
the files of one version of `training_bags` (a row per user) or `training_item_bags` (a row per
item).
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
    check_catalogue_size,
    corrupted,
    entries,
    fit_network,
    net_arrays,
    scaled_to_unit_length,
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
_LEAST_REG = 1e-6  # smallest reg of the solve for a user's row, used where weight_decay is 0


class AutoRecSettings(NeuralSettings):
    """Settings of `AutoRec`. "Bundled" = chosen on the bundled data at cutoff 2010-11-10."""

    by: Literal["user", "item"] = Field(
        "user",
        description="whose rows are rebuilt. item is for ratings only (unobserved = 0). Paper: "
        "item gives its best result",
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
        description="weight, in the loss, of the items without an event; their value is 0. Paper, "
        "for ratings: 0. Where all values come from events, 0 would teach that everyone likes "
        "everything",
        json_schema_extra={"tune": {"low": 0.003, "high": 0.5, "log": True}},
    )
    input_dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of a user's items that is hidden from the network in training; without "
        "it the network learns to repeat its input. Ratings (unobserved = 0) are never hidden. "
        "Source: as in multvae",
        json_schema_extra={"tune": {"low": 0.2, "high": 0.8}},
    )
    half_life_days: ScoringHalfLifeDays = 30.0
    epochs: Epochs = 20
    learning_rate: LearningRate = 5e-3
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="L2 penalty on all parameters. Measured on the validation part of MovieLens 1M",
        json_schema_extra={"tune": {"low": 1e-4, "high": 0.1, "log": True}},
    )
    max_items: int = Field(
        200_000,
        ge=1,
        description="largest catalogue, in items; a rank takes 32 bytes per item and hidden unit",
    )
    max_users: int = Field(
        200_000,
        ge=1,
        description="by = item: most users; a rank takes 32 bytes per user and hidden unit",
    )

    @model_validator(mode="after")
    def _check_items_have_ratings(self) -> Self:
        if self.by == "item" and self.unobserved != 0:
            raise ValueError("by item rebuilds ratings only: set unobserved to 0, or by to user")
        return self

    @property
    def ratings(self) -> bool:
        """Whether the values are ratings: then only observed values count, as in the paper."""
        return self.unobserved == 0

    @property
    def activation(self) -> Literal["tanh", "sigmoid"]:
        """Activation of the hidden layer: sigmoid for ratings (as the paper), else tanh."""
        return "sigmoid" if self.ratings else "tanh"


class AutoRec(Algorithm[AutoRecSettings]):
    """An autoencoder with one hidden layer, of the rows of users or of the rows of items.

    By user, training minimises, summed over users,

        sum over observed items (r - h(r))^2 + unobserved * sum over all other items h(r)^2

    with h(r) = W g(V r + mu) + b. Here r are the decayed weights of a user's items, and g is the
    activation of the hidden layer. Source: Sedhain et al. 2015, equation 2. With `unobserved` = 0
    and g = sigmoid the objective is the paper's.

    With `unobserved` above 0 the model makes lists and predicts no ratings. The input V r then
    takes r scaled to length 1, in training with a share of its items hidden, and g is tanh. The
    input of the hidden layer is small for a row of length 1: tanh is about 0 there, whereas a
    sigmoid would stay near 0.5, the same for every user.

    By item (I-AutoRec), r are the ratings that users gave to one item. User u's row of W, with u's
    entry of b, then maps the hidden units of an item to u's rating of the item. The model saves
    nothing of a user. At scoring it solves for the user's row w again, from the user's ratings and
    by the same objective with the hidden units fixed: sum (r - w z)^2 + lambda |w|^2, where z are
    an item's hidden units followed by a 1. So new users have a row too.
    """

    settings_class = AutoRecSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags" if self.settings.by == "user" else "training_item_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> AutoRecModel:
        """See `Algorithm.fit`. The driver holds the vocabulary and weights, nothing per user."""
        settings, items = self.settings, data.vocabulary()
        check_catalogue_size("autorec", items, settings.max_items, 32 * settings.hidden_size, "als")
        if settings.by == "item":
            trained = fit_network("autorec", data, options, settings, items, train_items)
            assert trained.weights is not None
            return AutoRecModel(settings, data.cutoff, items, trained.weights)
        trained = fit_network("autorec", data, options, settings, items, train_rank)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return AutoRecModel(settings, data.cutoff, items, net_arrays(net))


class AutoRecModel(AutoencoderModel):
    """A trained `AutoRec`. By user, the arrays are the network's, named as in `AutoRecNet`.

    By item, the only array is `hidden`, float32 (n_items, hidden_size + 1): the hidden units of
    each item, and a last column of 1.
    """

    @property
    def unit(self) -> bool:
        """See `AutoencoderModel`. Ratings are not scaled."""
        assert isinstance(self.settings, AutoRecSettings)
        return not self.settings.ratings

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        settings = self.settings
        assert isinstance(settings, AutoRecSettings)
        if settings.by == "user":
            return super().scorer()
        # The training loop minimises the mean loss of an item plus weight_decay / 2 |w|^2. Fold-in
        # minimises the sum over items, so the penalty is multiplied by the number of items.
        reg = max(settings.weight_decay * len(self.items) / 2, _LEAST_REG)
        objective = Objective(reg, reg_exponent=0.0, feedback="explicit")
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days, ratings=True)
        return FactorScorer(weights, self.items, topk.Shared(self._arrays["hidden"]), objective)

    @property
    def weights(self) -> HistoryWeights:
        """See `AutoencoderModel`. Ratings count whatever their sign, other weights if above 0."""
        settings = self.settings
        assert isinstance(settings, AutoRecSettings)
        ratings = settings.unobserved == 0
        return HistoryWeights.sums(self.cutoff, settings.half_life_days, ratings=ratings)

    @property
    def rates(self) -> bool:
        """See `RetrieverModel`. True if the model is fitted on ratings, and they do not decay."""
        assert isinstance(self.settings, AutoRecSettings)
        return self.settings.ratings and self.settings.half_life_days is None

    @property
    def layers(self) -> Layers:
        """See `AutoencoderModel`."""
        assert isinstance(self.settings, AutoRecSettings)
        return layers_of(self.settings)


def layers_of(settings: AutoRecSettings) -> Layers:
    """Return the one layer before the last; see `autoencoder.Layers`."""
    return (("items_in", settings.activation),)


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train by user on one rank; see `recspark.train.launch`."""
    task = NetworkTask(comm, job, _COLUMNS)
    net = make_net(task.settings, task.n_items, task.seed)
    loss_of_rows = partial(row_loss, net, task.vocabulary, task.settings)

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return loss_of_rows(batch, generator)

    # On validation rows `loss_of_rows` is called without a generator: nothing is hidden.
    return task.train(net, loss, loss_of_rows)


def train_items(comm: Comm, job: Job) -> Trained:
    """Train by item on one rank. Rank 0 returns the hidden units of all items as the only array.

    The network's rows are items and its columns are users. Only users with an event in the training
    set have a column. An item without a row in the training set gets the hidden units of an empty
    row. Raises CatalogueTooLargeError above `max_users`.
    """
    settings: AutoRecSettings = job.settings
    columns = ("item_idx", "users", "weights")
    task = NetworkTask(comm, job, columns)
    users_of_this_rank = torch.empty(0, dtype=torch.int64)
    for batch in task.batches():
        users_of_batch = batch.tensors["users"][batch.tensors["users"] >= 0]
        # Made distinct after every batch: memory never holds more than one batch of repeats.
        users_of_this_rank = torch.unique(torch.cat([users_of_this_rank, users_of_batch.long()]))
    users = torch.unique(comm.allgather(users_of_this_rank))  # (n_users,), equal on every rank
    if len(users) > settings.max_users:
        raise CatalogueTooLargeError(
            f"autorec: {len(users):,} users, max_users is {settings.max_users:,}; raise "
            f"models.autorec.max_users if the ranks have "
            f"{32e-9 * settings.hidden_size * len(users):,.1f} GB each, or set by: user"
        )
    net = make_net(settings, len(users), task.seed)

    def loss_of_rows(batch: Batch) -> torch.Tensor:
        return row_loss(net, users, settings, of_users(batch))

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return loss_of_rows(batch)

    trained = task.train(net, loss, loss_of_rows)
    net.to("cpu")  # below, every rank encodes the items of its rows on the CPU
    if comm.rank == 0:
        load_weights(net, trained)
    for parameter in net.parameters():
        parameter.data = comm.broadcast(parameter.data)
    items = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    # The hidden units of an empty row, for all items; then those of the items that have a row.
    hidden = torch.sigmoid(net.items_in_bias.detach()).repeat(len(items), 1)  # (n_items, H)
    with torch.no_grad():
        encoded_batches = [encoded(net, users, batch) for batch in task.batches()]
    item_idx = comm.allgather(
        torch.cat([items_of_batch for items_of_batch, _ in encoded_batches])
    )  # (R,), of the rows of all ranks
    hidden[torch.searchsorted(items, item_idx)] = comm.allgather(
        torch.cat([hidden_of_batch for _, hidden_of_batch in encoded_batches])
    )  # (R, H) on the right
    hidden_and_1 = torch.cat([hidden, torch.ones(len(items), 1)], dim=1)  # (n_items, H + 1)
    return replace(
        trained,
        checkpoint_uri="",
        weights={"hidden": hidden_and_1.numpy()} if comm.rank == 0 else None,
    )


def encoded(
    net: AutoRecNet, users: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return item_idx, int64 (B',), and hidden units (B', H) of the items of a batch.

    Rows of weight 0 (they only fill the batch) are left out. `users` int64 (n_users,) ascending:
    the user_idx of each column of the network.
    """
    has_weight = batch.weight > 0  # (B,)
    rows, columns, values = entries(of_users(batch), users, ratings=True)  # (P,) each
    hidden = net(rows, columns, values, len(batch.weight))  # (B, H)
    return batch.tensors["item_idx"][has_weight].long(), hidden[has_weight]


def of_users(batch: Batch) -> Batch:
    """Return `batch` with its users in the column `items`, the one that `entries` reads."""
    return Batch(
        {"items": batch.tensors["users"], "weights": batch.tensors["weights"]}, batch.weight
    )


def make_net(settings: AutoRecSettings, n_items: int, seed: int) -> AutoRecNet:
    """Return the network with first weights drawn from `seed`. By item, `n_items` counts users."""
    generator = torch.Generator().manual_seed(seed)
    return AutoRecNet(n_items, settings.hidden_size, generator, settings.activation)


def row_loss(
    net: AutoRecNet,
    vocabulary: torch.Tensor,
    settings: AutoRecSettings,
    batch: Batch,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return the loss of each row, (B,): see `AutoRec` for the objective.

    `vocabulary` int64 (n_items,) ascending: the item_idx of each column of the network (by item:
    the user_idx). Without a `generator` no item is hidden from the network.
    """
    rows, items, values = entries(batch, vocabulary, ratings=settings.ratings)  # (P,) each
    inputs = values  # (P,)
    if not settings.ratings:
        inputs = corrupted(
            scaled_to_unit_length(values, rows, len(batch.weight)),
            settings.input_dropout,
            generator,
        )
    hidden = net(rows, items, inputs, len(batch.weight))  # (B, H)
    rebuilt = net.rebuilt(hidden, rows, items)  # (P,)
    return squared_over_all(
        hidden, net.items_out, net.items_out_bias, rebuilt, values, rows, settings.unobserved
    )  # (B,)
