"""The ranking network of YouTube: embeddings, and numbers with their squares and roots.

Source: Covington, Adams, Sargin 2016, "Deep Neural Networks for YouTube Recommendations", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from recspark.nets.fields import Tower, embedding_table, number_inputs

POWERS = (1.0, 2.0, 0.5)  # of the position of a number


class YoutubeRankNet(nn.Module):
    """A tower that reads the embedding of each field, and each number as x, x^2 and sqrt(x)."""

    def __init__(
        self,
        n_codes: int,
        n_fields: int,
        n_numbers: int,
        embedding_size: int,
        hidden_sizes: Sequence[int],
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = embedding_table(n_codes, embedding_size, generator)
        n_inputs = n_fields * embedding_size + (len(POWERS) + 1) * n_numbers
        self.tower = Tower(
            n_inputs, hidden_sizes, generator, dropout=dropout, batch_norm=batch_norm
        )

    def forward(self, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the log odds of each row, (B,).

        `codes` int64 (B, n_fields); `positions` (B, n_numbers), NaN = missing.
        """
        embedded = self.embedding[codes].flatten(1)  # (B, n_fields * D)
        numbers = number_inputs(positions, POWERS)  # (B, n_numbers * 4)
        return self.tower(torch.cat([embedded, numbers], dim=1))
