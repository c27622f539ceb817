"""SASRec: causal self-attention over the items of a history.

Source: Kang & McAuley 2018.
"""

from __future__ import annotations

from datetime import datetime
from typing import Self

import torch
from pydantic import Field, model_validator

from recspark.data.blocks import Array
from recspark.data.training_rows import Unit
from recspark.models.sequences.next_item import NextItem, NextItemModel
from recspark.models.sequences.next_item_settings import NextItemSettings
from recspark.models.setting_types import VectorSize
from recspark.nets.sasrec import SasRecNet


class SasRecSettings(NextItemSettings):
    """Settings of `SasRec`."""

    train_on: Unit = Field(
        "history", description="a row of the training set is one session, or one whole history"
    )
    context: Unit = Field(
        "history",
        description="what the network reads at scoring: the last session of a history, or the "
        "whole history",
    )
    embedding_size: VectorSize = Field(
        64,
        description="length of an item's vector, and of a state. Paper: 50",
    )
    n_blocks: int = Field(2, ge=1, description="attention blocks. Paper: 2")
    n_heads: int = Field(
        1, ge=1, description="heads of each block; embedding_size is divided among them. Paper: 1"
    )

    @property
    def state_size(self) -> int:
        """See `NextItemSettings`."""
        return self.embedding_size

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.embedding_size % self.n_heads:
            raise ValueError(
                f"embedding_size ({self.embedding_size}) must be a multiple of n_heads "
                f"({self.n_heads})"
            )
        return self


def make_net(settings: SasRecSettings, n_items: int, seed: int) -> SasRecNet:
    """Return the network with first weights drawn from `seed`."""
    return SasRecNet(
        n_items,
        settings.length,
        settings.embedding_size,
        settings.n_blocks,
        settings.n_heads,
        settings.tied,
        torch.Generator().manual_seed(seed),
        settings.head == "click_through",
        settings.is_sparse,
    )


class SasRecModel(NextItemModel):
    """A trained `SasRec`."""

    make_net = staticmethod(make_net)


class SasRec(NextItem[SasRecSettings]):
    """A self-attention network whose state after each item scores the next item.

    Each item attends to itself and to the items before it. Source: Kang & McAuley 2018.

    The paper's loss compares a target with one negative; Petrov & Macdonald 2023 show what that
    costs. Here the loss is a softmax over all items or over candidates, or gBCE, the loss of
    gSASRec.
    """

    settings_class = SasRecSettings
    make_net = staticmethod(make_net)

    def fitted(self, cutoff: datetime, items: Array, arrays: dict[str, Array]) -> SasRecModel:
        """See `NextItem`."""
        return SasRecModel(self.settings, cutoff, items, arrays)
