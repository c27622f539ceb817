"""The colours of an item's picture: how much of the picture each of a few colours covers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from recspark.data import media
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.media import Kind, Source
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, Settings
from recspark.models.content.media import (
    MaxFileMb,
    MaxMegapixels,
    MediaCoder,
    MediaFolder,
    source_of,
)
from recspark.models.content.settings_only import SettingsOnlyEncoder


class ColoursSettings(Settings):
    """Settings of `Colours`."""

    n_levels: int = Field(
        4, ge=2, le=16, description="levels of red, of green and of blue; their cube is the length"
    )
    size: int = Field(
        64, ge=8, le=512, description="pixels per side that a picture is brought to. Guess"
    )
    folder: MediaFolder = ""
    max_file_mb: MaxFileMb = 50
    max_megapixels: MaxMegapixels = 25.0


class ColoursModel(SettingsOnlyEncoder):
    """Knows nothing but its settings."""

    settings: ColoursSettings

    def coder(self) -> ColoursCoder:
        """See `EncoderModel`."""
        settings = self.settings
        return ColoursCoder(
            source_of(settings.folder, settings.max_file_mb),
            settings.n_levels,
            settings.size,
            int(1e6 * settings.max_megapixels),
        )


@dataclass
class ColoursCoder(MediaCoder):
    """The number of pixels of each colour, divided so that the vector has the length 1.

    The dot product of two such vectors is the cosine of the two histograms. Source: Swain & Ballard
    1991, "Color Indexing".
    """

    source: Source
    n_levels: int
    picture_size: int
    max_pixels: int

    @property
    def kind(self) -> Kind:
        """See `MediaCoder`."""
        return "image"

    @property
    def size(self) -> int:
        """See `MediaCoder`."""
        return self.n_levels**3

    def vector(self, data: bytes) -> Array:
        """See `MediaCoder`."""
        image = media.decode_image(data, self.max_pixels, self.picture_size)
        pixels = media.squeezed(image, self.picture_size).reshape(-1, 3).astype(np.int64)  # (n, 3)
        levels = pixels * self.n_levels // 256  # (n, 3)
        colours = (levels[:, 0] * self.n_levels + levels[:, 1]) * self.n_levels + levels[:, 2]
        counts = np.bincount(colours, minlength=self.size)  # (n_levels^3,)
        return (counts / np.sqrt(np.square(counts).sum())).astype(np.float32)


class Colours(Algorithm[ColoursSettings]):
    """A histogram of the colours of the item's first picture. Nothing is learned."""

    settings_class = ColoursSettings
    learns = False

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> ColoursModel:
        """See `Algorithm.fit`."""
        return ColoursModel(self.settings, data.cutoff)
