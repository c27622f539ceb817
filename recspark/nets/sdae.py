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
    """An encoder of layers that become smaller, and a decoder that mirrors it back to the items.

    A row x (n_items,) is given by its entries: `rows` int64 (P,) ascending, `items` int64 (P,),
    `values` (P,). Layer 1 is computed by `items_in` and layer k > 1 by `down_k`. `up_k` leads back
    from layer k to layer k - 1, and `items_out` from layer 1 to the items. Example with sizes 200
    and 50: `items_in` (items to 200), `down_2` (200 to 50), `up_2` (50 to 200), `items_out` (200 to
    items).

    Parameters
    ----------
    sizes : number of units of layers 1 to K; the last layer is the code
    activation : of every layer. The paper uses a sigmoid, on inputs that fill [0, 1]. With a row of
        length 1 over many items, all sigmoids stay close to .5, and then corruption, which sets
        units to 0, is noise many times larger than the signal. A tanh stays close to 0 instead
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
        for k, (outer_size, inner_size) in enumerate(itertools.pairwise(sizes), 2):
            self.register_parameter(f"down_{k}", matrix(outer_size, inner_size))
            self.register_parameter(f"down_{k}_bias", bias(inner_size))
            self.register_parameter(f"up_{k}", matrix(inner_size, outer_size))
            self.register_parameter(f"up_{k}_bias", bias(outer_size))
        self.items_out, self.items_out_bias = matrix(n_items, sizes[0]), bias(n_items)

    def first(
        self, rows: torch.Tensor, items: torch.Tensor, values: torch.Tensor, n_rows: int
    ) -> torch.Tensor:
        """Return layer 1, (B, H1), of the rows with these entries."""
        first_entries = torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))  # (B,)
        summed = F.embedding_bag(
            items, self.items_in, first_entries, mode="sum", per_sample_weights=values
        )  # (B, H1)
        return self._activate(summed + self.items_in_bias)  # (B, H1)

    def down(self, hidden: torch.Tensor, k: int) -> torch.Tensor:
        """Return layer k (B, Hk) from layer k - 1 (B, Hk-1); k >= 2."""
        matrix, bias = getattr(self, f"down_{k}"), getattr(self, f"down_{k}_bias")
        return self._activate(hidden @ matrix + bias)

    def up(self, hidden: torch.Tensor, k: int) -> torch.Tensor:
        """Return the reconstruction of layer k - 1, (B, Hk-1), from layer k (B, Hk); k >= 2."""
        matrix, bias = getattr(self, f"up_{k}"), getattr(self, f"up_{k}_bias")
        return self._activate(hidden @ matrix + bias)

    def encode(
        self, rows: torch.Tensor, items: torch.Tensor, values: torch.Tensor, n_rows: int, layer: int
    ) -> torch.Tensor:
        """Return layer number `layer`, from 1 to `depth`, (B, Hlayer)."""
        hidden = self.first(rows, items, values, n_rows)  # (B, H1)
        for k in range(2, layer + 1):
            hidden = self.down(hidden, k)  # (B, Hk)
        return hidden

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of layer 1, (B, H1), from the code, layer `depth`."""
        for k in range(self.depth, 1, -1):
            code = self.up(code, k)  # (B, Hk-1)
        return code

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return a logit per item, (B, n_items), from layer 1 or its reconstruction (B, H1)."""
        return hidden @ self.items_out.T + self.items_out_bias  # (B, n_items)

    def parameters_of(self, k: int) -> dict[str, nn.Parameter]:
        """Return the parameters of the k-th autoencoder: into layer k and back from it."""
        names = ("items_in", "items_out") if k == 1 else (f"down_{k}", f"up_{k}")
        return {
            f"{name}{bias}": getattr(self, f"{name}{bias}")
            for name in names
            for bias in ("", "_bias")
        }
