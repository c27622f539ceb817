"""Candidates of a training step: the items that the targets of a batch compete with."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """Different items, shared by all rows of a batch.

    Parameters
    ----------
    items : int64 (N,), ascending
    targets : int64 (P,), the index of each row's target in `items`
    log_included : (N,), log of the probability that the item is among the candidates
    """

    items: torch.Tensor
    targets: torch.Tensor
    log_included: torch.Tensor


class Negatives:
    """Draws candidates: the targets of the batch, and `n_samples` items by popularity^alpha.

    The target of one row is a negative of all other rows (in-batch), whether it is drawn or not.
    The draw is exact, and with replacement. An item that is drawn twice, or is also a target, is
    one candidate, so that no target is its own negative.

    Parameters
    ----------
    counts : (n_items,), how often each item occurs in the training set. A hundredth of the mean
        count is added to each, so that every item can be drawn
    n_samples : number of draws; None = all items are always candidates
    alpha : 1 draws items by their popularity, 0 draws all with equal probability
    """

    def __init__(self, counts: torch.Tensor, n_samples: int | None, alpha: float) -> None:
        smoothed_counts = counts.double() + 0.01 * counts.double().mean()  # (n_items,)
        self.share = smoothed_counts / smoothed_counts.sum()  # (n_items,)
        self.n_samples = n_samples
        powers = self.share**alpha  # (n_items,)
        self._draw_share = powers / powers.sum()  # (n_items,)
        self._cumulative = torch.cumsum(self._draw_share, 0)  # (n_items,)

    def candidates(self, targets: torch.Tensor, generator: torch.Generator) -> Candidates:
        """Return the candidates for `targets`, int64 (P,).

        An item is among the candidates with probability 1 - (1 - q)^n_samples (1 - p)^P. q is the
        probability that one draw gives the item, and p is the item's share of the training set.

        Example: items 0 to 4, targets [3, 1, 3] and draws [1, 4] give the candidates [1, 3, 4],
        among which the targets have the indices [1, 0, 1].
        """
        n_items, device = len(self.share), targets.device
        if self.n_samples is None:
            zeros = torch.zeros(n_items, device=device)  # (n_items,)
            return Candidates(torch.arange(n_items, device=device), targets, zeros)
        self._move_to(device)
        uniform = torch.rand(
            self.n_samples, generator=generator, dtype=torch.float64, device=device
        )  # (S,)
        drawn_items = torch.searchsorted(self._cumulative, uniform * self._cumulative[-1])  # (S,)
        items = torch.unique(torch.cat([targets, drawn_items.clamp_max(n_items - 1)]))  # (N,)
        log_not_included = self.n_samples * torch.log1p(-self._draw_share[items]) + len(
            targets
        ) * torch.log1p(-self.share[items])  # (N,)
        log_included = torch.log(-torch.expm1(log_not_included)).float()  # (N,)
        return Candidates(items, torch.searchsorted(items, targets), log_included)

    def _move_to(self, device: torch.device) -> None:
        """Move what items are drawn from to the device of the targets; the tensors stay there."""
        if self.share.device != device:
            self.share, self._draw_share, self._cumulative = (
                values.to(device) for values in (self.share, self._draw_share, self._cumulative)
            )
