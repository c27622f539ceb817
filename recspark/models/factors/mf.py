"""Matrix factorisation as a network: two embedding tables and a dot product, with sampled losses.

The network is trained by Horovod ranks on Spark executors, from the files of one version of
`training_bags`. The user vectors of the training are dropped: they never leave the executors. At
scoring, every user is folded in by the loss of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from recspark.data.blocks import Array, QueryBlock
from recspark.data.dataset import Dataset
from recspark.engines.als_objective import Objective
from recspark.errors import CatalogueTooLargeError
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed
from recspark.models.factors.factor_model import FactorScorer
from recspark.models.factors.fold_in import MAX_DRAWN, Folding, Kind
from recspark.models.neural import (
    Job,
    NetworkTask,
    NeuralSettings,
    entries,
    fit_network,
    log_shares,
    with_the_same_draws,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import Epochs, LearningRate, ScoringHalfLifeDays, VectorSize
from recspark.models.weights import HistoryWeights
from recspark.nets.mf import MfNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_table
from recspark.train.losses import bpr, multinomial_nll, shared_softmax_nll

_COLUMNS = ("user_idx", "items", "weights")
_TABLES = ("items", "items_bias", "items_share")  # the weights that the ranks return to the driver
_LEAST_REG = 1e-6  # smallest reg of the solve for a user's vector, used where weight_decay is 0


class MfSettings(NeuralSettings):
    """Settings of `Mf`."""

    embedding_size: VectorSize = 64
    loss: Literal["softmax", "bpr", "squared", "rating"] = Field(
        "softmax",
        description="softmax = sampled softmax with logQ correction; bpr = BPR; squared = squared "
        "error, with a target of 1 for events and of 0 for drawn items; rating = squared error "
        "with the weights as targets, without drawn items (Koren et al. 2009)",
        json_schema_extra={"tune": {"choices": ["softmax", "bpr", "squared"]}},
    )
    n_negatives: int = Field(
        5000,
        ge=1,
        description="items drawn for each step, shared by its rows. If the catalogue has no more "
        f"items than this, softmax takes each of them once. bpr, which has a term for each pair of "
        f"an event and a drawn item, takes at most {MAX_DRAWN}. Guess: the product with them takes "
        "less time than reading the rows",
    )
    sampling_exponent: float = Field(
        0.75,
        ge=0,
        description="items are drawn in proportion to their popularity, raised to this power. "
        "Mikolov et al. 2013",
    )
    half_life_days: ScoringHalfLifeDays = 30.0
    epochs: Epochs = 20
    learning_rate: LearningRate = Field(
        3e-2,
        description="learning rate of Adam at the first step; it falls linearly to 0. A user's "
        "vector moves only once per epoch. Validation part of MovieLens 1M: .206 with .01, .215 "
        "with .03",
        json_schema_extra={"tune": {"low": 1e-2, "high": 1e-1, "log": True}},
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="L2 penalty on the vectors that a step reads. Times batch_size, it is the "
        "penalty on a user's vector, in training and at scoring",
        json_schema_extra={"tune": {"low": 1e-3, "high": 0.2, "log": True}},
    )
    max_users: int = Field(
        20_000_000,
        ge=1,
        description="most users of the training set; a rank takes 12 bytes per user and dimension "
        "(15 GB with embedding_size 64)",
    )

    @property
    def user_reg(self) -> float:
        """The reg of a user's vector u: training adds user_reg / 2 |u|^2 to the loss of the user.

        It is weight_decay times batch_size, as a step minimises the mean loss of its rows.
        """
        return self.weight_decay * self.batch_size


class Mf(Algorithm[MfSettings]):
    """Minimise the loss of every user's items, times their decayed weights, against drawn items.

    A score is a dot product, plus the item's bias with the losses that rank items (softmax and
    bpr). Users are folded in by the objective of the training. With loss `rating`, which predicts
    the weights themselves, that is least squares.

    Source: Koren, Bell, Volinsky 2009; BPR: Rendle et al. 2009; sampled softmax: Jean et al. 2015.
    """

    settings_class = MfSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> MfModel:
        """See `Algorithm.fit`. The driver holds data per item, none per user.

        Raises CatalogueTooLargeError if the training set has more than `max_users` users.
        """
        settings, items = self.settings, data.vocabulary()
        n_users = data.training_set("training_bags").n_rows
        if n_users > settings.max_users:
            raise CatalogueTooLargeError(
                f"mf: {n_users:,} users in the training set, max_users is {settings.max_users:,}; "
                f"raise models.mf.max_users if the ranks have "
                f"{12e-9 * n_users * settings.embedding_size:,.1f} GB each, or use als"
            )
        trained = fit_network("mf", data, options, settings, items, train_rank)
        return MfModel(settings, data.cutoff, items, scoring_arrays(trained, settings))


class MfModel(ArraysModel):
    """Fitted item vectors, and the arrays that fold-in needs. Scores can be ratings: see `rates`.

    `factors` float32 (n_items, embedding_size): the item vectors. `bias` float32 (n_items,): the
    bias in an item's score. `drawn` float32 (n_items,): the probability that training draws the
    item.
    """

    settings: MfSettings
    vectors_array = "factors"

    @property
    def rates(self) -> bool:
        """See `RetrieverModel`. True if weights themselves are fitted, and they do not decay."""
        return self.settings.loss == "rating" and self.settings.half_life_days is None

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        settings = self.settings
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days)
        shared = self.shared_arrays()
        if settings.loss == "rating":
            # A user's loss is the sum of squared errors plus user_reg / 2 |u|^2. `Objective` adds
            # reg |u|^2.
            reg = max(settings.user_reg / 2, _LEAST_REG)
            objective = Objective(reg, reg_exponent=0.0, feedback="explicit")
            return FactorScorer(weights, self.items, shared["factors"], objective)
        return MfScorer(weights, self.items, shared, settings.loss, settings.user_reg)


@dataclass(frozen=True)
class MfScorer:
    """Folds in the users of a block by the loss of the training, and multiplies with the items."""

    weights: HistoryWeights
    items: Array
    arrays: dict[str, topk.Shared]
    loss: Kind
    reg: float

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user none of whose items is in the vocabulary gets no list."""
        start, items, weights = self.weights.local(block.history, self.items)
        users = self._folding(start, items, weights)
        factors, bias = (np.asarray(self.arrays[name].array) for name in ("factors", "bias"))
        return topk.DotScores(users, factors, bias, np.diff(start) > 0)

    @cached_property
    def _folding(self) -> Folding:
        """The prepared fold-in; each worker prepares it once."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        return Folding(self.loss, arrays["factors"], arrays["bias"], arrays["drawn"], self.reg)


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. The user vectors are not returned."""
    task = NetworkTask(comm, job, _COLUMNS)
    users_of_this_rank = [batch.tensors["user_idx"][batch.weight > 0] for batch in task.batches()]
    # (n_users,), ascending, equal on every rank.
    users = torch.unique(comm.allgather(torch.cat(users_of_this_rank)))
    log_share = log_shares(comm, task.feed.epoch(0), task.vocabulary)  # (n_items,)
    net = make_net(task.settings, len(users), task.n_items, task.seed)
    net.items_share.data = log_share[:, None]
    loss = partial(row_loss, net, users, task.vocabulary, task.settings)
    trained = task.train(net, loss, with_the_same_draws(loss))
    if trained.weights is None:
        return trained
    return replace(trained, weights={name: trained.weights[name] for name in _TABLES})


def log_drawn(log_share: torch.Tensor, settings: MfSettings) -> torch.Tensor:
    """Return the log probability of drawing each item, (n_items,).

    `log_share` (n_items,) : the log of each item's share of all weights; see `neural.log_shares`.
    """
    return torch.log_softmax(settings.sampling_exponent * log_share, dim=0)


def scoring_arrays(trained: Trained, settings: MfSettings) -> dict[str, Array]:
    """Return the arrays of `MfModel`, by name."""
    items, bias, log_share = (load_table(trained, name) for name in _TABLES)
    drawn = log_drawn(torch.from_numpy(log_share[:, 0]), settings).exp()  # (n_items,)
    return {"factors": items, "bias": (bias + log_share)[:, 0], "drawn": drawn.numpy()}


def make_net(settings: MfSettings, n_users: int, n_items: int, seed: int) -> MfNet:
    """Return the network, with first weights drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return MfNet(n_users, n_items, settings.embedding_size, generator)


def row_loss(
    net: MfNet,
    users: torch.Tensor,
    vocabulary: torch.Tensor,
    settings: MfSettings,
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the loss of each row (user), (B,): the sum of the weighted losses of its items.

    `users` int64 (n_users,) ascending: the user_idx of each row of the users' table. `vocabulary`
    int64 (n_items,): the item_idx of each item. In the shapes below, P is the number of items of
    all rows, and N the number of drawn items; all rows of the batch share the drawn items. `done`
    is not used.
    """
    rows, items, weights = entries(batch, vocabulary, ratings=settings.loss == "rating")  # (P,)
    device = weights.device
    user_idx = users.to(device)  # (n_users,)
    user_row = torch.searchsorted(user_idx, batch.tensors["user_idx"])  # (B,)
    user_row = user_row.clamp_max(len(user_idx) - 1)
    user_vectors = net.user(user_row)  # (B, D)
    if settings.loss == "softmax" and settings.n_negatives >= len(vocabulary):
        all_items = torch.arange(len(vocabulary), device=device)  # (n_items,)
        return multinomial_nll(
            user_vectors @ net.item(all_items).T + net.bias(all_items), rows, items, weights
        )  # (B,)
    positive = (user_vectors[rows] * net.item(items)).sum(dim=1)  # (P,)
    if settings.loss == "rating":
        errors = (weights - positive) ** 2  # (P,)
        return torch.zeros_like(batch.weight).index_add(0, rows, errors)  # (B,)
    log_q = log_drawn(net.items_share.detach()[:, 0], settings)  # (n_items,)
    size = settings.n_negatives if settings.loss != "bpr" else min(settings.n_negatives, MAX_DRAWN)
    drawn = torch.multinomial(log_q.exp(), size, replacement=True, generator=generator)  # (N,)
    negative = user_vectors @ net.item(drawn).T  # (B, N)
    if settings.loss == "squared":
        item_losses = (1 - positive) ** 2 + (negative**2).mean(dim=1)[rows]  # (P,)
    elif settings.loss == "bpr":
        item_losses = bpr(positive + net.bias(items), (negative + net.bias(drawn))[rows])  # (P,)
    else:
        log_sum = torch.logsumexp(negative + net.bias(drawn) - log_q[drawn], dim=1)  # (B,)
        item_losses = shared_softmax_nll(
            positive + net.bias(items) - log_q[items], log_sum[rows]
        )  # (P,)
    return torch.zeros_like(batch.weight).index_add(0, rows, weights * item_losses)  # (B,)
