"""The vectors of a model's encoders as arrays on the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from recspark.data.blocks import Array, local_index
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError, ModelError, suggest
from recspark.models.kinds import Kind
from recspark.models.vectors.scoring import unit_rows

ListedItems = Annotated[
    Literal["all", "cold"],
    Field(
        description="which items are listed. all = every item with a vector; cold = only items "
        "without an event before the cutoff"
    ),
]


@dataclass(frozen=True)
class EncodedItems:
    """The items that one encoder has a vector for.

    `item_idx` int32 (n,), ascending; `vectors` float32 (n, size), rows of length 1, or of length 0
    where the encoder gives zeros.
    """

    item_idx: Array
    vectors: Array

    def rows_of(self, items: Array) -> Array:
        """Return the vectors of `items` (m,), float32 (m, size); zeros for an item without one."""
        rows = np.zeros((len(items), self.vectors.shape[1]), np.float32)
        if len(self.item_idx):
            local = local_index(self.item_idx, items)
            rows[local >= 0] = self.vectors[local[local >= 0]]
        return rows


def encoded_items(data: Dataset, encoder: str) -> EncodedItems:
    """Return the items that `encoder` has a vector for, with the vectors scaled to length 1.

    One job. The driver holds 8 bytes per item and dimension while the vectors are scaled. Raises
    ModelError where vectors have unequal lengths.
    """
    rows = data.vectors[encoder].toArrow().combine_chunks().sort_by("item_idx")
    item_idx = rows.column("item_idx").to_numpy().astype(np.int32)
    if len(item_idx) == 0:
        return EncodedItems(item_idx, np.zeros((0, 1), np.float32))
    column = rows.column("vector").combine_chunks()
    sizes = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
    if len(sizes) > 1:
        raise ModelError(
            f"encoder '{encoder}' gives vectors of the lengths {sizes.tolist()}; encode again: run "
            "the night with --force"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    return EncodedItems(item_idx, unit_rows(values.reshape(len(item_idx), -1)))


def encoders_in(kinds: Mapping[str, Kind]) -> list[str]:
    """Return the encoders among `kinds`, in order."""
    return [name for name, kind in kinds.items() if kind == "encoder"]


def check_named(setting: str, named: Mapping[str, object], encoders: list[str]) -> None:
    """Raise ConfigError where `setting` names an encoder that is not among `encoders`."""
    for name in named:
        if name not in encoders:
            raise ConfigError(
                f"{setting} names '{name}', which is no encoder among `needs`: {encoders}."
                f"{suggest(name, encoders)}"
            )
