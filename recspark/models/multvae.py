"""Mult-VAE: the user's taste as a latent vector that rebuilds all of the user's items (Liang et al.
2018).

Trained by Horovod ranks on Spark executors, from the files of one version of `training_bags`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field
from scipy import sparse

from recspark import storage
from recspark.config import digest
from recspark.data.blocks import Array, QueryBlock, micros
from recspark.data.dataset import Dataset
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models import topk
from recspark.models.base import FitOptions, Recommender, RecommenderModel, Settings
from recspark.models.item_item import HistoryWeights
from recspark.nets.multvae import MultVaeNet
from recspark.train.feed import Batch, Feed, ShardPlan, plan_shards
from recspark.train.launch import Comm, launcher
from recspark.train.loop import LoopOptions, Trained, load_weights, train
from recspark.train.losses import kl_to_standard_normal, multinomial_nll

_COLUMNS = ("items", "weights")
_BLOCK = 256  # rows encoded at once, always: BLAS answers for a row as its shape decides


class MultVaeSettings(Settings):
    """Settings of `MultVae`. "Bundled" = chosen on the bundled data at cutoff 2010-11-10."""

    hidden_size: int = Field(
        200,
        ge=1,
        description="units of the layer on either side of the latent one. Paper: 600; bundled: 200",
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
        description="share of a user's items hidden from the encoder. Paper, section 3.3",
        json_schema_extra={"tune": {"low": 0.2, "high": 0.8}},
    )
    beta: float = Field(
        0.2,
        ge=0,
        description="weight of the KL term when fully grown. Paper, section 2.2.2: 0.2",
        json_schema_extra={"tune": {"low": 0.02, "high": 1.0, "log": True}},
    )
    anneal: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the training in which beta grows from 0. Paper: most of it; guess",
    )
    input_weights: Literal["binary", "weights"] = Field(
        "binary",
        description="what the encoder sees in training: 1 per item, or the training set's weights; "
        "what it rebuilds is always the weights. Bundled: binary",
    )
    half_life_days: float | None = Field(
        30.0,
        gt=0,
        description="days; at scoring an event this old counts half; null = no decay. Bundled",
        json_schema_extra={"tune": {"low": 10, "high": 200, "log": True}},
    )
    epochs: int = Field(
        12,
        ge=1,
        description="passes over the training set. Bundled",
        json_schema_extra={"tune": {"choices": [6, 12, 24]}},
    )
    batch_size: int = Field(
        256, ge=1, description="users of a step, of all ranks together; ranks share them. Bundled"
    )
    learning_rate: float = Field(
        5e-3,
        gt=0,
        description="of Adam at the first step, falling linearly to 0. Bundled",
        json_schema_extra={"tune": {"low": 1e-3, "high": 2e-2, "log": True}},
    )
    weight_decay: float = Field(0.0, ge=0, description="L2 on all parameters. Paper: 0")
    max_items: int = Field(
        100_000,
        ge=1,
        description="largest catalogue; a rank takes about 72 bytes an item and hidden unit "
        "(1.4 GB at 100,000 and 200). Guess: what an executor of 4 GB leaves to Python",
    )


class MultVae(Recommender[MultVaeSettings]):
    """Maximise E[log p(x | z)] - beta KL(q(z | x) || N(0, I)), p multinomial over all items.

    Source: Liang et al. 2018, equations 1 to 7. The last bias starts at the items' log share of the
    training set, which saves the epochs that it would take to learn it.
    """

    settings_class = MultVaeSettings

    @property
    def training_table(self) -> str:
        """See `Recommender`."""
        return "training_bags"

    def fit(self, data: Dataset, options: FitOptions) -> MultVaeModel:
        """See `Recommender.fit`. The driver holds items and weights, nothing of users."""
        settings = self.settings
        items = data.vocabulary()
        if len(items) > settings.max_items:
            raise CatalogueTooLargeError(
                f"multvae: {len(items):,} items before the cutoff, max_items is "
                f"{settings.max_items:,}; raise models.multvae.max_items if the ranks have "
                f"{72e-9 * len(items) * settings.hidden_size:,.1f} GB each, or use als"
            )
        if data.training is None:
            raise ModelError("multvae: this data has no training set; run build_features with it")
        plan = plan_shards(data.training, options.train.ranks)
        loop = LoopOptions(
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            seed=options.seed,
            checkpoints=storage.join(options.scratch, "checkpoints") if options.scratch else "",
            identity={
                "settings": settings.model_dump(),
                "table": data.training.table,
                "version": data.training.version,
                "files": digest(data.training.files),
                "items": digest(items.tolist()),
                "ranks": options.train.ranks,
                "seed": options.seed,
            },
        )
        ranks = launcher(
            data.histories.sparkSession,
            options.train,
            in_process=options.in_process,
            tell=options.progress,
        )
        results = ranks.run(train_rank, settings, items, plan, loop)
        net = make_net(settings, len(items), options.seed)
        load_weights(net, results[0].value)
        return MultVaeModel(settings, data.cutoff, items, net_arrays(net))


class MultVaeModel(RecommenderModel):
    """The network without what only training needs; names as in `MultVaeNet`, float32."""

    def __init__(
        self, settings: MultVaeSettings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> None:
        super().__init__(settings, cutoff, items)
        self._arrays = arrays
        self._weights = HistoryWeights(micros(cutoff), settings.half_life_days, "sum")

    def scorer(self) -> topk.Scorer:
        """See `RecommenderModel`."""
        shared = {name: topk.Shared(array) for name, array in self._arrays.items()}
        return MultVaeScorer(self._weights, self.items, shared)

    def arrays(self) -> dict[str, Array]:
        """See `RecommenderModel`."""
        return self._arrays

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RecommenderModel`."""
        assert isinstance(settings, MultVaeSettings)
        return cls(settings, cutoff, items, arrays)


@dataclass(frozen=True)
class MultVaeScorer:
    """Weighs the history, encodes it, decodes it but for the last layer: the kernel's product."""

    weights: HistoryWeights
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        start, items, weights = self.weights.local(block.history, self.items)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        return topk.DotScores(
            encode(start, items, weights, arrays),
            arrays["items_out"],
            arrays["items_out_bias"],
            np.diff(start) > 0,
        )


def encode(start: Array, items: Array, weights: Array, arrays: dict[str, Array]) -> Array:
    """Return the decoder's hidden layer of each row, float32 (n, hidden_size), without noise.

    `start` int64 (n + 1,), `items` int32 (p,) local, `weights` float32 (p,): row r has entries
    `start[r]:start[r + 1]`. Computed in float64 in the same order for a row wherever it stands, so
    the answer does not depend on batching; no torch.
    """
    n = len(start) - 1
    used, column = np.unique(items, return_inverse=True)
    rows = sparse.csr_matrix((weights.astype(np.float64), column, start), shape=(n, len(used)))
    length = np.sqrt(rows.multiply(rows) @ np.ones(len(used)))  # (n,)
    summed = rows @ arrays["items_in"][used].astype(np.float64)  # (n, H): entries in their order
    summed /= np.maximum(length, 1e-12)[:, None]
    layers = {name: arrays[name].astype(np.float64) for name in _LAYERS}
    out = np.empty((n, arrays["items_out"].shape[1]), np.float32)
    block = np.zeros((_BLOCK, summed.shape[1]))
    for begin in range(0, n, _BLOCK):
        part = summed[begin : begin + _BLOCK]
        block[: len(part)] = part
        hidden = np.tanh(block + layers["items_in_bias"])
        mean = hidden @ layers["to_latent"] + layers["to_latent_bias"]
        decoded = np.tanh(mean @ layers["from_latent"] + layers["from_latent_bias"])
        out[begin : begin + _BLOCK] = decoded[: len(part)]
    return out


_LAYERS = ("items_in_bias", "to_latent", "to_latent_bias", "from_latent", "from_latent_bias")


def train_rank(
    comm: Comm, settings: MultVaeSettings, items: Array, plan: ShardPlan, options: LoopOptions
) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    feed = Feed(plan, comm.rank, _COLUMNS, settings.batch_size, options.seed)
    vocabulary = torch.from_numpy(items.astype(np.int64))  # (n_items,)
    net = make_net(settings, len(items), options.seed)
    net.items_out_bias.data = log_shares(comm, feed.epoch(0), vocabulary)
    return train(comm, net, partial(row_loss, net, vocabulary, settings), feed, options)


def make_net(settings: MultVaeSettings, n_items: int, seed: int) -> MultVaeNet:
    """Return the network with the weights of `seed`."""
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
    """Return the negative ELBO of each row, (B,), when the share `done` of the training is over.

    Without a `generator` there is no dropout and no sampling.
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


def entries(
    batch: Batch, vocabulary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row (ascending), local item and weight of each item of the batch, (P,) each.

    Padding, items outside the vocabulary and items of weight 0 are left out.
    """
    items, weights = batch.tensors["items"], batch.tensors["weights"]  # (B, L) each
    rows, columns = torch.nonzero(weights > 0, as_tuple=True)  # (P,) each
    wanted = items[rows, columns].long()  # (P,)
    local = torch.searchsorted(vocabulary, wanted).clamp_max(len(vocabulary) - 1)  # (P,)
    known = vocabulary[local] == wanted  # (P,)
    return rows[known], local[known], weights[rows, columns][known]


def log_shares(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return the log of each item's share of all weights of all ranks, (n_items,).

    An item counts a hundredth of the mean on top, so that none has a share of 0.
    """
    total = torch.zeros(len(vocabulary))  # (n_items,)
    for batch in batches:
        rows, items, weights = entries(batch, vocabulary)  # (P,) each
        total.index_add_(0, items, weights * batch.weight[rows])
    total = comm.allreduce(total)
    total += 0.01 * total.mean() + torch.finfo(total.dtype).tiny
    return torch.log(total / total.sum())


def net_arrays(net: MultVaeNet) -> dict[str, Array]:
    """Return what scoring needs: of the latent layer, the half that gives the mean."""
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in net.named_parameters()}
    size = arrays["from_latent"].shape[0]
    arrays["to_latent"] = arrays["to_latent"][:, :size].copy()
    arrays["to_latent_bias"] = arrays["to_latent_bias"][:size].copy()
    return arrays
