"""The click-through head of next-item networks: how likely is an item clicked if it is shown?

For an item i that is shown when the network is in state s,

    P(click on i | s) = sigmoid((s * click_scale) . items_out_i + click_bias_i)

This is a logistic unit on the recurrent state, after Zhang et al. 2014, "Sequential Click
Prediction for Sponsored Search with Recurrent Neural Networks", here for every item at once.

The network also learns to score the next item, from the same states and item vectors. This follows
the auxiliary loss of Zhou et al. 2019, "Deep Interest Evolution Network for Click-Through Rate
Prediction", section 4.3. `click_scale` weighs the dimensions of a state, so that the click score
and the next-item score can use different ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyspark.sql import functions as F
from torch.nn import functional

from recspark.data.dataset import Dataset, TrainingSet
from recspark.errors import ModelError
from recspark.models.neural import look_up
from recspark.nets.sequence import SequenceNet
from recspark.train.comm import Comm
from recspark.train.feed import Batch

COLUMNS = ("shown", "shown_after", "clicked")
# Impressions, clicked at the rate of all items, that are added to those of each item. Guess
_PRIOR_IMPRESSIONS = 10.0


@dataclass(frozen=True)
class Impressions:
    """The impressions of a batch that count, S of them.

    Parameters
    ----------
    rows : int64 (S,), the row of each impression
    positions : int64 (S,), the position of the last item before the impression, among the items of
        the row that `local_items` returns: the index of the state to score from
    items : int64 (S,), the local index of the item that was shown
    clicked : float32 (S,), 1 = the user acted on the item later in the same session, 0 = not
    """

    rows: torch.Tensor
    positions: torch.Tensor
    items: torch.Tensor
    clicked: torch.Tensor


def shown_items(batch: Batch, vocabulary: torch.Tensor, length: int) -> Impressions:
    """Return the impressions that come after one of the newest `length` known items of their row.

    Left out are padding, impressions of items outside the vocabulary, and rows of weight 0.

    Example: the vocabulary is [3, 5, 8], and a row has the items [3, 99, 8]. Item 5 was shown after
    the first item of the row, and item 3 after the third one: `shown` is [5, 3], and `shown_after`
    is [1, 3]. Item 99 is unknown, so item 3 comes after the second known item: local items [1, 0],
    positions [0, 1]. With `length` 1, the network reads item 8 only: the impression of item 5 is
    left out, and item 3 has position 0.
    """
    _, is_known_item = look_up(batch.tensors["items"], vocabulary)  # (B, L)
    # (B, L + 1): how many of the first n items of the row are known, for n = 0 to L
    n_known_in_first = functional.pad(is_known_item.long().cumsum(dim=1), (1, 0))
    n_too_old = (n_known_in_first[:, -1:] - length).clamp_min(0)  # (B, 1): known, but not read
    shown_after = batch.tensors["shown_after"].long()  # (B, M): items before the impression
    positions = n_known_in_first.gather(1, shown_after) - 1 - n_too_old  # (B, M)
    local, is_known = look_up(batch.tensors["shown"], vocabulary)  # (B, M) each
    is_counted = is_known & (positions >= 0) & (batch.weight[:, None] > 0)  # (B, M)
    rows, columns = torch.nonzero(is_counted, as_tuple=True)  # (S,) each
    clicked = batch.tensors["clicked"][rows, columns].float()  # (S,)
    return Impressions(rows, positions[rows, columns], local[rows, columns], clicked)


def logits(net: SequenceNet, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return the log odds of a click on each item if it is shown in its state, (S,).

    `states` (S, H); `items` int64 (S,), local.
    """
    scaled = states * net.click_scale  # (S, H)
    return (scaled * net.scored(items)).sum(dim=1) + net.click_bias[items]  # (S,)


def losses(net: SequenceNet, states: torch.Tensor, impressions: Impressions) -> torch.Tensor:
    """Return the binary cross-entropy of each impression, (S,).

    `states` (B, T, H): the state after each item that the network read, for all rows of the batch.
    """
    log_odds = logits(
        net, states[impressions.rows, impressions.positions], impressions.items
    )  # (S,)
    return functional.binary_cross_entropy_with_logits(
        log_odds.float(), impressions.clicked, reduction="none"
    )


def rates(
    comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor, length: int
) -> torch.Tensor:
    """Return the smoothed click rate of each item over the impressions of all ranks, (n_items,).

    Rates lie strictly between 0 and 1. `_PRIOR_IMPRESSIONS` impressions at the overall rate are
    added to those of each item. The overall rate is that of all items together, with one impression
    and half a click added.

    Example: 3 of 14 impressions of all items were clicked, so the overall rate is 3.5 / 15. An item
    clicked at both of its 2 impressions gets (2 + 10 * 3.5 / 15) / (2 + 10) = 0.36.
    """
    counts = torch.zeros(2, len(vocabulary))  # (2, n_items): impressions, clicks
    for batch in batches:
        impressions = shown_items(batch, vocabulary, length)
        counts[0].index_add_(0, impressions.items, torch.ones_like(impressions.clicked))
        counts[1].index_add_(0, impressions.items, impressions.clicked)
    n_shown, n_clicked = comm.allreduce(counts)  # (n_items,) each
    overall_rate = (n_clicked.sum() + 0.5) / (n_shown.sum() + 1)  # ()
    return (n_clicked + _PRIOR_IMPRESSIONS * overall_rate) / (
        n_shown + _PRIOR_IMPRESSIONS
    )  # (n_items,)


def check_impressions(name: str, data: Dataset, training: TrainingSet) -> None:
    """Raise ModelError if no row of the training set has an impression. Runs one small job."""
    files = [uri for uri, rows in training.files if rows]
    rows = data.histories.sparkSession.read.parquet(*files) if files else None
    if rows is not None and rows.where(F.col("shown")[0] >= 0).isEmpty():
        raise ModelError(
            f"{name}: head = 'click_through' learns from impressions, and '{training.table}' version "
            f"{training.version} has none before {data.cutoff:%Y-%m-%d}; bring events of a type in "
            f"sessions.impression_types, or set models.{name}.head=next_item"
        )
