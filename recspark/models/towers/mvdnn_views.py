"""Views of events: which view each event is in, and what the training rows say of each view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recspark.data.training_rows import type_code
from recspark.models.towers.mvdnn_settings import MvdnnSettings
from recspark.models.towers.timelines import Timelines, timelines_of
from recspark.train.comm import Comm
from recspark.train.feed import Batch


def event_views(
    settings: MvdnnSettings,
    item_views: torch.Tensor,
    items: torch.Tensor,
    types: torch.Tensor | None,
) -> torch.Tensor:
    """Return the view of each event, int64, in the shape of `items`; -1 = none.

    `items` int64 (...): local items, padding is -1. `item_views` int64 (n_items,). `types` int64
    (...): codes of the event types, where these decide.
    """
    if settings.view_by == "category":
        views = item_views.to(items.device)[items.clamp_min(0)]
    else:
        assert types is not None
        views = torch.full_like(items, -1)
        for view, names in enumerate(settings.views.values()):
            if not names:
                views[:] = view
        for view, names in enumerate(settings.views.values()):
            for name in names:
                views = views.masked_fill(types == type_code(name), view)
    return views.masked_fill(items < 0, -1)


@dataclass(frozen=True)
class ViewRows:
    """The rows of a batch: `timelines`, and beside each item (B, L) the view of its event.

    `views` int64: -1 = in no view, and in the padding. `n_older` int64: how many events of the row
    are older than the event, in seconds. `is_target` bool: some older event is in a view.
    """

    timelines: Timelines
    views: torch.Tensor
    n_older: torch.Tensor
    is_target: torch.Tensor


@dataclass(frozen=True)
class RowReader:
    """Reads batches of `training_timelines`.

    `vocabulary` int64 (n_items,), ascending; `item_views` int64 (n_items,), the view of each item.
    """

    settings: MvdnnSettings
    vocabulary: torch.Tensor
    item_views: torch.Tensor

    def rows(self, batch: Batch) -> ViewRows:
        """Return the rows of a batch. Rows of weight 0 have no target."""
        timelines = timelines_of(batch, self.vocabulary)
        items, ages = timelines.items, timelines.ages  # (B, L) each
        views = event_views(self.settings, self.item_views, items, timelines.types)  # (B, L)
        place = torch.arange(items.shape[1], device=items.device)  # (L,)
        is_new_time = torch.ones_like(items, dtype=torch.bool)  # (B, L)
        is_new_time[:, 1:] = ages[:, 1:] < ages[:, :-1]
        n_older = torch.where(is_new_time, place, 0).cummax(dim=1).values  # (B, L)
        n_in_views = torch.nn.functional.pad((views >= 0).cumsum(dim=1), (1, 0))  # (B, L + 1)
        is_target = (views >= 0) & (batch.weight[:, None] > 0) & (n_in_views.gather(1, n_older) > 0)
        return ViewRows(timelines, views, n_older, is_target)


def view_statistics(
    comm: Comm, batches: Iterator[Batch], reader: RowReader
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the rows of all ranks say of each item in each view; V views.

    - int64 (V, n_items): the age of the item's oldest event in the view; -1 = it has none
    - float64 (V, n_items): how often the item is expected as a target of the view in an epoch
    - float64 (V,): the number of users with a target in the view
    """
    n_views, n_items = len(reader.settings.view_names), len(reader.vocabulary)
    oldest = torch.full((n_views, n_items), -1)
    counts = torch.zeros(n_views, n_items, dtype=torch.float64)
    n_users = torch.zeros(n_views, dtype=torch.float64)
    for batch in batches:
        rows = reader.rows(batch)
        items, ages = rows.timelines.items, rows.timelines.ages  # (B, L) each
        for view in range(n_views):
            is_in = (rows.views == view) & (batch.weight[:, None] > 0)  # (B, L)
            oldest[view].scatter_reduce_(0, items[is_in], ages[is_in], "amax")
            is_target = is_in & rows.is_target  # (B, L)
            n_targets = is_target.sum(dim=1)  # (B,)
            chance = (reader.settings.n_examples / n_targets.double()).clamp_max(1)  # (B,)
            row, column = torch.nonzero(is_target, as_tuple=True)  # (P,) each
            counts[view].index_add_(0, items[row, column], chance[row])
            n_users[view] += (n_targets > 0).sum()
    oldest = comm.allgather(oldest[None]).amax(dim=0)
    return oldest, comm.allreduce(counts), comm.allreduce(n_users)
