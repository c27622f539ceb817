"""Matrix factorisation as a network: two embedding tables and a dot product, by sampled losses.

Trained by Horovod ranks on Spark executors, from the files of one version of `training_bags`. User
vectors are only a means: they stay in the executors, and every user is folded in at scoring, as in
`als`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from recspark.data.dataset import Dataset
from recspark.engines.als_objective import Objective
from recspark.errors import CatalogueTooLargeError
from recspark.models.base import FitOptions, Recommender
from recspark.models.factors import FactorModel
from recspark.models.neural import Job, NeuralSettings, entries, fit_network, log_shares
from recspark.nets.mf import MfNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained, Validation, load_table, train
from recspark.train.losses import bpr, softmax_nll

_COLUMNS = ("user_idx", "items", "weights")
_VALIDATION_SEED = 7  # items drawn for validation are the same at every epoch


class MfSettings(NeuralSettings):
    """Settings of `Mf`."""

    embedding_size: int = Field(
        64,
        ge=1,
        description="length of a user's and an item's vector",
        json_schema_extra={"tune": {"choices": [32, 64, 128]}},
    )
    loss: Literal["softmax", "bpr", "squared", "rating"] = Field(
        "softmax",
        description="sampled softmax with logQ; BPR; squared error of 1, with drawn items at 0; "
        "rating: squared error of the weights themselves, no drawn items (Koren et al. 2009)",
        json_schema_extra={"tune": {"choices": ["softmax", "bpr", "squared"]}},
    )
    n_negatives: int = Field(
        200, ge=1, description="items drawn for each step, shared by its rows. Guess"
    )
    sampling_exponent: float = Field(
        0.75, ge=0, description="items are drawn by popularity to this power. Mikolov et al. 2013"
    )
    half_life_days: float | None = Field(
        30.0,
        gt=0,
        description="days; at scoring an event this old counts half; null = no decay",
        json_schema_extra={"tune": {"low": 10, "high": 200, "log": True}},
    )
    fold_in_reg: float = Field(
        0.1,
        gt=0,
        description="regularisation of the solve that gives a user's vector at scoring",
        json_schema_extra={"tune": {"low": 0.001, "high": 10, "log": True}},
    )
    fold_in_alpha: float = Field(
        10.0,
        gt=0,
        description="confidence in it: 1 + alpha * weight",
        json_schema_extra={"tune": {"low": 1, "high": 100, "log": True}},
    )
    epochs: int = Field(
        20,
        ge=1,
        description="passes over the training set",
        json_schema_extra={"tune": {"choices": [10, 20, 40]}},
    )
    learning_rate: float = Field(
        1e-2,
        gt=0,
        description="of Adam at the first step, falling linearly to 0",
        json_schema_extra={"tune": {"low": 1e-3, "high": 3e-2, "log": True}},
    )
    max_users: int = Field(
        20_000_000,
        ge=1,
        description="most users; a rank takes 12 bytes a user and dimension (15 GB at 64)",
    )

    @property
    def objective(self) -> Objective:
        """What a user's vector minimises at scoring."""
        return Objective(
            reg=self.fold_in_reg,
            alpha=self.fold_in_alpha,
            feedback="explicit" if self.loss == "rating" else "implicit",
        )


class Mf(Recommender[MfSettings]):
    """Minimise the loss of every event, times its decayed weight, against items drawn at random.

    With loss rating, weights are what is predicted, and users are folded in by least squares.

    Source: Koren, Bell, Volinsky 2009; BPR: Rendle et al. 2009; sampled softmax: Jean et al. 2015.
    """

    settings_class = MfSettings

    @property
    def training_table(self) -> str:
        """See `Recommender`."""
        return "training_bags"

    def fit(self, data: Dataset, options: FitOptions) -> MfModel:
        """See `Recommender.fit`. The driver holds items, nothing of users."""
        settings, items = self.settings, data.vocabulary()
        n_users = 0 if data.training is None else data.training.n_rows
        if n_users > settings.max_users:
            raise CatalogueTooLargeError(
                f"mf: {n_users:,} users in the training set, max_users is {settings.max_users:,}; "
                f"raise models.mf.max_users if the ranks have "
                f"{12e-9 * n_users * settings.embedding_size:,.1f} GB each, or use als"
            )
        trained = fit_network("mf", data, options, settings, items, train_rank)
        return MfModel(settings, data.cutoff, items, load_table(trained, "items"))


class MfModel(FactorModel):
    """Item vectors; ratings with loss rating."""


def train_rank(comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. The users' vectors end here."""
    settings: MfSettings = job.settings
    feed, held_out = job.feed(comm, _COLUMNS), job.validation_feed(comm, _COLUMNS)
    vocabulary = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    batches = [feed] if held_out is None else [feed, held_out]
    own = [b.tensors["user_idx"][b.weight > 0] for f in batches for b in f.epoch(0)]
    users = torch.unique(comm.allgather(torch.cat(own)))  # (n_users,), ascending, on every rank
    share = log_shares(comm, feed.epoch(0), vocabulary)  # (n_items,)
    log_q = torch.log_softmax(settings.sampling_exponent * share, dim=0)  # (n_items,)
    net = make_net(settings, len(users), len(job.items), job.loop.seed)
    loss = partial(row_loss, net, users, vocabulary, log_q, settings)
    validation = None
    if held_out is not None:

        def value(batch: Batch) -> torch.Tensor:
            generator = torch.Generator(batch.weight.device).manual_seed(_VALIDATION_SEED)
            return loss(batch, generator, 1.0)

        validation = Validation(held_out, value)
    trained = train(comm, net, loss, feed, job.loop, validation)
    if trained.weights is None:
        return trained
    return replace(trained, weights={"items": trained.weights["items"]})


def make_net(settings: MfSettings, n_users: int, n_items: int, seed: int) -> MfNet:
    """Return the network with the weights of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return MfNet(n_users, n_items, settings.embedding_size, generator)


def row_loss(
    net: MfNet,
    users: torch.Tensor,
    vocabulary: torch.Tensor,
    log_q: torch.Tensor,
    settings: MfSettings,
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the weighted losses of each row's items, summed, (B,).

    `users` int64 (n_users,) ascending; `log_q` (n_items,): log probability of drawing an item.
    """
    rows, items, weights = entries(batch, vocabulary, ratings=settings.loss == "rating")  # (P,)
    device = weights.device
    known = users.to(device)  # (n_users,)
    user = torch.searchsorted(known, batch.tensors["user_idx"])  # (B,)
    user = user.clamp_max(len(known) - 1)
    log_q = log_q.to(device)  # (n_items,)
    size = settings.n_negatives
    drawn = torch.multinomial(log_q.exp(), size, replacement=True, generator=generator)  # (N,)
    x = net.user(user)  # (B, D)
    positive = (x[rows] * net.item(items)).sum(dim=1)  # (P,)
    if settings.loss == "rating":
        errors = (weights - positive) ** 2  # (P,)
        return torch.zeros_like(batch.weight).index_add(0, rows, errors)  # (B,)
    negative = (x @ net.item(drawn).T)[rows]  # (P, N)
    if settings.loss == "bpr":
        each = bpr(positive, negative)  # (P,)
    elif settings.loss == "squared":
        each = (1 - positive) ** 2 + (negative**2).mean(dim=1)  # (P,)
    else:
        scores = torch.cat([positive[:, None], negative], dim=1)  # (P, 1 + N)
        log_included = torch.cat(
            [log_q[items][:, None], log_q[drawn].expand(len(rows), -1)], dim=1
        )  # (P, 1 + N)
        targets = torch.zeros(len(rows), dtype=torch.int64, device=device)  # (P,)
        each = softmax_nll(scores, targets, log_included)  # (P,)
    return torch.zeros_like(batch.weight).index_add(0, rows, weights * each)  # (B,)
