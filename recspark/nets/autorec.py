"""AutoRec: an autoencoder of a row of ratings, whose loss counts only the ratings in the row.

Source: Sedhain, Menon, Sanner, Xie 2015, "AutoRec: Autoencoders Meet Collaborative Filtering".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

# Up to this many items, `rebuilt` computes the outputs of all items, which is then faster than
# gathering those of the entries. Measured: 500 users, 92 entries each, 500 units, one thread.
_DENSE = 15_000


class AutoRecNet(nn.Module):
    """One hidden layer and a linear output: equation 2 with f = identity and g = `activation`.

    A row x (n_items,) is given by its entries: `rows` int64 (P,) ascending, `items` int64 (P,),
    `values` (P,). For the item-based form, the rows are items and the "items" are users.
    """

    def __init__(
        self,
        n_items: int,
        hidden_size: int,
        generator: torch.Generator,
        activation: Literal["tanh", "sigmoid"] = "sigmoid",
    ) -> None:
        super().__init__()
        self._activate = torch.tanh if activation == "tanh" else torch.sigmoid

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_normal_(torch.empty(*shape), generator=generator))

        self.items_in = matrix(n_items, hidden_size)
        self.items_in_bias = nn.Parameter(torch.zeros(hidden_size))
        self.items_out = matrix(n_items, hidden_size)
        self.items_out_bias = nn.Parameter(torch.zeros(n_items))

    def forward(
        self, rows: torch.Tensor, items: torch.Tensor, values: torch.Tensor, n_rows: int
    ) -> torch.Tensor:
        """Return the hidden layer (B, H). `rebuilt` or the top-N kernel multiplies it by
        `items_out`.
        """
        first_entries = torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))  # (B,)
        summed = F.embedding_bag(
            items, self.items_in, first_entries, mode="sum", per_sample_weights=values
        )  # (B, H)
        return self._activate(summed + self.items_in_bias)  # (B, H)

    def rebuilt(
        self, hidden: torch.Tensor, rows: torch.Tensor, items: torch.Tensor
    ) -> torch.Tensor:
        """Return the outputs at the given entries only, (Q,).

        `hidden` (B, H), `rows` and `items` (Q,). While there are few items, computing the outputs
        of all items costs a fifth of gathering those of the entries.
        """
        if len(self.items_out) <= _DENSE:
            all_outputs = hidden @ self.items_out.T + self.items_out_bias  # (B, n_items)
            return all_outputs[rows, items]  # (Q,)
        return (hidden[rows] * self.items_out[items]).sum(dim=1) + self.items_out_bias[
            items
        ]  # (Q,)
