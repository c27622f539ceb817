"""Collaborative deep learning: item factors drawn to what an autoencoder makes of an item's words.

Source: Wang, Wang & Yeung 2015, "Collaborative Deep Learning for Recommender Systems", sections 3.3
to 3.5. The network is trained by Horovod ranks from the files of one version of `training_texts`;
factors are solved in closed form by recspark's blocked ALS on Spark.
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
from recspark.data.blocks import Array
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
    check_catalogue,
    corrupted,
    fit_network,
    local_index,
    net_arrays,
)
from recspark.models.scoring import topk
from recspark.models.weights import HistoryWeights
from recspark.nets.sdae import SdaeNet
from recspark.train.comm import Comm
from recspark.train.curve import Curve, Epoch
from recspark.train.feed import Batch, read_arrow
from recspark.train.loop import Trained, load_weights, train

_COLUMNS = ("item_idx", "words", "weights")
_ROWS = 1024  # items encoded at once


class CdlSettings(NeuralSettings):
    """Settings of `Cdl`. Paper: the figures of its section 5.4 or of its released code."""

    hidden_sizes: tuple[PositiveInt, ...] = Field(
        (200, 50),
        min_length=1,
        description="units of the layers from the words to the middle; the last is the length of a "
        "factor. Paper: 200, 50",
    )
    corruption: float = Field(
        0.3, ge=0, lt=1, description="share of the words that is set to 0 (masking). Paper: 0.3"
    )
    activation: Literal["tanh", "sigmoid"] = Field(
        "sigmoid",
        description="of every layer but the words' own, which is a sigmoid. Paper: sigmoid",
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
        description="lambda_v: how strongly an item's factor is held to its words. Paper: 10",
        json_schema_extra={"tune": {"low": 0.1, "high": 100, "log": True}},
    )
    reg_words: float = Field(
        1000.0,
        ge=0,
        description="lambda_n: weight of the rebuilt words. Paper: 1000",
        json_schema_extra={"tune": {"low": 1, "high": 10000, "log": True}},
    )
    unobserved_weight: float = Field(
        0.01, gt=0, description="b: confidence of a pair without interaction. Paper: 0.01"
    )
    alpha: float = Field(
        0.0,
        ge=0,
        description="confidence of an interaction is a = 1 + alpha * weight. Paper: a = 1",
        json_schema_extra={"tune": {"low": 0.1, "high": 100, "log": True}},
    )
    half_life_days: float | None = Field(
        None, gt=0, description="days; an event this old weighs half; null = no decay"
    )
    pretraining_epochs: int = Field(
        5, ge=0, description="passes over the items for each layer, before all else. Guess"
    )
    rounds: int = Field(
        4, ge=1, description="times that the network is trained, then the factors solved. Guess"
    )
    sweeps: int = Field(2, ge=1, description="solves of items and users in a round. Guess")
    epochs: int = Field(10, ge=1, description="passes over the items in a round. Guess")
    batch_size: int = Field(128, ge=1, description="items of a step, of all ranks together. Guess")
    learning_rate: float = Field(
        1e-3, gt=0, description="of Adam at a round's first step, falling linearly to 0. Guess"
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="L2 on all weights of the network: lambda_w over items"
    )
    n_blocks: int = Field(
        4, ge=1, description="blocks of users and of items that are solved; see als"
    )
    max_items: int = Field(
        100_000,
        ge=1,
        description="largest catalogue; every rank is sent its factors, 4 bytes a unit",
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
        """What item factors are multiplied by, and user factors divided by, in `objective`.

        lambda_u |u|^2 + lambda_v |v - e|^2 is then lambda (|u / s|^2 + |s v - s e|^2), with one
        lambda = sqrt(lambda_u lambda_v) for both sides, and u v is the same.
        """
        return float((self.reg_items / self.reg_users) ** 0.25)

    @property
    def objective(self) -> Objective:
        """What factors minimise: C (R - u v)^2 over all pairs and the scaled penalties."""
        reg = float(np.sqrt(self.reg_users * self.reg_items))
        return Objective(reg, self.alpha, self.unobserved_weight, reg_exponent=0.0)


class Cdl(Algorithm[CdlSettings]):
    """Minimise lambda_u |u|^2 + lambda_v |v - f_e(x)|^2 + lambda_n |f_r(x) - x|^2 + C (R - u v)^2.

    Each / 2 and summed over users, items and all pairs; f_e is the network's middle layer for an
    item's words, f_r the words rebuilt from it. MAP by turns: gradient steps on the network with v
    fixed; then, in closed form, v given u and f_e, and u given v. Users are folded in at scoring:
    one more solve of the same equation. Source: equation 5 and the updates after it (lambda_s
    infinite). f_e is taken of the clean words where it is a prior, of corrupted ones in training.
    """

    settings_class = CdlSettings

    @property
    def training_tables(self) -> tuple[str, ...]:
        """See `Algorithm`."""
        return ("training_texts",)

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> CdlModel:
        """See `Algorithm.fit`. Driver: item-sized."""
        settings, items = self.settings, data.vocabulary()
        check_catalogue("cdl", items, settings.max_items, 4 * settings.size, "als")
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
        frame = pairs(data, items, HistoryWeights.sums(data.cutoff, settings.half_life_days))
        with BlockedAls(frame, len(items), settings.objective, plan) as als:
            als.run()
            factors = als.item_factors()
        options.record(network.curve)
        return CdlModel(settings, data.cutoff, items, factors)


class CdlModel(FactorModel):
    """Item factors, times `CdlSettings.scale`."""


class _Network:
    """The network of one fit: trained anew on the factors of each round, from its last weights."""

    def __init__(
        self, settings: CdlSettings, data: Dataset, items: Array, options: FitOptions
    ) -> None:
        self._settings, self._data, self._items, self._options = settings, data, items, options
        self._files = [uri for uri, rows in data.training_set("training_texts").files if rows]
        self._n_words = 1 + max(0, *(int(texts["words"].max()) for texts in self._texts()))
        self._arrays: dict[str, Array] | None = None  # the weights; None = not trained
        self._calls = 0
        self._codes = np.zeros((len(items), settings.size), np.float32)
        self._epochs: list[Epoch] = []

    @property
    def curve(self) -> Curve:
        """The epochs of all rounds, one after the other."""
        epochs = [replace(epoch, epoch=n) for n, epoch in enumerate(self._epochs, 1)]
        return Curve(tuple(epochs), len(epochs))

    def prior(self, factors: Array | None) -> Array:
        """Return what items are drawn to, scaled, float32 (n_items, size); see `als.Plan`.

        Every `sweeps` calls the network is trained on the factors (scaled; None = none yet).
        """
        settings = self._settings
        if self._calls % settings.sweeps == 0:
            self._train(None if factors is None else factors / np.float32(settings.scale))
        self._calls += 1
        return self._codes * np.float32(settings.scale)

    def _train(self, factors: Array | None) -> None:
        number = self._calls // self._settings.sweeps + 1
        curves: list[Curve] = []
        scratch = self._options.scratch
        options = replace(
            self._options,
            scratch=storage.join(scratch, f"round-{number}") if scratch else "",
            record=curves.append,
        )
        self._options.progress(f"  cdl: round {number} of {self._settings.rounds}")
        of_rank = partial(train_rank, self._n_words, self._arrays, factors)
        trained = fit_network("cdl", self._data, options, self._settings, self._items, of_rank)
        net = make_net(self._settings, self._n_words, self._options.seed)
        load_weights(net, trained)
        self._arrays = net_arrays(net)
        self._epochs += curves[0].epochs
        with torch.no_grad():
            for texts in self._texts():
                batch = Batch(
                    {n: torch.from_numpy(v.copy()) for n, v in texts.items()}, torch.ones(0)
                )
                at = topk.local_index(self._items, texts["item_idx"])
                coded = net.encode(*bag(batch), len(at), net.depth).numpy()  # (B, K)
                self._codes[at[at >= 0]] = coded[at >= 0]

    def _texts(self) -> Iterator[dict[str, Array]]:
        """Yield the rows of the training set, some at a time, in the same order always."""
        for group in read_arrow(self._files, _COLUMNS, None):
            for begin in range(0, len(group["item_idx"]), _ROWS):
                yield {name: values[begin : begin + _ROWS] for name, values in group.items()}


def train_rank(
    n_words: int,
    arrays: dict[str, Array] | None,
    factors: Array | None,
    comm: Comm,
    job: Job,
) -> Trained:
    """Train on one rank, from `arrays`, or layer by layer first; see `recspark.train.launch`."""
    settings: CdlSettings = job.settings
    feed = job.feed(comm, _COLUMNS)
    net = make_net(settings, n_words, job.loop.seed)
    if arrays is None:

        def of_layer(k: int, batch: Batch, generator: torch.Generator) -> torch.Tensor:
            return layer_loss(net, settings, k, batch, generator)

        pretrain(comm, net, feed, job.loop, settings.pretraining_epochs, of_layer)
    else:
        for name, parameter in net.named_parameters():
            parameter.data = torch.from_numpy(arrays[name].copy())
    items = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    targets = None if factors is None else torch.from_numpy(factors)  # (n_items, K)

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        at, _ = local_index(batch.tensors["item_idx"], items)  # (B,)
        wanted = None if targets is None else targets.to(at.device)[at]  # (B, K)
        return row_loss(net, settings, batch, wanted, generator)

    return train(comm, net, loss, feed, job.loop)


def make_net(settings: CdlSettings, n_words: int, seed: int) -> SdaeNet:
    """Return the network with the weights of `seed`."""
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

    `factors` v (B, K); None = without the second term. Without a `generator` x is clean.
    """
    rows, words, values = bag(batch)  # (P,) each
    n_rows = len(batch.weight)
    seen = corrupted(values, settings.corruption, generator)  # (P,)
    middle = net.encode(rows, words, seen, n_rows, net.depth)  # (B, K)
    error = _words_error(net, net.decode(middle), rows, words, values)  # (B,)
    loss = settings.reg_words / 2 * error  # (B,)
    if factors is not None:
        loss = loss + settings.reg_items / 2 * ((factors - middle) ** 2).sum(dim=1)  # (B,)
    return loss


def layer_loss(
    net: SdaeNet, settings: CdlSettings, k: int, batch: Batch, generator: torch.Generator
) -> torch.Tensor:
    """Return the squared error of layer k's clean input, rebuilt from a corrupted one, (B,)."""
    rows, words, values = bag(batch)  # (P,) each
    n_rows = len(batch.weight)
    if k == 1:
        seen = corrupted(values, settings.corruption, generator)  # (P,)
        return _words_error(net, net.first(rows, words, seen, n_rows), rows, words, values)  # (B,)
    with torch.no_grad():  # the layers before it stay as they are
        clean = net.encode(rows, words, values, n_rows, k - 1)  # (B, Hk-1)
    rebuilt = net.up(net.down(corrupted(clean, settings.corruption, generator), k), k)  # (B, Hk-1)
    return ((rebuilt - clean) ** 2).sum(dim=1)  # (B,)


def bag(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row (ascending), word and weight of each word of a batch, (P,) each."""
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
    """Return |sigmoid(logits of `hidden`) - x|^2 over all words, (B,)."""
    rebuilt = torch.sigmoid(net.logits(hidden))  # (B, n_words)
    clean = torch.zeros_like(rebuilt).index_put((rows, words), values)  # (B, n_words)
    return ((rebuilt - clean) ** 2).sum(dim=1)  # (B,)
