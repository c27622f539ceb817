"""The loss of user towers: a softmax over drawn items, which all examples of a batch share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from recspark.train.losses import softmax_nll
from recspark.train.negatives import Negatives

# local items int64 (N,) -> the scores of these items for each example, (P, N)
ScoresOf = Callable[[torch.Tensor], torch.Tensor]


def sampled_softmax(
    scores_of: ScoresOf,
    targets: torch.Tensor,
    target_ages: torch.Tensor,
    negatives: Negatives,
    oldest: torch.Tensor | None,
    logq: bool,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the loss of each example, (P,).

    Parameters
    ----------
    targets : int64 (P,), local items
    target_ages : int64 (P,), seconds from each target to the cutoff
    oldest : int64 (n_items,), the age of each item's oldest event (`timelines.first_ages`): an item
        without an event by the time of a target does not compete with it. None = all items compete
    logq : subtract from each score the log of the probability that the item became a candidate
    """
    candidates = negatives.candidates(targets, generator)
    scores = scores_of(candidates.items)  # (P, N)
    if oldest is not None:
        is_later = oldest.to(targets.device)[candidates.items] < target_ages[:, None]  # (P, N)
        scores = scores.masked_fill(is_later, -torch.inf)
    correction = candidates.log_included if logq else scores.new_zeros(())  # (N,) or ()
    return softmax_nll(scores, candidates.targets, correction)  # (P,)
