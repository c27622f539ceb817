"""The click-through head of next-item networks: how likely is an item acted on, if it is shown?

P(click on i | state s before it is shown) = sigmoid((s * click_scale) . items_out_i + click_bias_i):
a logistic unit on the recurrent state, after Zhang et al. 2014, "Sequential Click Prediction for
Sponsored Search with Recurrent Neural Networks", here for every item at once. The next item is
learnt beside it, from the same states and item vectors, as Zhou et al. 2019 do ("Deep Interest
Evolution Network for Click-Through Rate Prediction", the auxiliary loss of section 4.3); the scale
lets each score use the parts of a vector that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyspark.sql import functions as F
from torch.nn import functional

from recspark.data.dataset import Dataset, TrainingSet
from recspark.errors import ModelError
from recspark.models.neural import local_index
from recspark.nets.sequence import SequenceNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch

COLUMNS = ("shown", "shown_after", "clicked")
_PRIOR = 10.0  # impressions at the rate of all items, on top of an item's own, to begin with. Guess


@dataclass(frozen=True)
class Shown:
    """The impressions of a batch that count.

    Parameters
    ----------
    rows : int64 (S,), the row of each
    places : int64 (S,), of the item before it, among those that `local_items` returns
    items : int64 (S,), local
    clicked : float32 (S,), 0 or 1
    """

    rows: torch.Tensor
    places: torch.Tensor
    items: torch.Tensor
    clicked: torch.Tensor


def shown_items(batch: Batch, vocabulary: torch.Tensor, length: int) -> Shown:
    """Return the impressions after one of the row's newest `length` known items.

    Left out: padding, items outside the vocabulary, rows of weight 0.
    """
    _, known = local_index(batch.tensors["items"], vocabulary)  # (B, L)
    read = functional.pad(known.long().cumsum(dim=1), (1, 0))  # (B, L + 1): known, of the first n
    left_out = (read[:, -1:] - length).clamp_min(0)  # (B, 1)
    after = batch.tensors["shown_after"].long()  # (B, M)
    places = read.gather(1, after) - 1 - left_out  # (B, M)
    local, is_known = local_index(batch.tensors["shown"], vocabulary)  # (B, M) each
    counted = is_known & (places >= 0) & (batch.weight[:, None] > 0)  # (B, M)
    rows, columns = torch.nonzero(counted, as_tuple=True)  # (S,) each
    clicked = batch.tensors["clicked"][rows, columns].float()  # (S,)
    return Shown(rows, places[rows, columns], local[rows, columns], clicked)


def logits(net: SequenceNet, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return the log odds of a click on each local item, int64 (S,), in its state (S, H): (S,)."""
    scaled = states * net.click_scale  # (S, H)
    return (scaled * net.scored(items)).sum(dim=1) + net.click_bias[items]  # (S,)


def losses(net: SequenceNet, states: torch.Tensor, shown: Shown) -> torch.Tensor:
    """Return the binary cross-entropy of each impression, (S,). `states` (B, T, H) of the batch."""
    found = logits(net, states[shown.rows, shown.places], shown.items)  # (S,)
    return functional.binary_cross_entropy_with_logits(
        found.float(), shown.clicked, reduction="none"
    )


def rates(
    comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor, length: int
) -> torch.Tensor:
    """Return the share of each item's impressions that were clicked, of all ranks: (n_items,).

    In (0, 1): `_PRIOR` impressions at the rate of all items are added to each item's own, and one
    impression with half a click to those.
    """
    counts = torch.zeros(2, len(vocabulary))  # (2, n_items): impressions, clicks
    for batch in batches:
        shown = shown_items(batch, vocabulary, length)
        counts[0].index_add_(0, shown.items, torch.ones_like(shown.clicked))
        counts[1].index_add_(0, shown.items, shown.clicked)
    n_shown, n_clicked = comm.allreduce(counts)  # (n_items,) each
    overall = (n_clicked.sum() + 0.5) / (n_shown.sum() + 1)  # ()
    return (n_clicked + _PRIOR * overall) / (n_shown + _PRIOR)  # (n_items,)


def check_impressions(name: str, data: Dataset, training: TrainingSet) -> None:
    """Raise ModelError where the training set holds no impression. One small job."""
    files = [uri for uri, rows in training.files if rows]
    rows = data.histories.sparkSession.read.parquet(*files) if files else None
    if rows is not None and rows.where(F.col("shown")[0] >= 0).isEmpty():
        raise ModelError(
            f"{name}: head = 'click_through' learns from impressions, and '{training.table}' version "
            f"{training.version} has none before {data.cutoff:%Y-%m-%d}; bring events of a type in "
            f"sessions.impression_types, or set models.{name}.head=next_item"
        )
