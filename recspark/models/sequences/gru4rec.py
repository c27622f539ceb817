"""GRU4Rec: a recurrent network that reads the items of a session one by one.

Source: Hidasi et al. 2016; Hidasi & Karatzoglou 2018.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from recspark.data.blocks import Array
from recspark.models.sequences.next_item import NextItem, NextItemModel
from recspark.models.sequences.next_item_settings import NextItemSettings
from recspark.models.setting_types import LearningRate
from recspark.nets.gru4rec import Cell, Gru4RecNet


class Gru4RecSettings(NextItemSettings):
    """Settings of `Gru4Rec`. "Diginetica" = chosen on its training sessions, by P@20 and MRR@20.

    For that choice, models were fitted on the newest 60,000 sessions of the first nine tenths, and
    evaluated on 3,000 sessions of the last tenth. benchmarks/README.md lists what was tried and the
    figures.
    """

    cell: Cell = Field("gru", description="recurrent cell. Hidasi et al. 2016: GRU")
    hidden_size: int = Field(
        256,
        ge=1,
        description="units of each layer. Diginetica",
        json_schema_extra={"tune": {"choices": [64, 100, 128, 256]}},
    )
    embedding_size: int | None = Field(
        None,
        ge=1,
        description="length of an item's vector; null = hidden_size, which `tied` requires",
    )
    sparse: bool = Field(True, description="see `NextItemSettings`")
    loss: Literal["cross_entropy", "bpr_max", "gbce"] = Field(
        "bpr_max", description="see `NextItemSettings`. Diginetica"
    )
    sample_alpha: float = Field(
        0.3,
        ge=0,
        le=1,
        description="items are drawn with probability proportional to popularity^sample_alpha. "
        "Source: the authors' parameters for Diginetica",
    )
    dropout: float = Field(
        0.45,
        ge=0,
        lt=1,
        description="share of the units that is dropped in training, of item vectors and of "
        "states. Diginetica: between .5 and .4, the two best values there",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )
    epochs: int = Field(
        8,
        ge=1,
        description="passes over the training set. Diginetica: 4 and 8 were tried, with 128 units",
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="rows per step, all ranks together. Diginetica: chosen together with the loss",
    )
    learning_rate: LearningRate = Field(
        2e-3,
        description="learning rate of Adam at the first step; it falls linearly to 0. Diginetica",
    )
    n_layers: int = Field(1, ge=1, description="recurrent layers. Hidasi et al. 2016: 1")

    @property
    def state_size(self) -> int:
        """See `NextItemSettings`."""
        return self.hidden_size

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.tied and self.embedding_size not in (None, self.hidden_size):
            raise ValueError(
                f"tied item vectors score states, so embedding_size ({self.embedding_size}) must be "
                f"hidden_size ({self.hidden_size}); leave it out, or set tied: false"
            )
        return self


def make_net(settings: Gru4RecSettings, n_items: int, seed: int) -> Gru4RecNet:
    """Return the network with first weights drawn from `seed`."""
    return Gru4RecNet(
        n_items,
        settings.embedding_size or settings.hidden_size,
        settings.hidden_size,
        settings.n_layers,
        settings.cell,
        settings.tied,
        torch.Generator().manual_seed(seed),
        settings.head == "click_through",
        settings.is_sparse,
    )


class Gru4RecModel(NextItemModel):
    """A trained `Gru4Rec`."""

    make_net = staticmethod(make_net)


class Gru4Rec(NextItem[Gru4RecSettings]):
    """A recurrent network whose state after each item scores the next item.

    The state starts at zero in each row.

    Source: Hidasi, Karatzoglou, Baltrunas, Tikk 2016; Hidasi & Karatzoglou 2018.
    """

    settings_class = Gru4RecSettings
    make_net = staticmethod(make_net)

    def fitted(self, cutoff: datetime, items: Array, arrays: dict[str, Array]) -> Gru4RecModel:
        """See `NextItem`."""
        return Gru4RecModel(self.settings, cutoff, items, arrays)
