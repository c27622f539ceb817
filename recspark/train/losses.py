"""Losses per row: the loop weighs rows and adds them up over all ranks."""

from __future__ import annotations

import torch


def multinomial_nll(
    logits: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return -sum_i x_i log softmax(logits)_i of each row, (B,).

    Parameters
    ----------
    logits : (B, n_items)
    rows, items, weights : (P,) each: entry p says that x[rows[p], items[p]] = weights[p]; the rest
        is 0

    Source: Liang et al. 2018, equation 2.
    """
    log_sum = torch.logsumexp(logits, dim=1)  # (B,)
    terms = weights * (log_sum[rows] - logits[rows, items])  # (P,)
    return torch.zeros_like(log_sum).index_add(0, rows, terms)  # (B,)


def kl_to_standard_normal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, diag(exp(log_variance))) || N(0, I)) of each row, (B,); both are (B, Z).

    Source: Kingma & Welling 2014, appendix B.
    """
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1)  # (B,)
