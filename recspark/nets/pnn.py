"""A product-based network: a tower that reads embeddings and the products of pairs of them.

Source: Qu et al. 2016, "Product-based Neural Networks for User Response Prediction"; concatenated
products: Qu et al. 2018, "Product-based Neural Networks for User Response Prediction over
Multi-field Categorical Data".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from recspark.nets.fields import Tower, embedding_table

Product = Literal["inner", "outer", "both"]
Layer = Literal["concat", "decomposed"]


class PnnNet(nn.Module):
    """Layer 1 reads l_z + l_p + b: the embeddings z, and products of them.

    Inner products: `concat` reads <f_i, f_j> for each pair i < j. `decomposed` reads, for each unit
    n, sum_ij theta_i^n theta_j^n <f_i, f_j> = |sum_i theta_i^n f_i|^2, with `theta` (H1, n_fields):
    the weights of all pairs of a unit have rank 1 (the paper's section III-B), pairs i = j count,
    and the cost grows with the number of fields instead of its square.

    Outer products: the sum over all pairs of f_i f_j^T is f_S f_S^T with f_S = sum_i f_i (the
    paper's section III-C), a matrix (D, D) whose entries layer 1 reads, in both forms.
    """

    def __init__(
        self,
        n_codes: int,
        n_fields: int,
        embedding_size: int,
        hidden_sizes: Sequence[int],
        product: Product,
        layer: Layer,
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.product, self.layer = product, layer
        self.embedding = embedding_table(n_codes, embedding_size, generator)
        n_inputs = n_fields * embedding_size
        has_inner, has_outer = product in ("inner", "both"), product in ("outer", "both")
        self.theta: nn.Parameter | None = None
        if has_inner and layer == "decomposed":
            values = torch.empty(hidden_sizes[0], n_fields)
            self.theta = nn.Parameter(nn.init.xavier_normal_(values, generator=generator))
        elif has_inner:
            n_inputs += n_fields * (n_fields - 1) // 2
        if has_outer:
            n_inputs += embedding_size**2
        self.has_pairs, self.has_outer = has_inner and layer == "concat", has_outer
        self.tower = Tower(
            n_inputs, hidden_sizes, generator, dropout=dropout, batch_norm=batch_norm
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the logit of each row, (B,). `codes` int64 (B, n_fields)."""
        embedded = self.embedding[codes]  # (B, F, D)
        parts = [embedded.flatten(1)]  # (B, F * D)
        if self.has_pairs:
            parts.append(inner_products(embedded))  # (B, F (F - 1) / 2)
        if self.has_outer:
            parts.append(outer_product(embedded))  # (B, D * D)
        added = None if self.theta is None else decomposed_products(embedded, self.theta)  # (B, H1)
        return self.tower(torch.cat(parts, dim=1), added)  # (B,)


def inner_products(embedded: torch.Tensor) -> torch.Tensor:
    """Return <f_i, f_j> of all pairs i < j, (B, F (F - 1) / 2), of `embedded` (B, F, D)."""
    n_fields = embedded.shape[1]
    first, second = torch.triu_indices(n_fields, n_fields, 1, device=embedded.device)
    products = embedded @ embedded.transpose(1, 2)  # (B, F, F)
    return products[:, first, second]


def outer_product(embedded: torch.Tensor) -> torch.Tensor:
    """Return f_S f_S^T as (B, D * D), where f_S is the sum of the fields of `embedded` (B, F, D)."""
    total = embedded.sum(dim=1)  # (B, D)
    return (total[:, :, None] * total[:, None, :]).flatten(1)


def decomposed_products(embedded: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Return |sum_i theta_i^n f_i|^2 of each unit n, (B, H1).

    `embedded` (B, F, D); `theta` (H1, F).
    """
    mixed = theta @ embedded  # (B, H1, D)
    return (mixed**2).sum(dim=2)
