"""A stacked denoising autoencoder of a user's items.

Source: Vincent, Larochelle, Lajoie, Bengio, Manzagol 2010, "Stacked Denoising Autoencoders".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F


class SdaeNet(nn.Module):
    """Layers of falling size, and their mirror image back to the items.

    A row x (n_items,) comes as its entries: `rows` int64 (P,) ascending, `items` int64 (P,),
    `values` (P,). Layer 1 is `items_in`, layers k > 1 are `down_k`; `up_k` leads back from layer k
    to layer k - 1, and `items_out` to the items.

    Parameters
    ----------
    sizes : units of layers 1 to K, the last one the code
    activation : of every layer. Paper: sigmoid, of inputs that fill [0, 1]. A row of length 1 over
        many items leaves a sigmoid at .5 with little around it, and setting units to 0 is then noise
        many times the signal; the tanh is 0 there
    """

    def __init__(
        self,
        n_items: int,
        sizes: Sequence[int],
        generator: torch.Generator,
        activation: Literal["tanh", "sigmoid"] = "tanh",
    ) -> None:
        super().__init__()

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_normal_(torch.empty(*shape), generator=generator))

        def bias(size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size))

        self.depth = len(sizes)
        self._activate = torch.tanh if activation == "tanh" else torch.sigmoid
        self.items_in, self.items_in_bias = matrix(n_items, sizes[0]), bias(sizes[0])
        for k, (above, below) in enumerate(itertools.pairwise(sizes), 2):
            self.register_parameter(f"down_{k}", matrix(above, below))
            self.register_parameter(f"down_{k}_bias", bias(below))
            self.register_parameter(f"up_{k}", matrix(below, above))
            self.register_parameter(f"up_{k}_bias", bias(above))
        self.items_out, self.items_out_bias = matrix(n_items, sizes[0]), bias(n_items)

    def first(
        self, rows: torch.Tensor, items: torch.Tensor, values: torch.Tensor, n_rows: int
    ) -> torch.Tensor:
        """Return layer 1, (B, H1)."""
        begin = torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))  # (B,)
        summed = F.embedding_bag(
            items, self.items_in, begin, mode="sum", per_sample_weights=values
        )  # (B, H1)
        return self._activate(summed + self.items_in_bias)  # (B, H1)

    def down(self, hidden: torch.Tensor, k: int) -> torch.Tensor:
        """Return layer k (B, Hk) from layer k - 1 (B, Hk-1); k >= 2."""
        matrix, bias = getattr(self, f"down_{k}"), getattr(self, f"down_{k}_bias")
        return self._activate(hidden @ matrix + bias)

    def up(self, hidden: torch.Tensor, k: int) -> torch.Tensor:
        """Return layer k - 1 rebuilt, (B, Hk-1), from layer k (B, Hk); k >= 2."""
        matrix, bias = getattr(self, f"up_{k}"), getattr(self, f"up_{k}_bias")
        return self._activate(hidden @ matrix + bias)

    def encode(
        self, rows: torch.Tensor, items: torch.Tensor, values: torch.Tensor, n_rows: int, to: int
    ) -> torch.Tensor:
        """Return layer `to`, from 1 to `depth`, (B, Hto)."""
        hidden = self.first(rows, items, values, n_rows)  # (B, H1)
        for k in range(2, to + 1):
            hidden = self.down(hidden, k)  # (B, Hk)
        return hidden

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Return layer 1 rebuilt, (B, H1), from layer `depth`."""
        for k in range(self.depth, 1, -1):
            code = self.up(code, k)  # (B, Hk-1)
        return code

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a logit of each item, (B, n_items), from layer 1 or its rebuilt image (B, H1)."""
        return hidden @ self.items_out.T + self.items_out_bias  # (B, n_items)

    def parameters_of(self, k: int) -> dict[str, nn.Parameter]:
        """Return the parameters of the k-th autoencoder: layer k and the way back from it."""
        names = ("items_in", "items_out") if k == 1 else (f"down_{k}", f"up_{k}")
        return {
            f"{name}{bias}": getattr(self, f"{name}{bias}")
            for name in names
            for bias in ("", "_bias")
        }
