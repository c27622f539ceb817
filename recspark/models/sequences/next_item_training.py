"""How next-item networks are trained: a rank's run, and the loss of a row.

Every item of a row but the first is a target, told apart from candidates that the batch shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from recspark.errors import ModelError
from recspark.models.neural import Job, NetworkTask, local_items, with_the_same_draws
from recspark.models.sequences import click_through
from recspark.models.sequences.next_item_settings import NextItemSettings
from recspark.nets.sequence import SequenceNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed
from recspark.train.loop import Trained
from recspark.train.losses import bpr_max, gbce, gbce_power, softmax_nll
from recspark.train.negatives import Negatives

MakeNet = Callable[[Any, int, int], SequenceNet]  # settings, n_items, seed

_COLUMNS = ("items",)


def train_rank(make_net: MakeNet, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`."""
    settings: NextItemSettings = job.settings
    clicks = settings.head == "click_through"
    columns = (*_COLUMNS, *click_through.COLUMNS) if clicks else _COLUMNS
    task = NetworkTask(comm, job, columns)
    feed, vocabulary = task.feed, task.vocabulary
    net = make_net(settings, task.n_items, task.seed)
    if net.has_positions:
        check_length(settings, feed)
    counts = item_counts(comm, feed.epoch(0), vocabulary)  # (n_items,)
    negatives = Negatives(counts, settings.n_samples, settings.sample_alpha)
    net.items_out_bias.data = start_bias(settings, negatives.share).float()  # (n_items,)
    if clicks:
        rates = click_through.rates(comm, feed.epoch(0), vocabulary, settings.length)  # (n_items,)
        net.click_bias.data = torch.logit(rates).float()  # (n_items,)
    loss = partial(row_loss, net, vocabulary, settings, negatives)
    no_dropout = settings.model_copy(update={"dropout": 0.0})
    still = partial(row_loss, net, vocabulary, no_dropout, negatives)
    return task.train(net, loss, with_the_same_draws(still))


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
    embedded = net.read(read.clamp_min(0))  # (B, T, E)
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
    vectors = net.scored(candidates.items)  # (N, H)
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
    scores = states @ net.scored(drawn).T + net.items_out_bias[drawn]  # (P, N)
    positive = (states * net.scored(targets)).sum(dim=1) + net.items_out_bias[targets]  # (P,)
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
