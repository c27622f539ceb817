"""GRU4Rec: a recurrent network over the items of a session (Hidasi et al. 2016, 2018)."""

from __future__ import annotations

from datetime import datetime
from typing import Self

import torch
from pydantic import Field, model_validator

from recspark.data.blocks import Array
from recspark.models.next_item import NextItem, NextItemModel
from recspark.models.next_item_settings import NextItemSettings
from recspark.nets.gru4rec import Cell, Gru4RecNet


class Gru4RecSettings(NextItemSettings):
    """Settings of `Gru4Rec`. "Diginetica" = chosen on its newest train sessions, held out.

    What moved P@20 there, on the newest third of the train sessions after 6 epochs: learning_rate
    0.005 to 0.01 with dropout 0.3 to 0.4, .470 to .479; dropout 0.5 at 0.005, .455; no logQ, .452.
    """

    cell: Cell = Field("gru", description="recurrent cell. Hidasi et al. 2016: GRU")
    hidden_size: int = Field(
        100,
        ge=1,
        description="units of each layer. Hidasi et al. 2016: 100",
        json_schema_extra={"tune": {"choices": [64, 100, 128, 256]}},
    )
    embedding_size: int | None = Field(
        None, ge=1, description="length of an item's vector; null = hidden_size, as `tied` needs"
    )
    n_samples: int | None = Field(
        512,
        ge=1,
        description="items drawn for a step beside the batch's targets; null = all items are "
        "candidates. Diginetica: with logQ the batch's targets do most",
    )
    dropout: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="share of units dropped, of item vectors and of states. Diginetica",
        json_schema_extra={"tune": {"low": 0.0, "high": 0.6}},
    )
    epochs: int = Field(9, ge=1, description="passes over the training set. Diginetica: 7 to 9")
    batch_size: int = Field(
        128, ge=1, description="rows of a step, of all ranks together. Diginetica"
    )
    learning_rate: float = Field(
        1e-2,
        gt=0,
        description="of Adam at the first step, falling linearly to 0. Diginetica",
        json_schema_extra={"tune": {"low": 1e-3, "high": 2e-2, "log": True}},
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
        settings.sparse,
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
