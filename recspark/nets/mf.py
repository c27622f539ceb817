"""Matrix factorisation as a network: one embedding per user and per item, and their dot product.

Each item also has a bias, which is added to its score.

Source: Koren, Bell, Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems".
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class MfNet(nn.Module):
    """Embedding tables with sparse gradients: a step updates only the rows that it reads.

    An item's bias is the sum of two parts. `items_share` (n_items, 1) is the log of the item's
    share of the training set; it is not trained, but is saved with the trained parameters.
    `items_bias` (n_items, 1) is trained, and weight decay draws it, not the share, to 0.
    """

    sparse_parameters = frozenset({"users", "items", "items_bias", "items_share"})

    def __init__(
        self, n_users: int, n_items: int, embedding_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def table(n_rows: int) -> nn.Parameter:
            values = torch.empty(n_rows, embedding_size)
            return nn.Parameter(nn.init.normal_(values, std=0.1, generator=generator))

        self.users = table(n_users)
        self.items = table(n_items)
        self.items_bias = nn.Parameter(torch.zeros(n_items, 1))
        self.items_share = nn.Parameter(torch.zeros(n_items, 1))

    def user(self, index: torch.Tensor) -> torch.Tensor:
        """Return the vectors, (..., D), of the users `index` int64 (...)."""
        return F.embedding(index, self.users, sparse=True)

    def item(self, index: torch.Tensor) -> torch.Tensor:
        """Return the vectors, (..., D), of the items `index` int64 (...)."""
        return F.embedding(index, self.items, sparse=True)

    def bias(self, index: torch.Tensor) -> torch.Tensor:
        """Return the biases, (...), of the items `index` int64 (...)."""
        trained_bias = F.embedding(index, self.items_bias, sparse=True)  # (..., 1)
        return (trained_bias + self.items_share.detach()[index])[..., 0]
