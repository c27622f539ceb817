"""The training of `mvdnn` on one rank: the views that are learnt, and the loss of their examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from recspark.errors import ModelError
from recspark.models.neural import Job, NetworkTask, with_the_same_draws
from recspark.models.towers.item_tokens import ItemTokens
from recspark.models.towers.mvdnn_settings import MvdnnSettings
from recspark.models.towers.mvdnn_towers import TokenBags, make_net, user_tower
from recspark.models.towers.mvdnn_views import RowReader, ViewRows, view_statistics
from recspark.models.towers.sampled_softmax import sampled_softmax
from recspark.models.towers.timelines import COLUMNS, Examples, drawn_examples, mean_per_row
from recspark.nets.mvdnn import MvdnnNet, ViewHistories
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.loop import Trained
from recspark.train.negatives import Negatives


def train_rank(known: ItemTokens, comm: Comm, job: Job) -> Trained:
    """Train on one rank; see `recspark.train.launch`. `known`: the tokens of the vocabulary."""
    settings: MvdnnSettings = job.settings
    columns = COLUMNS if settings.view_by == "category" else (*COLUMNS, "types")
    task = NetworkTask(comm, job, columns)
    reader = RowReader(settings, task.vocabulary, torch.from_numpy(known.views).long())
    oldest, counts, n_users = view_statistics(comm, task.feed.epoch(0), reader)
    views = views_to_learn(settings, oldest, counts, n_users, task.feed.n_rows_of_all)
    if not views:
        raise ModelError(
            f"mvdnn: no user has an event in the views {[*settings.view_names]} after an earlier "
            "one, so there is nothing to learn; correct models.mvdnn.views"
        )
    net = make_net(settings, task.n_items, task.seed)
    net.view_users.data = settings.learnable(n_users).float()  # (V,)
    loss: Any = partial(row_loss, net, reader, TokenBags(known), views)
    return task.train(net, loss, with_the_same_draws(loss))


@dataclass(frozen=True)
class View:
    """What the loss needs of a view.

    `items` int64 (n,), ascending local items: those with an event in the view, which compete for
    its targets. `oldest` int64 (n,): the age of each one's oldest event in the view. `weight` : what
    the mean loss of a user in this view counts.
    """

    number: int
    items: torch.Tensor
    oldest: torch.Tensor
    negatives: Negatives
    weight: float


def views_to_learn(
    settings: MvdnnSettings,
    oldest: torch.Tensor,
    counts: torch.Tensor,
    n_users: torch.Tensor,
    n_rows: int,
) -> list[View]:
    """Return the views that have targets; the other arguments are those of `view_statistics`.

    The loop divides the sum of the losses of all rows by `n_rows`. With the weights made here, the
    result is the mean over views of the mean over the users of a view (`view_balance` 1), or the
    mean over all pairs of a user and a view (0).
    """
    learnt = [view for view, n in enumerate(settings.learnable(n_users).tolist()) if n > 0]
    shares = n_users[learnt] ** (1 - settings.view_balance)  # of each view in the loss
    weights = (n_rows * shares / shares.sum() / n_users[learnt]).tolist()
    views = []
    for view, weight in zip(learnt, weights, strict=True):
        items = torch.nonzero(oldest[view] >= 0)[:, 0]  # (n,)
        negatives = Negatives(counts[view][items], settings.n_samples, settings.sample_alpha)
        views.append(View(view, items, oldest[view][items], negatives, weight))
    return views


def row_loss(
    net: MvdnnNet,
    reader: RowReader,
    bags: TokenBags,
    views: Sequence[View],
    batch: Batch,
    generator: torch.Generator,
    done: float,
) -> torch.Tensor:
    """Return the loss of each row (user), (B,): over its views, the weighted mean of its examples.

    `done` is not used.
    """
    settings, rows = reader.settings, reader.rows(batch)
    items = rows.timelines.items  # (B, L)
    embedded = net.read(items.clamp_min(0)) * (items >= 0)[:, :, None]  # (B, L, E)
    histories = ViewHistories(embedded, rows.views, len(settings.view_names))
    loss = embedded.new_zeros(len(items))  # (B,)
    for view in views:
        is_target = rows.is_target & (rows.views == view.number)  # (B, L)
        examples = drawn_examples(is_target, settings.n_examples, generator)
        losses = example_losses(
            net, settings, bags, view, rows, histories, examples, generator
        )  # (P,)
        loss = loss + view.weight * mean_per_row(losses, examples.rows, len(items))
    return loss


def example_losses(
    net: MvdnnNet,
    settings: MvdnnSettings,
    bags: TokenBags,
    view: View,
    rows: ViewRows,
    histories: ViewHistories,
    examples: Examples,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the sampled softmax loss of each example of a view, (P,).

    An example reads only events that are older than its target. All examples of the view share the
    candidates, which are items of the view.
    """
    place = examples.rows, examples.ends
    n_older = rows.n_older[place]  # (P,)
    means, numbers = histories.before(examples.rows, n_older, settings.window)
    draws = torch.rand(len(n_older), generator=generator, device=n_older.device)  # (P,)
    is_known_elsewhere = numbers.sum(dim=1) > numbers[:, view.number]  # (P,)
    is_hidden = torch.zeros_like(numbers, dtype=torch.bool)  # (P, V)
    is_hidden[:, view.number] = (draws < settings.own_view_dropout) & is_known_elsewhere
    means = means.masked_fill(is_hidden[:, :, None], 0)  # (P, V, E)
    users = user_tower(net, settings, means, numbers.masked_fill(is_hidden, 0))  # (P, H)
    items = view.items.to(n_older.device)  # (n,)

    def scores_of(candidates: torch.Tensor) -> torch.Tensor:
        vectors = net.items(view.number, bags.of(items[candidates]))  # (N, H)
        return users @ vectors.T / settings.temperature  # (P, N)

    return sampled_softmax(
        scores_of,
        torch.searchsorted(items, rows.timelines.items[place]),
        rows.timelines.ages[place],
        view.negatives,
        view.oldest if settings.existing_only else None,
        settings.logq,
        generator,
    )
