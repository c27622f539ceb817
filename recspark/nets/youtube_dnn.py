"""The candidate network of YouTube: a tower over the means of what a user watched.

Source: Covington, Adams, Sargin 2016, "Deep Neural Networks for YouTube Recommendations", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from recspark.nets.sequence import dropped, matrix

POWERS = (1.0, 2.0, 0.5)  # of a number in [0, 1]


class YoutubeDnnNet(nn.Module):
    """Item vectors that are read, a tower of ReLU layers, and item vectors that are scored.

    The tower reads the mean vector of the newest items in each of several windows, and each number
    of a user as x, x^2 and sqrt(x). The last layer is the user's vector u; item i has the score
    `u @ items_out[i] + items_out_bias[i]`. Layer k, from 1, has the parameters `layer_k`
    (n_in, n_out) and `layer_k_bias`. `age_shares` is a frozen parameter, which this module does not
    use: `models.towers.timelines.age_position` does. With `sparse`, the gradients of item vectors
    hold only the rows that a step reads, see `recspark.train.parameters`.
    """

    def __init__(
        self,
        n_items: int,
        embedding_size: int,
        windows: Sequence[int],
        n_numbers: int,
        hidden_sizes: Sequence[int],
        n_age_shares: int,
        generator: torch.Generator,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.sparse_parameters = frozenset({"items_in", "items_out"} if sparse else ())
        self.windows, self.depth = tuple(windows), len(hidden_sizes)
        self.items_in = matrix(generator, n_items, embedding_size)
        n_in = len(windows) * embedding_size + n_numbers * len(POWERS)
        for k, n_out in enumerate(hidden_sizes, 1):
            values = nn.init.kaiming_uniform_(
                torch.empty(n_out, n_in), nonlinearity="relu", generator=generator
            )
            self.register_parameter(f"layer_{k}", nn.Parameter(values.T.contiguous()))
            self.register_parameter(f"layer_{k}_bias", nn.Parameter(torch.zeros(n_out)))
            n_in = n_out
        self.items_out = matrix(generator, n_items, n_in)
        self.items_out_bias = nn.Parameter(torch.zeros(n_items))
        self.age_shares = nn.Parameter(torch.zeros(n_age_shares), requires_grad=False)

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors, (..., E), of `items` int64 (...) as the tower reads them."""
        return functional.embedding(items, self.items_in, sparse=bool(self.sparse_parameters))

    def scored(self, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors, (..., H), which score `items` int64 (...)."""
        return functional.embedding(items, self.items_out, sparse=bool(self.sparse_parameters))

    def users(
        self,
        means: torch.Tensor,
        numbers: torch.Tensor,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return the vector of each user, (P, H).

        `means` (P, n_windows, E): see `window_means`. `numbers` (P, n_numbers), in [0, 1]. Without
        a `generator` nothing is dropped.
        """
        powers = [numbers**power for power in POWERS]  # (P, n_numbers) each
        hidden = torch.cat([dropped(means.flatten(1), dropout, generator), *powers], dim=1)
        for k in range(1, self.depth + 1):
            linear = hidden @ getattr(self, f"layer_{k}") + getattr(self, f"layer_{k}_bias")
            hidden = torch.relu(linear)  # (P, Hk)
            if k < self.depth:
                hidden = dropped(hidden, dropout, generator)
        return hidden


def window_means(
    embedded: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, windows: Sequence[int]
) -> torch.Tensor:
    """Return the mean vector of the newest items before each end, (P, n_windows, E).

    `embedded` (B, L, E): the items of each row, oldest first; padding must be 0. Each of P queries
    reads the items before the position `ends` int64 (P,) of row `rows` int64 (P,): at most w of
    them for the window w. No items have the mean 0. Padding never counts, and later items change
    no bit.

    Example with windows 2 and 9: of the items [a, b, c, d], the end 3 reads (b + c) / 2 and
    (a + b + c) / 3.
    """
    sums = functional.pad(embedded.cumsum(dim=1), (0, 0, 1, 0))  # (B, L + 1, E): of the first l
    means = []
    for window in windows:
        begins = (ends - window).clamp_min(0)  # (P,)
        n_items = (ends - begins).clamp_min(1)[:, None]  # (P, 1)
        means.append((sums[rows, ends] - sums[rows, begins]) / n_items)  # (P, E)
    return torch.stack(means, dim=1)
