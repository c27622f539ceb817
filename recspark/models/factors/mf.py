"""Matrix factorisation as a network: two embedding tables and a dot product, by sampled losses.

Trained by Horovod ranks on Spark executors, from the files of one version of `training_bags`. User
vectors are only a means: they stay in the executors, and every user is folded in at scoring, by the
loss of the training.
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
from recspark.models.setting_types import Epochs, ScoringHalfLifeDays, VectorSize
from recspark.models.weights import HistoryWeights
from recspark.nets.mf import MfNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, load_table
from recspark.train.losses import bpr, multinomial_nll, shared_softmax_nll

_COLUMNS = ("user_idx", "items", "weights")
_TABLES = ("items", "items_bias", "items_share")  # what comes back from the ranks
_LEAST_REG = 1e-6  # of a user's solve, where nothing decays


class MfSettings(NeuralSettings):
    """Settings of `Mf`."""

    embedding_size: VectorSize = 64
    loss: Literal["softmax", "bpr", "squared", "rating"] = Field(
        "softmax",
        description="sampled softmax with logQ; BPR; squared error of 1, with drawn items at 0; "
        "rating: squared error of the weights themselves, no drawn items (Koren et al. 2009)",
        json_schema_extra={"tune": {"choices": ["softmax", "bpr", "squared"]}},
    )
    n_negatives: int = Field(
        5000,
        ge=1,
        description="items drawn for each step, shared by its rows; where there are no more, the "
        f"softmax takes all of them, each once. BPR, which has a term for each event and item, takes "
        f"{MAX_DRAWN} at most. Guess: a product that costs less than the feed",
    )
    sampling_exponent: float = Field(
        0.75, ge=0, description="items are drawn by popularity to this power. Mikolov et al. 2013"
    )
    half_life_days: ScoringHalfLifeDays = 30.0
    epochs: Epochs = 20
    learning_rate: float = Field(
        3e-2,
        gt=0,
        description="of Adam at the first step, falling linearly to 0. A user's vector moves once an "
        "epoch: MovieLens 1M, validation part, .206 at .01 and .215 at .03",
        json_schema_extra={"tune": {"low": 1e-2, "high": 1e-1, "log": True}},
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="L2 on the vectors a step reads; times batch_size it is what holds a user's "
        "vector, in training and at scoring",
        json_schema_extra={"tune": {"low": 1e-3, "high": 0.2, "log": True}},
    )
    max_users: int = Field(
        20_000_000,
        ge=1,
        description="most users; a rank takes 12 bytes a user and dimension (15 GB at 64)",
    )

    @property
    def user_reg(self) -> float:
        """What training adds to a user's loss: user_reg / 2 |u|^2; a step is the mean of its rows."""
        return self.weight_decay * self.batch_size


class Mf(Algorithm[MfSettings]):
    """Minimise the loss of every event, times its decayed weight, against items drawn at random.

    A score is a dot product and, where items are ranked (softmax and bpr), an item's bias. Users are
    folded in by the objective that they are trained by; with loss rating, where weights are what is
    predicted, that is least squares.

    Source: Koren, Bell, Volinsky 2009; BPR: Rendle et al. 2009; sampled softmax: Jean et al. 2015.
    """

    settings_class = MfSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_bags",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> MfModel:
        """See `Algorithm.fit`. The driver holds items, nothing of users."""
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
    """Item vectors, and what folds users in; ratings with loss rating.

    `factors` float32 (n_items, embedding_size); `bias` float32 (n_items,) of a score; `drawn` float32
    (n_items,), the share of an item in what training draws.
    """

    settings: MfSettings

    @property
    def rates(self) -> bool:
        """See `RetrieverModel`: where weights themselves are fitted, and do not decay."""
        return self.settings.loss == "rating" and self.settings.half_life_days is None

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        settings = self.settings
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days)
        shared = self.shared_arrays()
        if settings.loss == "rating":
            # The row's squared errors and user_reg / 2 |u|^2.
            reg = max(settings.user_reg / 2, _LEAST_REG)
            objective = Objective(reg, reg_exponent=0.0, feedback="explicit")
            return FactorScorer(weights, self.items, shared["factors"], objective)
        return MfScorer(weights, self.items, shared, settings.loss, settings.user_reg)


@dataclass(frozen=True)
class MfScorer:
    """Folds the users of a block in by the loss of the training, and multiplies."""

    weights: HistoryWeights
    items: Array
    arrays: dict[str, topk.Shared]
    loss: Kind
    reg: float

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`. A user without a known item gets no list."""
        start, items, weights = self.weights.local(block.history, self.items)
        users = self._fold_in(start, items, weights)
        factors, bias = (np.asarray(self.arrays[n].array) for n in ("factors", "bias"))
        return topk.DotScores(users, factors, bias, np.diff(start) > 0)

    @cached_property
    def _fold_in(self) -> Folding:
        """Once a worker."""
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        return Folding(self.loss, arrays["factors"], arrays["bias"], arrays["drawn"], self.reg)


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. The users' vectors end here."""
    task = NetworkTask(comm, job, _COLUMNS)
    own = [b.tensors["user_idx"][b.weight > 0] for b in task.batches()]
    users = torch.unique(comm.allgather(torch.cat(own)))  # (n_users,), ascending, on every rank
    share = log_shares(comm, task.feed.epoch(0), task.vocabulary)  # (n_items,)
    net = make_net(task.settings, len(users), task.n_items, task.seed)
    net.items_share.data = share[:, None]
    loss = partial(row_loss, net, users, task.vocabulary, task.settings)
    trained = task.train(net, loss, with_the_same_draws(loss))
    if trained.weights is None:
        return trained
    return replace(trained, weights={name: trained.weights[name] for name in _TABLES})


def log_drawn(share: torch.Tensor, settings: MfSettings) -> torch.Tensor:
    """Return the log probability of drawing each item, (n_items,), of its log share."""
    return torch.log_softmax(settings.sampling_exponent * share, dim=0)


def scoring_arrays(trained: Trained, settings: MfSettings) -> dict[str, Array]:
    """Return the arrays of `MfModel`."""
    items, bias, share = (load_table(trained, name) for name in _TABLES)
    drawn = log_drawn(torch.from_numpy(share[:, 0]), settings).exp()  # (n_items,)
    return {"factors": items, "bias": (bias + share)[:, 0], "drawn": drawn.numpy()}


def make_net(settings: MfSettings, n_users: int, n_items: int, seed: int) -> MfNet:
    """Return the network with the weights of `seed`."""
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
    """Return the weighted losses of each row's items, summed, (B,).

    `users` int64 (n_users,) ascending.
    """
    rows, items, weights = entries(batch, vocabulary, ratings=settings.loss == "rating")  # (P,)
    device = weights.device
    known = users.to(device)  # (n_users,)
    user = torch.searchsorted(known, batch.tensors["user_idx"])  # (B,)
    user = user.clamp_max(len(known) - 1)
    x = net.user(user)  # (B, D)
    if settings.loss == "softmax" and settings.n_negatives >= len(vocabulary):
        every = torch.arange(len(vocabulary), device=device)  # (n_items,)
        return multinomial_nll(
            x @ net.item(every).T + net.bias(every), rows, items, weights
        )  # (B,)
    positive = (x[rows] * net.item(items)).sum(dim=1)  # (P,)
    if settings.loss == "rating":
        errors = (weights - positive) ** 2  # (P,)
        return torch.zeros_like(batch.weight).index_add(0, rows, errors)  # (B,)
    log_q = log_drawn(net.items_share.detach()[:, 0], settings)  # (n_items,)
    size = settings.n_negatives if settings.loss != "bpr" else min(settings.n_negatives, MAX_DRAWN)
    drawn = torch.multinomial(log_q.exp(), size, replacement=True, generator=generator)  # (N,)
    negative = x @ net.item(drawn).T  # (B, N)
    if settings.loss == "squared":
        each = (1 - positive) ** 2 + (negative**2).mean(dim=1)[rows]  # (P,)
    elif settings.loss == "bpr":
        each = bpr(positive + net.bias(items), (negative + net.bias(drawn))[rows])  # (P,)
    else:
        log_sum = torch.logsumexp(negative + net.bias(drawn) - log_q[drawn], dim=1)  # (B,)
        each = shared_softmax_nll(positive + net.bias(items) - log_q[items], log_sum[rows])  # (P,)
    return torch.zeros_like(batch.weight).index_add(0, rows, weights * each)  # (B,)
