"""The two towers of `mvdnn`: the vector of a user from the means of views, of an item from tokens.

Training and scoring both compute vectors by them.
"""

from __future__ import annotations

import numpy as np
import torch

from recspark.data.blocks import Array
from recspark.models.neural import one_thread
from recspark.models.towers.item_tokens import ItemTokens
from recspark.models.towers.mvdnn_settings import MvdnnSettings
from recspark.nets.mvdnn import Bags, MvdnnNet

_BLOCK_ITEMS = 4096  # items whose vectors are computed at once


def make_net(settings: MvdnnSettings, n_items: int, seed: int) -> MvdnnNet:
    """Return the network with first weights drawn from `seed`."""
    return MvdnnNet(
        n_items,
        len(settings.view_names),
        settings.embedding_size,
        settings.n_buckets,
        settings.hidden_sizes,
        torch.Generator().manual_seed(seed),
        settings.is_sparse,
    )


def user_tower(
    net: MvdnnNet, settings: MvdnnSettings, means: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """Return the vectors of P users, (P, H).

    `means` (P, V, E) and `numbers` int64 (P, V): as `ViewHistories.before` returns them.
    """
    counts = torch.log1p(numbers.to(means.dtype)) / np.log1p(settings.window)  # (P, V)
    is_any = (numbers > 0).to(means.dtype)  # (P, V)
    return net.users(means, torch.stack([is_any, counts], dim=2))


class TokenBags:
    """The tokens of all items as tensors, from which a step takes those of its candidates."""

    def __init__(self, tokens: ItemTokens) -> None:
        self._starts = torch.from_numpy(np.array(tokens.starts))  # (n_items + 1,)
        self._codes = torch.from_numpy(np.array(tokens.codes))  # (n_tokens,)
        self._weights = torch.from_numpy(np.array(tokens.weights))  # (n_tokens,)

    def of(self, items: torch.Tensor) -> Bags:
        """Return the tokens of `items`, int64 (N,): positions in the tokens."""
        if self._starts.device != items.device:
            self._starts, self._codes, self._weights = (
                values.to(items.device) for values in (self._starts, self._codes, self._weights)
            )
        begins, ends = self._starts[items], self._starts[items + 1]  # (N,) each
        lengths = ends - begins
        starts = lengths.cumsum(0) - lengths  # (N,)
        total = int(lengths.sum())
        within = torch.arange(total, device=items.device) - starts.repeat_interleave(lengths)
        place = begins.repeat_interleave(lengths) + within  # (M,)
        return Bags(starts, self._codes[place].long(), self._weights[place])


def item_vectors(net: MvdnnNet, view: int, tokens: ItemTokens) -> Array:
    """Return the vectors of items by the tower of a view, float32 (n, H)."""
    bags = TokenBags(tokens)
    vectors = [torch.zeros(0, net.items_1_bias.shape[1])]
    with torch.no_grad(), one_thread():
        for begin in range(0, len(tokens.item_idx), _BLOCK_ITEMS):
            end = min(begin + _BLOCK_ITEMS, len(tokens.item_idx))
            vectors.append(net.items(view, bags.of(torch.arange(begin, end))))
    return torch.cat(vectors[1:] or vectors).float().numpy()
