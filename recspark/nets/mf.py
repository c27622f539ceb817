"""Matrix factorisation as the network that it is: one-hot user and item, two embeddings, a dot.

An item's score has a bias beside it.

Source: Koren, Bell, Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems".
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class MfNet(nn.Module):
    """Embedding tables, whose gradients are sparse: a step moves the rows that it reads.

    An item's bias is its log share of the training set, `items_share` (n_items, 1), which is not
    trained but kept with what is, and `items_bias` (n_items, 1): weight decay holds that, not the
    share, to 0.
    """

    sparse_parameters = frozenset({"users", "items", "items_bias", "items_share"})

    def __init__(
        self, n_users: int, n_items: int, embedding_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()

        def table(n: int) -> nn.Parameter:
            start = torch.empty(n, embedding_size)
            return nn.Parameter(nn.init.normal_(start, std=0.1, generator=generator))

        self.users = table(n_users)
        self.items = table(n_items)
        self.items_bias = nn.Parameter(torch.zeros(n_items, 1))
        self.items_share = nn.Parameter(torch.zeros(n_items, 1))

    def user(self, index: torch.Tensor) -> torch.Tensor:
        """Return user vectors, (..., D), of `index` int64 (...)."""
        return F.embedding(index, self.users, sparse=True)

    def item(self, index: torch.Tensor) -> torch.Tensor:
        """Return item vectors, (..., D), of `index` int64 (...)."""
        return F.embedding(index, self.items, sparse=True)

    def bias(self, index: torch.Tensor) -> torch.Tensor:
        """Return item biases, (...), of `index` int64 (...)."""
        learnt = F.embedding(index, self.items_bias, sparse=True)  # (..., 1)
        return (learnt + self.items_share.detach()[index])[..., 0]
