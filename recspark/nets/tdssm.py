"""A user tower with a static part and recurrent parts over steps of time.

Source: Song, Elkahky, He 2016, "Multi-Rate Deep Learning for Temporal Recommendation" (TDSSM and
MR-TDSSM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from recspark.nets.sequence import matrix

STATIC = "static"


class TdssmNet(nn.Module):
    """Item vectors that are read, the parts of the user tower, and item vectors that are scored.

    The part `static` is a layer of tanh units over the mean vector of everything before. Each part
    of `rates` is a recurrent layer over steps of time, whose last state counts. A linear layer
    combines the parts to the user's vector. The score of an item is the cosine of the two vectors,
    divided by a temperature.

    With `pretrained`, the vectors that are read stay as they are set. With `sparse`, the gradients
    of item vectors hold only the rows that a step reads, see `recspark.train.parameters`.
    """

    def __init__(
        self,
        n_items: int,
        embedding_size: int,
        hidden_size: int,
        parts: Sequence[str],
        generator: torch.Generator,
        pretrained: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        read = set() if pretrained else {"items_in"}
        self.sparse_parameters = frozenset(read | {"items_out"} if sparse else ())
        self.parts = tuple(parts)
        self.items_in = matrix(generator, n_items, embedding_size)
        self.items_in.requires_grad_(not pretrained)
        self.items_out = matrix(generator, n_items, hidden_size)
        if STATIC in self.parts:
            self.static = nn.Linear(embedding_size, hidden_size)
        # A step is the mean vector of its items, and whether it has any.
        self.rates = nn.ModuleDict(
            {
                part: nn.LSTM(embedding_size + 1, hidden_size, batch_first=True)
                for part in self.parts
                if part != STATIC
            }
        )
        self.combined = nn.Linear(len(self.parts) * hidden_size, hidden_size)
        # The same bound as torch's default, but drawn from `generator`.
        for name, parameter in self.named_parameters():
            if not name.startswith("items_"):
                bound = hidden_size**-0.5
                nn.init.uniform_(parameter, -bound, bound, generator)

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors, (..., E), of `items` int64 (...) as the tower reads them."""
        is_sparse = "items_in" in self.sparse_parameters
        return functional.embedding(items, self.items_in, sparse=is_sparse)

    def scored(self, items: torch.Tensor) -> torch.Tensor:
        """Return the vectors of length 1, (..., H), which score `items` int64 (...)."""
        is_sparse = "items_out" in self.sparse_parameters
        vectors = functional.embedding(items, self.items_out, sparse=is_sparse)
        return functional.normalize(vectors, dim=-1)

    def users(self, before: torch.Tensor, steps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the vectors of length 1 of P users, (P, H).

        `before` (P, E): the mean vector of everything before. `steps` : for each part of `rates`,
        (P, n_steps, E + 1), the oldest step first.
        """
        states = []
        for part in self.parts:
            if part == STATIC:
                states.append(torch.tanh(self.static(before)))
            else:
                outputs, _ = self.rates[part](steps[part])  # without a first state it is zero
                states.append(outputs[:, -1])
        return functional.normalize(self.combined(torch.cat(states, dim=1)), dim=1)


def step_means(
    sums: torch.Tensor,
    ages: torch.Tensor,
    rows: torch.Tensor,
    begins: torch.Tensor,
    step_seconds: int,
    n_steps: int,
) -> torch.Tensor:
    """Return the mean vector of each step of time and whether it has items, (P, n_steps, E + 1).

    The newest step has the events with begin <= age < begin + step_seconds; each other step has
    those of the `step_seconds` before it. The oldest step comes first; a step without items has the
    mean 0.

    Parameters
    ----------
    sums : (B, L + 1, E), the sum of the first 0 to L vectors of each row, oldest first
    ages : int64 (B, L), seconds, falling; padding is -1
    rows, begins : int64 (P,), the row of each query and the youngest age that it reads, at least 0

    Example: with steps of 10 s, 2 of them and the begin 5, of items that are 24, 9, 8 and 3 s old
    the steps are: the first item alone, then the second and the third.
    """
    edges = begins[:, None] + step_seconds * torch.arange(n_steps, -1, -1)  # (P, n_steps + 1)
    ends = n_at_least(ages, rows, edges)  # (P, n_steps + 1): events of at least that age
    at_end, at_begin = (sums[rows[:, None], some] for some in (ends[:, 1:], ends[:, :-1]))
    n_items = (ends[:, 1:] - ends[:, :-1])[:, :, None]  # (P, n_steps, 1)
    means = (at_end - at_begin) / n_items.clamp_min(1)
    return torch.cat([means, (n_items > 0).to(means.dtype)], dim=2)


def n_at_least(ages: torch.Tensor, rows: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Return how many events of a row are at least that old, int64 (P, n).

    `ages` int64 (B, L), falling, padding -1; `rows` int64 (P,); `edges` int64 (P, n), at least 0.
    """
    return torch.searchsorted(-ages[rows].contiguous(), -edges.contiguous(), right=True)
