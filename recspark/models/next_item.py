"""Models whose network reads a session or history item by item and scores the next one.

Trained by Horovod ranks on Spark executors, from the files of one version of `training_sessions` or
`training_histories`: every item of a row but the first is a target, told apart from candidates that
the batch shares. Answers are the state after the newest item times the item vectors; with the
click-through head (`recspark.models.click_through`), the same state and vectors say how likely an
item is acted on if it is shown.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.nn import functional

from recspark.data.blocks import Array, QueryBlock, Ragged
from recspark.data.dataset import Dataset
from recspark.data.windows import Unit
from recspark.errors import ModelError
from recspark.models import click_through, topk
from recspark.models.base import FitOptions, Recommender, RecommenderModel, Settings
from recspark.models.contexts import contexts
from recspark.models.neural import (
    Job,
    NeuralSettings,
    check_catalogue,
    fit_network,
    local_items,
    net_arrays,
)
from recspark.nets.sequence import ITEM_ARRAYS, SequenceNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed
from recspark.train.loop import Trained, Validation, load_weights, train
from recspark.train.losses import bpr_max, gbce, gbce_power, softmax_nll
from recspark.train.negatives import Negatives

_COLUMNS = ("items",)
_TABLES = {
    ("next_item", "session"): "training_sessions",
    ("next_item", "history"): "training_histories",
    ("click_through", "session"): "training_session_impressions",
    ("click_through", "history"): "training_history_impressions",
}
_BLOCK = 256  # rows read at once, always: a row's sums then go the same way wherever it stands
_VALIDATION_SEED = 7  # candidates drawn for validation are the same at every epoch
_ITEM_BYTES = 48  # of a rank, an item and unit: two vectors, each with gradient, Adam, exchange


class NextItemSettings(NeuralSettings):
    """Settings that all next-item networks share."""

    train_on: Unit = Field(
        "session", description="what a row of the training set is: a session, or a whole history"
    )
    context: Unit = Field(
        "session",
        description="what is read to answer: the last session of the history, or all of it",
    )
    length: int = Field(
        50, ge=1, description="items, the newest, that the network reads. Kang & McAuley 2018: 50"
    )
    head: Literal["next_item", "click_through"] = Field(
        "next_item",
        description="what lists are ordered by: what comes next, or P(click) of an item if it is "
        "shown. click_through learns both, and needs impressions (sessions.impression_types)",
    )
    click_weight: float = Field(
        1.0,
        gt=0,
        description="click_through: weight of an impression's loss; a next item weighs 1. Guess: "
        "both likelihoods as they are",
    )
    tied: bool = Field(
        True, description="one vector an item for reading and scoring, instead of two"
    )
    loss: Literal["cross_entropy", "bpr_max", "gbce"] = Field(
        "cross_entropy",
        description="how targets are told apart from candidates. gbce (gSASRec): against n_samples "
        "items drawn evenly for a step, not against the batch's targets",
    )
    n_samples: int | None = Field(
        2048,
        ge=1,
        description="items drawn for a step beside the batch's targets; null = all items are "
        "candidates. Hidasi & Karatzoglou 2018: 2048",
    )
    sample_alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="items are drawn by popularity^this. Hidasi & Karatzoglou 2018: 0.5 mostly",
    )
    logq: bool = Field(
        True, description="cross_entropy: correct scores for how likely a candidate was one"
    )
    calibration: float = Field(
        0.75,
        ge=0,
        le=1,
        description="gbce: t, 0 = binary cross-entropy, 1 = as sure as the whole softmax. Petrov & "
        "Macdonald 2023: 0.75",
    )
    bpr_reg: float = Field(
        1.0, ge=0, description="bpr_max: weight of the candidates' squared scores. Same paper: 1"
    )
    dropout: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of units dropped. Guess",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )
    epochs: int = Field(10, ge=1, description="passes over the training set. Guess")
    batch_size: int = Field(
        256, ge=1, description="rows of a step, of all ranks together; ranks share them. Guess"
    )
    learning_rate: float = Field(
        2e-3,
        gt=0,
        description="of Adam at the first step, falling linearly to 0. Guess",
        json_schema_extra={"tune": {"low": 5e-4, "high": 1e-2, "log": True}},
    )
    max_items: int = Field(
        500_000,
        ge=2,
        description="largest catalogue; a rank takes about 48 bytes an item and hidden unit (2.4 "
        "GB at 500,000 and 100). Guess: what an executor of 4 GB leaves to Python",
    )

    @model_validator(mode="after")
    def _gbce_draws(self) -> Self:
        if self.loss == "gbce" and self.n_samples is None:
            raise ValueError("loss gbce draws items: set n_samples (Petrov & Macdonald 2023: 256)")
        return self

    @property
    def state_size(self) -> int:
        """Length of a state, and of the vectors that score items."""
        raise NotImplementedError


S = TypeVar("S", bound=NextItemSettings)
MakeNet = Callable[[Any, int, int], SequenceNet]  # settings, n_items, seed


class NextItem(Recommender[S]):
    """A next-item network that is not trained; a model gives settings, network and fitted class."""

    @staticmethod
    @abstractmethod
    def make_net(settings: Any, n_items: int, seed: int) -> SequenceNet:
        """Return the network with the weights of `seed`."""

    @abstractmethod
    def fitted(self, cutoff: datetime, items: Array, arrays: dict[str, Array]) -> NextItemModel:
        """Return the fitted model with these weights."""

    @property
    def training_table(self) -> str:
        """See `Recommender`."""
        return _TABLES[self.settings.head, self.settings.train_on]

    def fit(self, data: Dataset, options: FitOptions) -> NextItemModel:
        """See `Recommender.fit`. The driver holds items and weights, nothing of users."""
        settings, name = self.settings, type(self).__name__.lower()
        items = data.vocabulary()
        size = _ITEM_BYTES * settings.state_size
        check_catalogue(name, items, settings.max_items, size, "session_knn")
        if data.training is None or data.training.table != self.training_table:
            have = "none" if data.training is None else f"'{data.training.table}'"
            raise ModelError(
                f"{name}: the training set is {have}, train_on = '{settings.train_on}' with head = "
                f"'{settings.head}' reads '{self.training_table}'; run build_features with this "
                "model in `models`"
            )
        if settings.head == "click_through":
            click_through.check_impressions(name, data)
        of_rank = partial(train_rank, self.make_net)
        trained = fit_network(name, data, options, settings, items, of_rank)
        net = self.make_net(settings, len(items), options.seed)
        load_weights(net, trained)
        return self.fitted(data.cutoff, items, net_arrays(net))


class NextItemModel(RecommenderModel):
    """A trained network; arrays are named as its parameters, float32. Tied: no `items_out`.

    With head `click_through` a score is the log odds of a click, see `click_through.logits`.
    """

    make_net: MakeNet

    def __init__(
        self, settings: NextItemSettings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> None:
        super().__init__(settings, cutoff, items)
        self._settings = settings
        self._arrays = arrays

    def scorer(self) -> topk.Scorer:
        """See `RecommenderModel`."""
        shared = {name: topk.Shared(array) for name, array in self._arrays.items()}
        return NextItemScorer(self._settings, type(self).make_net, self.items, shared)

    def arrays(self) -> dict[str, Array]:
        """See `RecommenderModel`."""
        return self._arrays

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RecommenderModel`."""
        assert isinstance(settings, NextItemSettings)
        return cls(settings, cutoff, items, arrays)


@dataclass(frozen=True)
class NextItemScorer:
    """Reads the context of each query; the state after its newest item is the user's vector."""

    settings: NextItemSettings
    make_net: MakeNet
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        settings = self.settings
        found = contexts(block.history, self.items, settings.context, settings.length)
        arrays = {name: np.asarray(shared.array) for name, shared in self.arrays.items()}
        users = last_states(self.make_net(settings, 1, 1), found, arrays, settings.length)
        bias = arrays["items_out_bias"]
        if settings.head == "click_through":
            users, bias = users * arrays["click_scale"], arrays["click_bias"]
        vectors = arrays.get("items_out", arrays["items_in"])
        return topk.DotScores(users, vectors, bias, found.lengths > 0)


def last_states(net: SequenceNet, found: Ragged, arrays: dict[str, Array], longest: int) -> Array:
    """Return the state after the last item of each row, float32 (n, H); 0 for an empty row.

    `found`: local items; `net` : any weights, its body takes those of `arrays`. Computed in float64
    by one thread, in blocks of `_BLOCK` rows padded to the power of two above the row's own length
    (`longest` at most), so that the answer for a row does not depend on its company.
    """
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        if name not in ITEM_ARRAYS:
            parameter.data = torch.from_numpy(arrays[name].astype(np.float64))
    lengths, vectors = found.lengths, arrays["items_in"]
    out = np.zeros((len(lengths), arrays.get("items_out", vectors).shape[1]), np.float32)
    padded = np.minimum(1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), longest)
    with torch.no_grad(), _one_thread():
        for size in np.unique(padded[lengths > 0]):
            rows = np.flatnonzero((padded == size) & (lengths > 0))
            for begin in range(0, len(rows), _BLOCK):
                part = rows[begin : begin + _BLOCK]
                row, column = np.nonzero(np.arange(size) < lengths[part][:, None])
                block = np.zeros((_BLOCK, size, vectors.shape[1]))
                block[row, column] = vectors[found.values[found.start[part][row] + column]]
                ends = torch.ones(_BLOCK, dtype=torch.int64)  # (B,)
                ends[: len(part)] = torch.from_numpy(lengths[part])
                states = net.states(torch.from_numpy(block), ends)  # (B, T, H)
                out[part] = states[torch.arange(_BLOCK), ends - 1][: len(part)].numpy()
    return out


def train_rank(make_net: MakeNet, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    settings: NextItemSettings = job.settings
    clicks = settings.head == "click_through"
    columns = (*_COLUMNS, *click_through.COLUMNS) if clicks else _COLUMNS
    feed, held_out = job.feed(comm, columns), job.validation_feed(comm, columns)
    vocabulary = torch.from_numpy(job.items.astype(np.int64))  # (n_items,)
    net = make_net(settings, len(job.items), job.loop.seed)
    if net.has_positions:
        check_length(settings, feed)
    counts = item_counts(comm, feed.epoch(0), vocabulary)  # (n_items,)
    negatives = Negatives(counts, settings.n_samples, settings.sample_alpha)
    net.items_out_bias.data = start_bias(settings, negatives.share).float()  # (n_items,)
    if clicks:
        rates = click_through.rates(comm, feed.epoch(0), vocabulary, settings.length)  # (n_items,)
        net.click_bias.data = torch.logit(rates).float()  # (n_items,)
    loss = partial(row_loss, net, vocabulary, settings, negatives)
    validation = None
    if held_out is not None:
        still = partial(
            row_loss, net, vocabulary, settings.model_copy(update={"dropout": 0.0}), negatives
        )

        def value(batch: Batch) -> torch.Tensor:
            generator = torch.Generator(batch.weight.device).manual_seed(_VALIDATION_SEED)
            return still(batch, generator, 1.0)

        validation = Validation(held_out, value)
    return train(comm, net, loss, feed, job.loop, validation)


def start_bias(settings: NextItemSettings, share: torch.Tensor) -> torch.Tensor:
    """Return the bias of each item that is best while states say nothing, (n_items,).

    It saves the epochs that it would take to learn it. `share` (n_items,): of the targets, above 0.
    BPR-max compares items with each other, with an optimum only through its penalty: 0.
    """
    if settings.loss == "cross_entropy":
        return torch.log(share)
    if settings.loss == "gbce":  # beta p (1 - sigmoid(b)) = n_samples / n_items (1 - p) sigmoid(b)
        n_items, n_samples = len(share), settings.n_samples or 1
        power = gbce_power(n_samples, n_items, settings.calibration)
        return torch.log(power * share * n_items / (n_samples * (1 - share)))
    return torch.zeros_like(share)


def check_length(settings: NextItemSettings, feed: Feed) -> None:
    """Raise ModelError where answers read places that no row of the training set reaches."""
    width = next(feed.epoch(0)).tensors["items"].shape[1]
    read = width if settings.head == "click_through" else width - 1
    if settings.length > read:
        raise ModelError(
            f"length = {settings.length}, but a training row of {width} items teaches {read} places: "
            f"set length to {read}, or features.sequence_length to {settings.length + width - read}"
        )


def row_loss(
    net: SequenceNet,
    vocabulary: torch.Tensor,
    settings: NextItemSettings,
    negatives: Negatives,
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the loss of each row summed over its targets, (B,); 0 where the row weighs nothing.

    With head `click_through` its impressions are targets too, of the state before each.
    """
    clicks = settings.head == "click_through"  # then the last item is read: something may follow it
    items = local_items(batch, vocabulary, settings.length + (not clicks))  # (B, L)
    read, wanted = items if clicks else items[:, :-1], items[:, 1:]  # (B, T), (B, L - 1)
    embedded = functional.embedding(read.clamp_min(0), net.items_in)  # (B, T, E)
    lengths = (read >= 0).sum(dim=1).clamp_min(1)  # (B,)
    states = net.states(embedded, lengths, settings.dropout, generator)  # (B, T, H)
    counted = (wanted >= 0) & (batch.weight[:, None] > 0)  # (B, L - 1)
    rows, columns = torch.nonzero(counted, as_tuple=True)  # (P,) each
    reached = states[rows, columns]  # (P, H)
    losses = target_losses(net, reached, wanted[rows, columns], settings, negatives, generator)
    total = losses.new_zeros(len(items)).index_add(0, rows, losses)  # (B,)
    if clicks:
        shown = click_through.shown_items(batch, vocabulary, settings.length)
        lost = settings.click_weight * click_through.losses(net, states, shown)  # (S,)
        total = total.index_add(0, shown.rows, lost.to(total.dtype))  # (B,)
    return total


def target_losses(
    net: SequenceNet,
    states: torch.Tensor,
    targets: torch.Tensor,
    settings: NextItemSettings,
    negatives: Negatives,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the loss of each state (P, H) and the item int64 (P,) that comes next, (P,)."""
    if settings.loss == "gbce":
        return drawn_loss(net, states, targets, settings, generator)  # (P,)
    candidates = negatives.candidates(targets, generator)
    vectors = net.items_out.index_select(0, candidates.items)  # (N, H)
    scores = states @ vectors.T + net.items_out_bias[candidates.items]  # (P, N)
    if settings.loss == "bpr_max":
        return bpr_max(scores, candidates.targets, settings.bpr_reg)  # (P,)
    correction = candidates.log_included if settings.logq else scores.new_zeros(())  # (N,) or ()
    return softmax_nll(scores, candidates.targets, correction)  # (P,)


def drawn_loss(
    net: SequenceNet,
    states: torch.Tensor,
    targets: torch.Tensor,
    settings: NextItemSettings,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return gBCE of each state (P, H) and target int64 (P,), (P,).

    The same `n_samples` items stand against all targets of a batch, where the paper draws some for
    each: a product of two matrices instead of one for each target.
    """
    n_items, size = len(net.items_out_bias), settings.n_samples or 1
    drawn = torch.randint(n_items, (size,), generator=generator, device=targets.device)  # (N,)
    scores = states @ net.items_out[drawn].T + net.items_out_bias[drawn]  # (P, N)
    positive = (states * net.items_out[targets]).sum(dim=1) + net.items_out_bias[targets]  # (P,)
    power = gbce_power(size, n_items, settings.calibration)
    return gbce(positive, scores, drawn != targets[:, None], power)  # (P,)


def item_counts(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return how often each item occurs in the rows of all ranks, (n_items,)."""
    total = torch.zeros(len(vocabulary), dtype=torch.float64)  # (n_items,): float32 stops at 2^24
    for batch in batches:
        items = local_items(batch, vocabulary, batch.tensors["items"].shape[1])  # (B, L)
        rows, columns = torch.nonzero(items >= 0, as_tuple=True)  # (P,) each
        total.index_add_(0, items[rows, columns], batch.weight[rows].double())
    return comm.allreduce(total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread: a task owns one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
