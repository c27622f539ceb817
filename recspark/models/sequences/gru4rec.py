"""GRU4Rec: a recurrent network over the items of a session (Hidasi et al. 2016, 2018)."""

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
    """Settings of `Gru4Rec`. "Diginetica" = chosen on its train sessions, by P@20 and MRR@20.

    Fitted on the newest 60,000 of the first nine tenths, asked for 3,000 of the last tenth: what was
    tried, and with which figures, is in benchmarks/README.md.
    """

    cell: Cell = Field("gru", description="recurrent cell. Hidasi et al. 2016: GRU")
    hidden_size: int = Field(
        256,
        ge=1,
        description="units of each layer. Diginetica",
        json_schema_extra={"tune": {"choices": [64, 100, 128, 256]}},
    )
    embedding_size: int | None = Field(
        None, ge=1, description="length of an item's vector; null = hidden_size, as `tied` needs"
    )
    sparse: bool = Field(True, description="see `NextItemSettings`")
    loss: Literal["cross_entropy", "bpr_max", "gbce"] = Field(
        "bpr_max", description="see `NextItemSettings`. Diginetica"
    )
    sample_alpha: float = Field(
        0.3,
        ge=0,
        le=1,
        description="items are drawn by popularity^this. The authors' parameters for Diginetica",
    )
    dropout: float = Field(
        0.45,
        ge=0,
        lt=1,
        description="share of units dropped, of item vectors and of states. Diginetica: between "
        "the .5 and .4 that did best there",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )
    epochs: int = Field(
        8, ge=1, description="passes over the training set. Diginetica, of 4 and 8 with 128 units"
    )
    batch_size: int = Field(
        32, ge=1, description="rows of a step, of all ranks together. Diginetica, with the loss"
    )
    learning_rate: LearningRate = Field(
        2e-3,
        description="of Adam at the first step, falling linearly to 0. Diginetica",
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
    """Return the network with the weights of `seed`."""
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
    """Trained `Gru4Rec`."""

    make_net = staticmethod(make_net)


class Gru4Rec(NextItem[Gru4RecSettings]):
    """The state after each item scores the next one; the state begins at zero for each row.

    Source: Hidasi, Karatzoglou, Baltrunas, Tikk 2016; Hidasi & Karatzoglou 2018.
    """

    settings_class = Gru4RecSettings
    make_net = staticmethod(make_net)

    def fitted(self, cutoff: datetime, items: Array, arrays: dict[str, Array]) -> Gru4RecModel:
        """See `NextItem`."""
        return Gru4RecModel(self.settings, cutoff, items, arrays)
