"""How likely two items are acted on by the same users, from their vectors by several modules.

Source: Nedelec, Smirnova, Vasile 2017, "Specializing Joint Representations for the Task of Product
Recommendation" (Content2Vec).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import nn

Merger = Literal["linear", "crossfeat", "residual"]


class PairNet(nn.Module):
    """The logit of a pair of items.

    A module gives an item a vector of length 1, or none. Its similarity z of two items is their
    cosine, less `mean`, divided by `scale`; where one of the two has no vector it is the learnt
    number `stand_in`, which begins at 0, the similarity of a pair drawn at random.

    - linear: sum of w_m z_m, and a bias
    - crossfeat: besides, a weight for the product of the similarities by each two modules
    - residual: besides linear, v . y with the residual unit y = F(x) + x over the joined vectors x of
      the pair, F(x) = W relu(U x + c). As v is linear, v . F(x) is `outer` . relu(`inner` x + c), and
      v . x is `straight` of the two items. A pair has no order: the mean of both orders is taken

    `sizes` : the length of the vectors of each module.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, sizes: Sequence[int], merger: Merger, hidden_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        n_modules, size = len(self.sizes), sum(self.sizes)
        self.register_buffer("mean", torch.zeros(n_modules))
        self.register_buffer("scale", torch.ones(n_modules))
        self.weights = nn.Parameter(torch.ones(n_modules))
        self.stand_in = nn.Parameter(torch.zeros(n_modules))
        self.bias = nn.Parameter(torch.zeros(1))
        self.merger = merger
        if merger == "crossfeat":
            n_products = n_modules * (n_modules - 1) // 2
            self.products = nn.Parameter(torch.zeros(n_products))
        if merger == "residual":
            # An item's input has, besides its vectors, whether each module has one.
            n_inputs = size + n_modules
            deviation = n_modules**-0.5  # of unit vectors, so that a sum has about the variance 2
            self.inner = nn.Parameter(
                deviation * torch.randn(2 * n_inputs, hidden_size, generator=generator)
            )
            self.inner_bias = nn.Parameter(torch.zeros(hidden_size))
            self.outer = nn.Parameter(
                0.1 * hidden_size**-0.5 * torch.randn(hidden_size, generator=generator)
            )
            self.straight = nn.Parameter(torch.zeros(n_inputs))

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, has_a: torch.Tensor, has_b: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits, (B,).

        `a`, `b` (B, D): the joined vectors, 0 where there is none; `has_a`, `has_b` (B, M): 1 where
        the module has a vector of the item, else 0.
        """
        z = self.similarities(a, b, has_a * has_b)  # (B, M)
        logits = z @ self.weights + self.bias  # (B,)
        if self.merger == "crossfeat" and len(self.products):
            pairs = [z[:, m] * z[:, n] for m, n in combinations(range(len(self.sizes)), 2)]
            logits = logits + torch.stack(pairs, dim=1) @ self.products  # (B,)
        if self.merger == "residual":
            x, y = torch.cat([a, has_a], dim=1), torch.cat([b, has_b], dim=1)  # (B, D + M)
            both_orders = torch.cat([torch.cat([x, y], dim=1), torch.cat([y, x], dim=1)])  # (2B, …)
            hidden = torch.relu(both_orders @ self.inner + self.inner_bias)  # (2B, H)
            logits = logits + (hidden @ self.outer).view(2, -1).mean(dim=0)  # (B,)
            logits = logits + (x + y) @ self.straight  # (B,)
        return logits

    def similarities(
        self, a: torch.Tensor, b: torch.Tensor, has_both: torch.Tensor
    ) -> torch.Tensor:
        """Return the similarity of each pair by each module, (B, M)."""
        parts = (a * b).split(self.sizes, dim=1)  # (B, size of m) each
        cosines = torch.stack([part.sum(dim=1) for part in parts], dim=1)  # (B, M)
        z = (cosines - self.mean) / self.scale  # (B, M)
        return has_both * z + (1 - has_both) * self.stand_in
