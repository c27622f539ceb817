"""A wide linear part on crossed features beside a deep tower, with one logit.

Source: Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from recspark.nets.fields import Tower, embedding_table, number_inputs


class WideDeepNet(nn.Module):
    """Logit = sum of the wide weights that a row reads + output of the tower.

    `wide` (n_wide_rows, 1) starts at 0 and is read with sparse gradients. `wide_seen`
    (n_wide_rows, 1) is not trained: 1 where some training row reads the weight.

    Parameters
    ----------
    n_wide_rows : weights of the wide part
    n_codes : codes of all fields that the tower embeds, (n_fields,) of them for each row
    n_numbers : numbers that the tower reads
    """

    sparse_parameters = frozenset({"wide", "wide_seen"})

    def __init__(
        self,
        n_wide_rows: int,
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
        self.wide = nn.Parameter(torch.zeros(n_wide_rows, 1))
        self.wide_seen = nn.Parameter(torch.zeros(n_wide_rows, 1), requires_grad=False)
        self.embedding = embedding_table(n_codes, embedding_size, generator)
        n_inputs = n_fields * embedding_size + 2 * n_numbers
        self.tower = Tower(
            n_inputs, hidden_sizes, generator, dropout=dropout, batch_norm=batch_norm
        )

    def forward(
        self, wide_rows: torch.Tensor, codes: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the logit of each row, (B,).

        `wide_rows` int64 (B, W) and `codes` int64 (B, n_fields): the rows of the two tables;
        `positions` (B, n_numbers), NaN = missing.
        """
        wide = F.embedding(wide_rows, self.wide, sparse=True).sum(dim=(1, 2))  # (B,)
        embedded = self.embedding[codes].flatten(1)  # (B, n_fields * D)
        return wide + self.tower(torch.cat([embedded, number_inputs(positions)], dim=1))  # (B,)
