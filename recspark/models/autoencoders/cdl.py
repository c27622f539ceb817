"""Collaborative deep learning (CDL): matrix factorisation with a prior from each item's words.

An autoencoder of an item's words gives a code, and the item's factor is pulled towards this code.
The network is trained by Horovod ranks from the files of one version of `training_texts`. Factors
are solved in closed form by recspark's blocked ALS on Spark. Source: Wang, Wang & Yeung 2015,
"Collaborative Deep Learning for Recommender Systems", sections 3.3 to 3.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from recspark import storage
from recspark.data.blocks import Array, local_index
from recspark.data.dataset import Dataset
from recspark.engines.als import BlockedAls, Plan
from recspark.engines.als_objective import Objective
from recspark.models.autoencoders.sdae import pretrain
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed
from recspark.models.factors.als import pairs
from recspark.models.factors.factor_model import FactorModel
from recspark.models.neural import (
    Job,
    NeuralSettings,
    check_catalogue_size,
    corrupted,
    fit_network,
    look_up,
    net_arrays,
)
from recspark.models.weights import HistoryWeights
from recspark.nets.sdae import SdaeNet
from recspark.train.comm import Comm
from recspark.train.curve import Curve, Epoch
from recspark.train.feed import Batch, read_arrow
from recspark.train.loop import Trained, load_weights, train_network

_COLUMNS = ("item_idx", "words", "weights")
_ITEMS_PER_BATCH = 1024  # items encoded at once


class CdlSettings(NeuralSettings):
    """Settings of `Cdl`. Paper: the figures of its section 5.4 or of its released code."""

    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (200, 50),
        min_length=1,
        description="units of each layer, from the words to the middle layer; the last number is "
        "also the length of a factor. Paper: 200, 50",
    )
    corruption: float = Field(
        0.3, ge=0, lt=1, description="share of the words that is set to 0 in training. Paper: 0.3"
    )
    activation: Literal["tanh", "sigmoid"] = Field(
        "sigmoid",
        description="activation of every layer except the rebuilt words, which always have a "
        "sigmoid. Paper: sigmoid",
    )
    reg_users: float = Field(
        0.1,
        gt=0,
        description="lambda_u: precision of the prior of user factors. Paper: 0.1",
        json_schema_extra={"tune": {"low": 0.01, "high": 10, "log": True}},
    )
    reg_items: float = Field(
        10.0,
        gt=0,
        description="lambda_v: how strongly an item's factor is pulled to the code of its words. "
        "Paper: 10",
        json_schema_extra={"tune": {"low": 0.1, "high": 100, "log": True}},
    )
    reg_words: float = Field(
        1000.0,
        ge=0,
        description="lambda_n: weight of the squared error of the rebuilt words. Paper: 1000",
        json_schema_extra={"tune": {"low": 1, "high": 10000, "log": True}},
    )
    unobserved_weight: float = Field(
        0.01, gt=0, description="b: confidence of a pair without an interaction. Paper: 0.01"
    )
    alpha: float = Field(
        0.0,
        ge=0,
        description="confidence of an interaction is a = 1 + alpha * weight. Paper: a = 1",
        json_schema_extra={"tune": {"low": 0.1, "high": 100, "log": True}},
    )
    half_life_days: float | None = Field(
        None, gt=0, description="days; an event this old counts half; null = no decay"
    )
    pretraining_epochs: int = Field(
        5, ge=0, description="passes over the items to pretrain each layer, before round 1. Guess"
    )
    rounds: int = Field(
        4, ge=1, description="rounds; each trains the network, then solves the factors. Guess"
    )
    sweeps: int = Field(2, ge=1, description="solves of items and users per round. Guess")
    epochs: int = Field(10, ge=1, description="passes over the items per round. Guess")
    batch_size: int = Field(128, ge=1, description="items per step, all ranks together. Guess")
    learning_rate: float = Field(
        1e-3,
        gt=0,
        description="learning rate of Adam at the first step of a round; it falls linearly to 0. "
        "Guess",
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        description="L2 penalty on all weights of the network: lambda_w / number of items",
    )
    n_blocks: int = Field(
        4, ge=1, description="blocks of users and of items, solved in parallel; see als"
    )
    max_items: int = Field(
        100_000,
        ge=1,
        description="largest catalogue, in items; every rank is sent all item factors, 4 bytes per "
        "number",
    )

    @model_validator(mode="after")
    def _trains_on_all(self) -> Self:
        if self.validation or self.patience:
            raise ValueError("cdl alternates a fixed number of rounds: no validation, no patience")
        return self

    @property
    def size(self) -> int:
        """Length of a factor."""
        return self.hidden_sizes[-1]

    @property
    def scale(self) -> float:
        """The number s = (lambda_v / lambda_u)^(1/4) that makes the penalties of both sides equal.

        ALS has a single penalty weight lambda for users and items. In `objective`, item factors are
        therefore multiplied by s, and user factors divided by s. With lambda = sqrt(lambda_u
        lambda_v),

            lambda_u |u|^2 + lambda_v |v - e|^2 = lambda (|u / s|^2 + |s v - s e|^2)

        and the product u v does not change. Example: lambda_u = 0.1 and lambda_v = 10 give s = 3.16
        and lambda = 1.
        """
        return float((self.reg_items / self.reg_users) ** 0.25)

    @property
    def objective(self) -> Objective:
        """What the factors minimise: C (R - u v)^2 summed over all pairs, and scaled penalties."""
        reg = float(np.sqrt(self.reg_users * self.reg_items))
        return Objective(reg, self.alpha, self.unobserved_weight, reg_exponent=0.0)


class Cdl(Algorithm[CdlSettings]):
    """Minimise lambda_u |u|^2 + lambda_v |v - f_e(x)|^2 + lambda_n |f_r(x) - x|^2 + C (R - u v)^2.

    Each term is divided by 2 and summed: the first over users u, the next two over items v with
    words x, the last over all pairs. f_e is the network's middle layer for the words of an item,
    and f_r are the words rebuilt from the middle layer. R is 1 for an interaction and else 0, C is
    its confidence.

    The maximum a posteriori (MAP) estimate is found in turns. First come gradient steps on the
    network with v fixed. Then v is solved in closed form given u and f_e, and u given v. As a prior
    of v, f_e is computed from clean words; in training, from corrupted words. Users are folded in
    at scoring, with one more solve of the same equation. Source: equation 5 and the updates after
    it (lambda_s infinite).
    """

    settings_class = CdlSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_texts",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> CdlModel:
        """See `Algorithm.fit`. Driver memory grows with the number of items, not of users."""
        settings, items = self.settings, data.vocabulary()
        check_catalogue_size("cdl", items, settings.max_items, 4 * settings.size, "als")
        network = _Network(settings, data, items, options)
        plan = Plan(
            rank=settings.size,
            iterations=settings.rounds * settings.sweeps,
            n_blocks=settings.n_blocks,
            seed=options.seed,
            method="cholesky",
            progress=options.progress,
            prior=network.prior,
        )
        interactions = pairs(data, items, HistoryWeights.sums(data.cutoff, settings.half_life_days))
        with BlockedAls(interactions, len(items), settings.objective, plan) as als:
            als.run()
            factors = als.item_factors()
        options.record(network.curve)
        return CdlModel(settings, data.cutoff, items, factors)


class CdlModel(FactorModel):
    """A fitted `Cdl`: its item factors, multiplied by `CdlSettings.scale`."""


class _Network:
    """The network of one fit. Each round trains it further, on the item factors of that round."""

    def __init__(
        self, settings: CdlSettings, data: Dataset, items: Array, options: FitOptions
    ) -> None:
        self._settings, self._data, self._items, self._options = settings, data, items, options
        self._files = [uri for uri, rows in data.training_set("training_texts").files if rows]
        self._n_words = 1 + max(0, *(int(texts["words"].max()) for texts in self._texts()))
        self._arrays: dict[str, Array] | None = None  # the weights; None = not trained yet
        self._n_prior_calls = 0
        # f_e(x) of each item (n_items, size); 0 for an item without a row in the training set
        self._codes = np.zeros((len(items), settings.size), np.float32)
        self._epochs: list[Epoch] = []

    @property
    def curve(self) -> Curve:
        """The epochs of all rounds in order, numbered from 1 without a restart."""
        epochs = [replace(epoch, epoch=number) for number, epoch in enumerate(self._epochs, 1)]
        return Curve(tuple(epochs), len(epochs))

    def prior(self, factors: Array | None) -> Array:
        """Return f_e(x) * scale of each item, to which its factor is pulled; see `als.Plan`.

        The result is float32 (n_items, size). ALS calls this method before each solve of the items,
        with their scaled factors (None the first time). The first call of a round, which is every
        `sweeps`-th, trains the network before it returns.
        """
        settings = self._settings
        if self._n_prior_calls % settings.sweeps == 0:
            self._train(None if factors is None else factors / np.float32(settings.scale))
        self._n_prior_calls += 1
        return self._codes * np.float32(settings.scale)

    def _train(self, factors: Array | None) -> None:
        round_number = self._n_prior_calls // self._settings.sweeps + 1
        curves: list[Curve] = []
        scratch = self._options.scratch
        options = replace(
            self._options,
            scratch=storage.join(scratch, f"round-{round_number}") if scratch else "",
            record=curves.append,
        )
        self._options.progress(f"  cdl: round {round_number} of {self._settings.rounds}")
        train_this_round = partial(train_rank, self._n_words, self._arrays, factors)
        trained = fit_network(
            "cdl", self._data, options, self._settings, self._items, train_this_round
        )
        net = make_net(self._settings, self._n_words, self._options.seed)
        load_weights(net, trained)
        self._arrays = net_arrays(net)
        self._epochs += curves[0].epochs
        with torch.no_grad():
            for texts in self._texts():
                batch = Batch(
                    {name: torch.from_numpy(values.copy()) for name, values in texts.items()},
                    torch.ones(0),
                )
                # (B,), -1 for an item outside the vocabulary
                item_rows = local_index(self._items, texts["item_idx"])
                codes = net.encode(
                    *word_entries(batch), len(item_rows), net.depth
                ).numpy()  # (B, K)
                self._codes[item_rows[item_rows >= 0]] = codes[item_rows >= 0]

    def _texts(self) -> Iterator[dict[str, Array]]:
        """Yield the columns of the training set, `_ITEMS_PER_BATCH` rows at most at a time.

        The order of the rows is the same at every call.
        """
        for group in read_arrow(self._files, _COLUMNS, None):
            for begin in range(0, len(group["item_idx"]), _ITEMS_PER_BATCH):
                yield {
                    name: values[begin : begin + _ITEMS_PER_BATCH] for name, values in group.items()
                }


def train_rank(
    n_words: int,
    arrays: dict[str, Array] | None,
    factors: Array | None,
    comm: Comm,
    job: Job,
) -> Trained:
    """Train for one round on one rank; see `recspark.train.launch`.

    Parameters
    ----------
    arrays : the weights after the round before; None = the first round: the network starts from
        random weights and is pretrained layer by layer
    factors : item factors, not scaled, float32 (n_items, K); None = there are none yet, and the
        network only rebuilds words
    """
    settings: CdlSettings = job.settings
    feed = job.feed(comm, _COLUMNS)
    net = make_net(settings, n_words, job.loop.seed)
    if arrays is None:

        def loss_of_layer(k: int, batch: Batch, generator: torch.Generator) -> torch.Tensor:
            return layer_loss(net, settings, k, batch, generator)

        pretrain(comm, net, feed, job.loop, settings.pretraining_epochs, loss_of_layer)
    else:
        for name, parameter in net.named_parameters():
            parameter.data = torch.from_numpy(arrays[name].copy())
    items = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    item_factors = None if factors is None else torch.from_numpy(factors)  # (n_items, K)

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        item_rows, _ = look_up(batch.tensors["item_idx"], items)  # (B,)
        factors_of_batch = (
            None if item_factors is None else item_factors.to(item_rows.device)[item_rows]
        )  # (B, K)
        return row_loss(net, settings, batch, factors_of_batch, generator)

    return train_network(comm, net, loss, feed, job.loop)


def make_net(settings: CdlSettings, n_words: int, seed: int) -> SdaeNet:
    """Return the network with first weights drawn from `seed`; its "items" are words."""
    generator = torch.Generator().manual_seed(seed)
    return SdaeNet(n_words, settings.hidden_sizes, generator, settings.activation)


def row_loss(
    net: SdaeNet,
    settings: CdlSettings,
    batch: Batch,
    factors: torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return lambda_n / 2 |f_r(x) - clean x|^2 + lambda_v / 2 |v - f_e(x)|^2 of each item, (B,).

    x are the corrupted words of the item; without a `generator`, its clean words. `factors` (B, K)
    is v of each item; None = the second term is left out.
    """
    rows, words, values = word_entries(batch)  # (P,) each
    n_rows = len(batch.weight)
    inputs = corrupted(values, settings.corruption, generator)  # (P,)
    middle = net.encode(rows, words, inputs, n_rows, net.depth)  # (B, K)
    error = _words_error(net, net.decode(middle), rows, words, values)  # (B,)
    loss = settings.reg_words / 2 * error  # (B,)
    if factors is not None:
        loss = loss + settings.reg_items / 2 * ((factors - middle) ** 2).sum(dim=1)  # (B,)
    return loss


def layer_loss(
    net: SdaeNet, settings: CdlSettings, k: int, batch: Batch, generator: torch.Generator
) -> torch.Tensor:
    """Return the squared error of layer k's clean input, rebuilt from a corrupted one, (B,).

    Layers count from 1. The input of layer 1 is the words of an item, that of layer k > 1 is the
    output of layer k - 1.
    """
    rows, words, values = word_entries(batch)  # (P,) each
    n_rows = len(batch.weight)
    if k == 1:
        inputs = corrupted(values, settings.corruption, generator)  # (P,)
        return _words_error(
            net, net.first(rows, words, inputs, n_rows), rows, words, values
        )  # (B,)
    with torch.no_grad():  # the layers before layer k stay as they are
        clean = net.encode(rows, words, values, n_rows, k - 1)  # (B, Hk-1)
    rebuilt = net.up(net.down(corrupted(clean, settings.corruption, generator), k), k)  # (B, Hk-1)
    return ((rebuilt - clean) ** 2).sum(dim=1)  # (B,)


def word_entries(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row (ascending), word and weight of each word of a batch, (P,) each.

    Only words of a weight above 0 are returned, so padding is not.
    """
    words, weights = batch.tensors["words"], batch.tensors["weights"]  # (B, L) each
    rows, columns = torch.nonzero(weights > 0, as_tuple=True)  # (P,) each
    return rows, words[rows, columns].long(), weights[rows, columns]


def _words_error(
    net: SdaeNet,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    words: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Return |sigmoid(logits of `hidden`) - x|^2 of each row, summed over all words, (B,).

    `hidden` (B, H1): layer 1, or layer 1 as rebuilt from the middle layer. x has the `values` (P,)
    at (`rows`, `words`) and is 0 elsewhere.
    """
    rebuilt = torch.sigmoid(net.logits(hidden))  # (B, n_words)
    clean = torch.zeros_like(rebuilt).index_put((rows, words), values)  # (B, n_words)
    return ((rebuilt - clean) ** 2).sum(dim=1)  # (B,)
