"""Encoders that learn nothing: the fitted model is its settings."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from recspark.data.blocks import Array
from recspark.models.base import EncoderModel, Settings


class SettingsOnlyEncoder(EncoderModel):
    """Knows nothing but its settings, and what they name outside the artifact.

    An item takes milliseconds, because a file is decoded or a network computed.
    """

    is_costly = True

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`. There are none."""
        return {}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        return cls(settings, cutoff)
