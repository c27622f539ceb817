"""SASRec: causal self-attention over the items of a history.

Source: Kang & McAuley 2018, "Self-Attentive Sequential Recommendation", section III.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from recspark.nets.sequence import SequenceNet, dropped, matrix


class SasRecNet(SequenceNet):
    """Blocks of self-attention and a feed-forward layer, each after a layer norm and with a
    residual.

    Position vectors are trained, and positions count from the first item of a row. An item attends
    to itself and to earlier items only, so padding behind the last item changes no state before it.
    """

    has_positions = True

    def __init__(
        self,
        n_items: int,
        length: int,
        embedding_size: int,
        n_blocks: int,
        n_heads: int,
        tied: bool,
        generator: torch.Generator,
        click_head: bool = False,
        sparse: bool = False,
    ) -> None:
        size = embedding_size
        super().__init__(n_items, size, size, tied, generator, click_head, sparse)
        self.positions = matrix(generator, length, embedding_size)
        self.blocks = nn.ModuleList(
            _Block(embedding_size, n_heads, generator) for _ in range(n_blocks)
        )
        self.norm = nn.LayerNorm(embedding_size)

    def states(
        self,
        embedded: torch.Tensor,
        lengths: torch.Tensor,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """See `SequenceNet`."""
        n_positions = embedded.shape[1]
        x = embedded * embedded.shape[2] ** 0.5 + self.positions[:n_positions]  # (B, T, E)
        x = dropped(x, dropout, generator)  # (B, T, E)
        # (T, T): whether the column's position is after the row's
        is_later = torch.ones(n_positions, n_positions, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, is_later, dropout, generator)  # (B, T, E)
        return self.norm(x)  # (B, T, E)


class _Block(nn.Module):
    def __init__(self, size: int, n_heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.forward_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value = (matrix(generator, size, size) for _ in range(3))
        self.inner, self.outer = (matrix(generator, size, size) for _ in range(2))
        self.inner_bias = nn.Parameter(torch.zeros(size))
        self.outer_bias = nn.Parameter(torch.zeros(size))

    def forward(
        self,
        x: torch.Tensor,
        is_later: torch.Tensor,
        dropout: float,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        normed = self.attention_norm(x)  # (B, T, E)
        query, key, value = (
            self._heads(normed @ weights) for weights in (self.query, self.key, self.value)
        )  # (B, h, T, E / h) each
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5  # (B, h, T, T)
        attention = torch.softmax(scores.masked_fill(is_later, -torch.inf), dim=3)  # (B, h, T, T)
        attention = dropped(attention, dropout, generator)  # (B, h, T, T)
        attended = (attention @ value).transpose(1, 2).flatten(2)  # (B, T, E)
        x = x + dropped(attended, dropout, generator)  # (B, T, E)
        hidden = F.relu(self.forward_norm(x) @ self.inner + self.inner_bias)  # (B, T, E)
        hidden = dropped(hidden, dropout, generator)  # (B, T, E)
        return x + dropped(hidden @ self.outer + self.outer_bias, dropout, generator)  # (B, T, E)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        # Splits (B, T, E) into the heads, (B, h, T, E / h).
        n_rows, n_positions, size = x.shape
        return x.view(n_rows, n_positions, self.n_heads, size // self.n_heads).transpose(1, 2)
