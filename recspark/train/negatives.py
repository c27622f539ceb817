"""Candidates of a step: what the targets of a batch are told apart from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """Different items, shared by all rows of a batch.

    Parameters
    ----------
    items : int64 (N,), ascending
    targets : int64 (P,), the place of each row's target in `items`
    log_included : (N,), log of the probability that the item is among them
    """

    items: torch.Tensor
    targets: torch.Tensor
    log_included: torch.Tensor


class Negatives:
    """Draws candidates: the targets of the batch, and `n_samples` items by popularity^alpha.

    A target of one row is a negative of the others (in-batch), whether drawn or not. The draw is
    exact, with replacement; an item counts once, so that no target is its own negative.

    Parameters
    ----------
    counts : (n_items,), how often each item occurs in the training set; an item counts a hundredth
        of the mean on top, so that every item is drawn
    n_samples : None = all items are candidates, always
    alpha : 1 draws by popularity, 0 evenly
    """

    def __init__(self, counts: torch.Tensor, n_samples: int | None, alpha: float) -> None:
        smoothed = counts.double() + 0.01 * counts.double().mean()  # (n_items,)
        self.share = smoothed / smoothed.sum()  # (n_items,)
        self.n_samples = n_samples
        powers = self.share**alpha  # (n_items,)
        self._draw = powers / powers.sum()  # (n_items,)
        self._cumulative = torch.cumsum(self._draw, 0)  # (n_items,)

    def candidates(self, targets: torch.Tensor, generator: torch.Generator) -> Candidates:
        """Return the candidates for `targets`, int64 (P,).

        An item is included with probability 1 - (1 - q)^n_samples (1 - p)^P, of its share q of a
        draw and its share p of the training set.
        """
        n_items, device = len(self.share), targets.device
        if self.n_samples is None:
            zeros = torch.zeros(n_items, device=device)  # (n_items,)
            return Candidates(torch.arange(n_items, device=device), targets, zeros)
        self._move(device)
        uniform = torch.rand(
            self.n_samples, generator=generator, dtype=torch.float64, device=device
        )  # (S,)
        drawn = torch.searchsorted(self._cumulative, uniform * self._cumulative[-1])  # (S,)
        items = torch.unique(torch.cat([targets, drawn.clamp_max(n_items - 1)]))  # (N,)
        log_missed = self.n_samples * torch.log1p(-self._draw[items]) + len(targets) * torch.log1p(
            -self.share[items]
        )  # (N,)
        log_included = torch.log(-torch.expm1(log_missed)).float()  # (N,)
        return Candidates(items, torch.searchsorted(items, targets), log_included)

    def _move(self, device: torch.device) -> None:
        """Keep what is drawn from where the targets are."""
        if self.share.device != device:
            self.share, self._draw, self._cumulative = (
                values.to(device) for values in (self.share, self._draw, self._cumulative)
            )
