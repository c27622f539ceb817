"""How next-item networks are trained: the run of one rank, and the loss of a row.

Every item of a row but the first is a target. The loss compares the target with candidates, which
all rows of a batch share.
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
    has_click_head = settings.head == "click_through"
    columns = (*_COLUMNS, *click_through.COLUMNS) if has_click_head else _COLUMNS
    task = NetworkTask(comm, job, columns)
    feed, vocabulary = task.feed, task.vocabulary
    net = make_net(settings, task.n_items, task.seed)
    if net.has_positions:
        check_length(settings, feed)
    counts = item_counts(comm, feed.epoch(0), vocabulary)  # (n_items,)
    negatives = Negatives(counts, settings.n_samples, settings.sample_alpha)
    net.items_out_bias.data = start_bias(settings, negatives.share).float()  # (n_items,)
    if has_click_head:
        rates = click_through.rates(comm, feed.epoch(0), vocabulary, settings.length)  # (n_items,)
        net.click_bias.data = torch.logit(rates).float()  # (n_items,)
    loss = partial(row_loss, net, vocabulary, settings, negatives)
    without_dropout = settings.model_copy(update={"dropout": 0.0})
    loss_without_dropout = partial(row_loss, net, vocabulary, without_dropout, negatives)
    return task.train(net, loss, with_the_same_draws(loss_without_dropout))


def start_bias(settings: NextItemSettings, share: torch.Tensor) -> torch.Tensor:
    """Return the first bias of each item, (n_items,): the best one while states tell nothing.

    Otherwise the first epochs would only learn this bias. `share` (n_items,), above 0, is each
    item's share of the items of the training rows. It stands for the item's share of the targets,
    though the first item of a row is never a target. BPR-max depends on differences of scores; only
    its penalty on squared scores singles out a bias, which is 0.
    """
    if settings.loss == "cross_entropy":
        return torch.log(share)
    # For gbce, with p an item's share of the targets, the loss of the item is smallest at the bias
    # b with beta p (1 - sigmoid(b)) = n_samples / n_items (1 - p) sigmoid(b).
    if settings.loss == "gbce":
        n_items, n_samples = len(share), settings.n_samples or 1
        power = gbce_power(n_samples, n_items, settings.calibration)
        return torch.log(power * share * n_items / (n_samples * (1 - share)))
    return torch.zeros_like(share)


def check_length(settings: NextItemSettings, feed: Feed) -> None:
    """Raise ModelError if scoring reads positions that no row of the training set reaches.

    A network with `has_positions` would have untrained vectors for these positions. The last item
    of a training row is only a target, so a row of 20 items trains 19 positions. With the
    click-through head the network reads the last item too.
    """
    width = next(feed.epoch(0)).tensors["items"].shape[1]
    n_read = width if settings.head == "click_through" else width - 1
    if settings.length > n_read:
        raise ModelError(
            f"length = {settings.length}, but a training row of {width} items teaches {n_read} places: "
            f"set length to {n_read}, or features.sequence_length to {settings.length + width - n_read}"
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
    """Return the loss of each row, summed over its targets, (B,). Rows of weight 0 have loss 0.

    Each item of a row but the first is a target of the state after the items before it. With the
    head `click_through`, each impression adds its loss, which comes from the state before the
    impression.

    Example, head `next_item`: of a row with the local items [4, 7, 1], the network reads [4, 7].
    The state after 4 has target 7, and the state after 7 has target 1. With `click_through` the
    network reads item 1 too, because impressions may follow it.
    """
    has_click_head = settings.head == "click_through"
    items = local_items(batch, vocabulary, settings.length + (not has_click_head))  # (B, L)
    inputs, targets = items if has_click_head else items[:, :-1], items[:, 1:]  # (B, T), (B, L - 1)
    embedded = net.read(inputs.clamp_min(0))  # (B, T, E)
    lengths = (inputs >= 0).sum(dim=1).clamp_min(1)  # (B,)
    states = net.states(embedded, lengths, settings.dropout, generator)  # (B, T, H)
    is_target = (targets >= 0) & (batch.weight[:, None] > 0)  # (B, L - 1)
    rows, columns = torch.nonzero(is_target, as_tuple=True)  # (P,) each
    states_of_targets = states[rows, columns]  # (P, H): the state before each target
    losses = target_losses(
        net, states_of_targets, targets[rows, columns], settings, negatives, generator
    )  # (P,)
    total = losses.new_zeros(len(items)).index_add(0, rows, losses)  # (B,)
    if has_click_head:
        impressions = click_through.shown_items(batch, vocabulary, settings.length)
        click_losses = settings.click_weight * click_through.losses(
            net, states, impressions
        )  # (S,)
        total = total.index_add(0, impressions.rows, click_losses.to(total.dtype))  # (B,)
    return total


def target_losses(
    net: SequenceNet,
    states: torch.Tensor,
    targets: torch.Tensor,
    settings: NextItemSettings,
    negatives: Negatives,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the loss of each target, (P,), by `settings.loss`.

    `states` (P, H): the state before each target. `targets` int64 (P,): local items.
    """
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
    """Return the gBCE loss of each target, (P,).

    `states` (P, H): the state before each target. `targets` int64 (P,): local items.

    All targets of a batch are compared with the same `n_samples` drawn items; the paper draws items
    for each target. This way all scores are one product of two matrices, instead of one product for
    each target. A drawn item that equals a target does not count for that target.
    """
    n_items, n_drawn = len(net.items_out_bias), settings.n_samples or 1
    drawn = torch.randint(n_items, (n_drawn,), generator=generator, device=targets.device)  # (N,)
    scores = states @ net.scored(drawn).T + net.items_out_bias[drawn]  # (P, N)
    target_scores = (states * net.scored(targets)).sum(dim=1) + net.items_out_bias[targets]  # (P,)
    power = gbce_power(n_drawn, n_items, settings.calibration)
    return gbce(target_scores, scores, drawn != targets[:, None], power)  # (P,)


def item_counts(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return how often each item occurs in the rows of all ranks, float64 (n_items,)."""
    # (n_items,): float64, because float32 cannot count beyond 2^24
    total = torch.zeros(len(vocabulary), dtype=torch.float64)
    for batch in batches:
        items = local_items(batch, vocabulary, batch.tensors["items"].shape[1])  # (B, L)
        rows, columns = torch.nonzero(items >= 0, as_tuple=True)  # (P,) each
        total.index_add_(0, items[rows, columns], batch.weight[rows].double())
    return comm.allreduce(total)
