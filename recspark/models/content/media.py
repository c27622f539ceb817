"""What encoders of pictures and sounds share: where media are, and vectors item by item."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.media import Kind, MediaError, Source, fetched

MediaFolder = Annotated[
    str,
    Field(
        description="URI of the folder that relative addresses of `items.media` are below; empty = "
        "relative addresses are refused"
    ),
]
MaxFileMb = Annotated[
    int, Field(ge=1, le=1000, description="largest file in MB; the item of a larger one is refused")
]
MaxMegapixels = Annotated[
    float,
    Field(
        gt=0,
        le=200,
        description="largest picture to decode, in millions of pixels; a larger one is refused. A "
        "JPEG in one scan is decoded at down to an eighth of its size, so it may have up to 64 "
        "times as many (179 at most)",
    ),
]


def source_of(folder: str, max_file_mb: int) -> Source:
    """Return the source that the settings name."""
    return Source(folder, max_file_mb << 20)


class MediaCoder(ABC):
    """A coder that reads one picture or sound per item; one item after the other.

    An item's vector is computed alone, because the rounding of a network's products depends on the
    number of rows that are computed together.
    """

    source: Source

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which of an item's media are read."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The length of a vector."""

    @abstractmethod
    def vector(self, data: bytes) -> Array:
        """Return the vector of one file, float32 (size,). Raises MediaError."""

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        return self.encode_or_explain(batch)[0]

    def encode_or_explain(self, batch: pa.RecordBatch) -> tuple[Array, list[str | None]]:
        """See `ExplainingCoder`. The problems are those of `recspark.data.media`."""
        vectors = np.full((batch.num_rows, self.size), np.nan, np.float32)
        problems: list[str | None] = [None] * batch.num_rows
        media_of_items = batch.column("media").to_pylist()
        for row, data in enumerate(fetched(self.source, media_of_items, self.kind)):
            if isinstance(data, MediaError):
                problems[row] = data.problem
                continue
            try:
                vectors[row] = self.vector(data)
            except MediaError as error:
                problems[row] = error.problem
        return vectors, problems
