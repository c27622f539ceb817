"""Mult-VAE: a variational autoencoder of a user's items with a multinomial likelihood.

Source: Liang, Krishnan, Hoffman, Jebara 2018, "Variational Autoencoders for Collaborative
Filtering".
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class MultVaeNet(nn.Module):
    """One hidden tanh layer before the latent vector and one behind it.

    A user's row x (n_items,) is given by its entries: `rows` int64 (P,) ascending, `items` int64
    (P,), `weights` (P,). So the cost of the first layer grows with the entries, not with the
    catalogue.
    """

    def __init__(
        self, n_items: int, hidden_size: int, latent_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_normal_(torch.empty(*shape), generator=generator))

        self.items_in = matrix(n_items, hidden_size)
        self.items_in_bias = nn.Parameter(torch.zeros(hidden_size))
        self.to_latent = matrix(hidden_size, 2 * latent_size)
        self.to_latent_bias = nn.Parameter(torch.zeros(2 * latent_size))
        self.from_latent = matrix(latent_size, hidden_size)
        self.from_latent_bias = nn.Parameter(torch.zeros(hidden_size))
        self.items_out = matrix(n_items, hidden_size)
        self.items_out_bias = nn.Parameter(torch.zeros(n_items))

    def forward(
        self,
        rows: torch.Tensor,
        items: torch.Tensor,
        weights: torch.Tensor,
        n_rows: int,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (B, n_items), and mean (B, Z) and log variance (B, Z) of the latent vector.

        With a `generator`, entries are dropped and the latent vector is sampled. Without one,
        nothing is random, and the latent vector is its mean.
        """
        squares = weights.new_zeros(n_rows).index_add(0, rows, weights**2)  # (B,)
        weights = weights / squares.sqrt().clamp_min(1e-12)[rows]  # (P,): each row gets length 1
        if generator is not None and dropout > 0:
            is_kept = torch.rand_like(weights, generator=generator) >= dropout  # (P,)
            weights = weights * is_kept / (1 - dropout)  # (P,)
        first_entries = torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))  # (B,)
        summed = F.embedding_bag(
            items, self.items_in, first_entries, mode="sum", per_sample_weights=weights
        )  # (B, H)
        hidden = torch.tanh(summed + self.items_in_bias)  # (B, H)
        latent = hidden @ self.to_latent + self.to_latent_bias  # (B, 2 Z)
        mean, log_variance = latent.chunk(2, dim=1)  # (B, Z) each
        z = mean  # (B, Z)
        if generator is not None:
            noise = torch.randn_like(mean, generator=generator)  # (B, Z)
            z = mean + noise * torch.exp(0.5 * log_variance)  # (B, Z)
        decoded = torch.tanh(z @ self.from_latent + self.from_latent_bias)  # (B, H)
        logits = decoded @ self.items_out.T + self.items_out_bias  # (B, n_items)
        return logits, mean, log_variance
