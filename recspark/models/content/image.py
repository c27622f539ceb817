"""An encoder of pictures that is trained here, to predict the factors of the items they show."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from recspark.data.blocks import Array
from recspark.data.media_inputs import ImageReader
from recspark.models.content.factor_regression import (
    FactorRegression,
    FactorRegressionModel,
    FactorRegressionSettings,
)
from recspark.models.content.media import MaxMegapixels
from recspark.nets.images import (
    HIDDEN_LENGTH,
    LEAST_SIDE_OF_ALEXNET,
    LENGTHS,
    changed_at_random,
    pixels_of,
    untrained,
    untrained_small,
    without_last_layer,
)


class ImageSettings(FactorRegressionSettings):
    """Settings of `Image`."""

    network: Literal["small", "alexnet", "vgg11", "vgg16", "googlenet", "resnet18", "resnet50"] = (
        Field(
            "small",
            description="small = a residual network of 9 layers, for training on CPUs; the others are "
            "torchvision's, from random weights",
        )
    )
    width: int = Field(
        16, ge=4, le=256, description="channels of the first layer of the small network. Guess"
    )
    image_size: int = Field(
        64,
        ge=32,
        le=512,
        description="pixels per side of the square that a picture is squeezed into. Guess; "
        "alexnet needs at least 64",
    )
    augment: bool = Field(
        True,
        description="in training, mirror half of the pictures and shift each by up to an eighth of "
        "its size",
    )
    max_megapixels: MaxMegapixels = 25.0

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.network == "alexnet" and self.image_size < LEAST_SIDE_OF_ALEXNET:
            raise ValueError(f"alexnet needs image_size >= {LEAST_SIDE_OF_ALEXNET}")
        return self


class ImageModel(FactorRegressionModel):
    """A trained network of pictures."""

    settings: ImageSettings

    def reader(self) -> ImageReader:
        """See `FactorRegressionModel`."""
        return _reader(self.settings)

    def make_net(self, size: int, seed: int) -> nn.Module:
        """See `FactorRegressionModel`."""
        settings, network = self.settings, self.settings.network
        if network == "small":
            return untrained_small(settings.width, size, seed)
        return untrained(network, seed, num_classes=size)

    def predicted(
        self, net: nn.Module, inputs: Mapping[str, torch.Tensor], generator: torch.Generator | None
    ) -> torch.Tensor:
        """See `FactorRegressionModel`."""
        side = self.settings.image_size
        images = inputs["pixels"].short().reshape(-1, side, side, 3) + 128  # (B, S, S, 3)
        if generator is not None and self.settings.augment:
            images = changed_at_random(images, generator)  # (B, S, S, 3)
        factors: torch.Tensor = net(pixels_of(images))  # (B, K)
        return factors

    @property
    def n_features(self) -> int:
        """See `FactorRegressionModel`."""
        network = self.settings.network
        if network == "small":
            return 4 * self.settings.width
        return HIDDEN_LENGTH if network.startswith(("alexnet", "vgg")) else LENGTHS[network]

    def without_last_layer(self, net: nn.Module) -> None:
        """See `FactorRegressionModel`."""
        without_last_layer(net)


class Image(FactorRegression[ImageSettings]):
    """Predict an item's factors from its first picture."""

    settings_class = ImageSettings
    name = "image"

    def reader(self) -> ImageReader:
        """See `FactorRegression`."""
        return _reader(self.settings)

    def fitted(self, cutoff: datetime, arrays: dict[str, Array]) -> ImageModel:
        """See `FactorRegression`."""
        return ImageModel(self.settings, cutoff, arrays)


def _reader(settings: Any) -> ImageReader:
    return ImageReader(settings.image_size, int(1e6 * settings.max_megapixels))
