"""GRU4Rec: a recurrent network over the items of a session (Hidasi et al. 2016, 2018)."""

from __future__ import annotations

from datetime import datetime
from typing import Self

import torch
from pydantic import Field, model_validator

from recspark.data.blocks import Array
from recspark.models.next_item import NextItem, NextItemModel, NextItemSettings
from recspark.nets.gru4rec import Cell, Gru4RecNet


class Gru4RecSettings(NextItemSettings):
    """Settings of `Gru4Rec`."""

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
