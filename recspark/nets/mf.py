"""Matrix factorisation as the network that it is: one-hot user and item, two embeddings, a dot.

Source: Koren, Bell, Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems".
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class MfNet(nn.Module):
    """Two embedding tables, whose gradients are sparse: a step moves the rows that it reads."""

    sparse_parameters = frozenset({"users", "items"})

    def __init__(
        self, n_users: int, n_items: int, embedding_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def table(n: int) -> nn.Parameter:
            start = torch.empty(n, embedding_size)
            return nn.Parameter(nn.init.normal_(start, std=0.1, generator=generator))

        self.users = table(n_users)
        self.items = table(n_items)

    def user(self, index: torch.Tensor) -> torch.Tensor:
        """Return user vectors, (..., D), of `index` int64 (...)."""
        return F.embedding(index, self.users, sparse=True)

    def item(self, index: torch.Tensor) -> torch.Tensor:
        """Return item vectors, (..., D), of `index` int64 (...)."""
        return F.embedding(index, self.items, sparse=True)
