"""Base of the networks of next-item models: item vectors, and a state after each position."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from torch.nn import functional

# Parameters that have one row per item; all others do not depend on the catalogue.
ITEM_ARRAYS = ("items_in", "items_out", "items_out_bias", "click_bias")


class SequenceNet(nn.Module):
    """A network that reads items as rows of `items_in`; its state after each item scores all items.

    `scores = state @ items_out.T + items_out_bias`. With `tied` item vectors, `items_out` is
    `items_in` itself. With `click_head` there are also `click_scale` (H,) and `click_bias`
    (n_items,), for a second score of the same vectors (`recspark.models.sequences.click_through`).
    With `sparse`, the gradients of item vectors hold only the rows that a step reads, see
    `recspark.train.parameters`.

    `has_positions`: the network has a vector for each place in a row. The vector of a place is
    trained only if training rows are that long.
    """

    has_positions = False

    def __init__(
        self,
        n_items: int,
        embedding_size: int,
        state_size: int,
        tied: bool,
        generator: torch.Generator,
        click_head: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        names = ("items_in",) if tied else ("items_in", "items_out")
        self.sparse_parameters = frozenset(names if sparse else ())
        self.items_in = matrix(generator, n_items, embedding_size)
        self.items_out = self.items_in if tied else matrix(generator, n_items, state_size)
        self.items_out_bias = nn.Parameter(torch.zeros(n_items))
        if click_head:
            self.click_scale = nn.Parameter(torch.ones(state_size))
            self.click_bias = nn.Parameter(torch.zeros(n_items))

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """Return the input vectors, (..., E), of `items` int64 (...)."""
        return functional.embedding(items, self.items_in, sparse=bool(self.sparse_parameters))

    def scored(self, items: torch.Tensor) -> torch.Tensor:
        """Return the output vectors, (..., H), which score `items` int64 (...)."""
        return functional.embedding(items, self.items_out, sparse=bool(self.sparse_parameters))

    @abstractmethod
    def states(
        self,
        embedded: torch.Tensor,
        lengths: torch.Tensor,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return the state after each item, (B, T, H). Later items never change an earlier state.

        `embedded` (B, T, E): rows of `items_in`, with the first item first. `lengths` int64 (B,),
        at least 1: positions from there on are padding, and their states have no meaning. Without a
        `generator` nothing is dropped.
        """


def matrix(generator: torch.Generator, *shape: int) -> nn.Parameter:
    """Return a parameter, drawn uniformly within +-1 / sqrt(last size)."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


def dropped(
    values: torch.Tensor, dropout: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Return `values` after dropout: a share `dropout` is set to 0, the rest is scaled up; same
    shape.

    Without a `generator`, `values` is returned unchanged.
    """
    if generator is None or dropout == 0:
        return values
    is_kept = torch.rand(values.shape, generator=generator, device=values.device) >= dropout
    return values * is_kept / (1 - dropout)
