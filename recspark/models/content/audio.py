"""An encoder of sounds that is trained here, to predict the factors of the items they are of."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import torch
from pydantic import Field
from torch import nn

from recspark.data.blocks import Array
from recspark.data.media_inputs import SoundReader
from recspark.models.content.factor_regression import (
    FactorRegression,
    FactorRegressionModel,
    FactorRegressionSettings,
)
from recspark.nets.sounds import AudioGru, untrained_gru


class AudioSettings(FactorRegressionSettings):
    """Settings of `Audio`."""

    sampling_rate: int = Field(
        8000,
        ge=2000,
        le=48_000,
        description="samples per second that every sound is brought to. Guess; 8,000 is that of a "
        "telephone, 22,050 keeps most of music",
    )
    n_bands: int = Field(40, ge=8, le=256, description="mel bands of a frame. Common for speech")
    window_ms: float = Field(
        25.0, ge=5, le=200, description="length of a frame in milliseconds. Common for speech"
    )
    step_ms: float = Field(
        10.0,
        ge=2,
        le=200,
        description="milliseconds between the beginnings of two frames. Common for speech",
    )
    excerpt_seconds: float = Field(
        3.0,
        gt=0,
        le=120,
        description="seconds that are read, from the middle of a longer sound. van den Oord et al. "
        "2013: 3",
    )
    max_minutes: float = Field(30.0, gt=0, le=600, description="a longer sound is refused. Guess")
    hidden_size: int = Field(64, ge=4, le=1024, description="units of the GRU. Guess")


class AudioModel(FactorRegressionModel):
    """A trained network of sounds."""

    settings: AudioSettings

    def reader(self) -> SoundReader:
        """See `FactorRegressionModel`."""
        return _reader(self.settings)

    def make_net(self, size: int, seed: int) -> nn.Module:
        """See `FactorRegressionModel`."""
        settings = self.settings
        return untrained_gru(settings.n_bands, settings.hidden_size, size, seed)

    def predicted(
        self, net: nn.Module, inputs: Mapping[str, torch.Tensor], generator: torch.Generator | None
    ) -> torch.Tensor:
        """See `FactorRegressionModel`."""
        frames = inputs["frames"].reshape(-1, self.reader().max_frames, self.settings.n_bands)
        lengths = inputs["n_frames"].long()  # (B,)
        longest = int(lengths.max())
        factors: torch.Tensor = net(frames[:, :longest], lengths)  # (B, K)
        return factors

    @property
    def n_features(self) -> int:
        """See `FactorRegressionModel`."""
        return 2 * self.settings.hidden_size

    def without_last_layer(self, net: nn.Module) -> None:
        """See `FactorRegressionModel`."""
        assert isinstance(net, AudioGru)
        net.fc = nn.Identity()  # type: ignore[assignment]


class Audio(FactorRegression[AudioSettings]):
    """Predict an item's factors from its first sound."""

    settings_class = AudioSettings
    name = "audio"

    def reader(self) -> SoundReader:
        """See `FactorRegression`."""
        return _reader(self.settings)

    def fitted(self, cutoff: datetime, arrays: dict[str, Array]) -> AudioModel:
        """See `FactorRegression`."""
        return AudioModel(self.settings, cutoff, arrays)


def _reader(settings: Any) -> SoundReader:
    rate = settings.sampling_rate
    return SoundReader(
        rate=rate,
        n_bands=settings.n_bands,
        window=max(2, round(settings.window_ms * rate / 1000)),
        step=max(1, round(settings.step_ms * rate / 1000)),
        excerpt_seconds=settings.excerpt_seconds,
        max_seconds=60 * settings.max_minutes,
    )
