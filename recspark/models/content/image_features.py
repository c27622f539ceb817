"""What a network of torchvision, trained elsewhere, sees in an item's picture.

The weights are a file of a state dict with torchvision's names. They stay where they are: the
artifact names the file and its SHA-256.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from recspark import storage
from recspark.data import media
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.media import Kind, Source
from recspark.errors import ConfigError, ModelError
from recspark.models.base import NOTHING, Algorithm, FitOptions, Needed, Settings
from recspark.models.content.media import (
    MaxFileMb,
    MaxMegapixels,
    MediaCoder,
    MediaFolder,
    source_of,
)
from recspark.models.content.settings_only import SettingsOnlyEncoder
from recspark.models.kinds import Kind as ModelKind
from recspark.nets.images import (
    HIDDEN_LENGTH,
    LEAST_SIDE_OF_ALEXNET,
    LENGTHS,
    Architecture,
    FeatureNet,
    pixels_of,
    with_weights,
)


class ImageFeaturesSettings(Settings):
    """Settings of `ImageFeatures`."""

    network: Architecture = Field("resnet18", description="which network of torchvision")
    weights: str = Field(
        "",
        description="URI of the file with the weights: a state dict as torchvision saves and names "
        "it, for the 1,000 classes of ImageNet. Executors read it too",
    )
    sha256: str = Field(
        "", pattern="^([0-9a-f]{64})?$", description="SHA-256 of the file with the weights"
    )
    layer: Literal["pooled", "hidden"] = Field(
        "pooled",
        description="pooled = the average over the places of the last convolutions; hidden = the "
        "4,096 numbers before the classes, of AlexNet and VGG",
    )
    resize: int = Field(
        256,
        ge=32,
        le=1024,
        description="pixels of a picture's shorter side. As it was trained: 256",
    )
    crop: int = Field(
        224,
        ge=32,
        le=1024,
        description="pixels per side of the square that is cut from the middle. As it was trained: "
        "224",
    )
    folder: MediaFolder = ""
    max_file_mb: MaxFileMb = 50
    max_megapixels: MaxMegapixels = 25.0

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.crop > self.resize:
            raise ValueError(f"crop = {self.crop} is larger than resize = {self.resize}")
        if self.network == "alexnet" and self.crop < LEAST_SIDE_OF_ALEXNET:
            raise ValueError(f"alexnet needs crop >= {LEAST_SIDE_OF_ALEXNET}")
        if self.layer == "hidden" and not self.network.startswith(("alexnet", "vgg")):
            raise ValueError(
                f"{self.network} has no hidden layer before the classes: layer = pooled"
            )
        return self


class ImageFeaturesModel(SettingsOnlyEncoder):
    """Names a file of weights and its checksum, which the settings hold."""

    settings: ImageFeaturesSettings

    def coder(self) -> ImageFeaturesCoder:
        """See `EncoderModel`."""
        settings = self.settings
        return ImageFeaturesCoder(source_of(settings.folder, settings.max_file_mb), settings)


@dataclass
class ImageFeaturesCoder(MediaCoder):
    """Each worker loads the network once, at its first picture."""

    source: Source
    settings: ImageFeaturesSettings

    @property
    def kind(self) -> Kind:
        """See `MediaCoder`."""
        return "image"

    @property
    def size(self) -> int:
        """See `MediaCoder`."""
        settings = self.settings
        return HIDDEN_LENGTH if settings.layer == "hidden" else LENGTHS[settings.network]

    def vector(self, data: bytes) -> Array:
        """See `MediaCoder`."""
        settings = self.settings
        max_pixels = int(1e6 * settings.max_megapixels)
        image = media.decode_image(data, max_pixels, settings.resize)
        cut = media.middle(image, settings.resize, settings.crop)  # (crop, crop, 3)
        with torch.inference_mode():
            features = network_of(
                settings.network, settings.weights, settings.sha256, settings.layer
            )(pixels_of(torch.from_numpy(cut)[None]))  # (1, D)
        return np.asarray(features[0].numpy(), np.float32)


@lru_cache(maxsize=2)
def network_of(architecture: Architecture, weights: str, sha256: str, layer: str) -> FeatureNet:
    """Return the network with the weights of a file; the last two are kept in memory.

    Raises ModelError where the file is missing, has another checksum, is no state dict, or does not
    fit the network. The file is unpickled with `weights_only`, which runs no code. torch computes on
    one thread from then on, as a Spark task has one core.
    """
    torch.set_num_threads(1)
    tensors = _state_dict(weights, sha256)
    return FeatureNet(with_weights(architecture, tensors, weights), architecture, layer).eval()


def _state_dict(uri: str, sha256: str) -> dict[str, torch.Tensor]:
    try:
        data = storage.read_bytes(storage.absolute(uri))
    except OSError as error:
        raise ModelError(f"weights {uri} cannot be read: {error}") from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise ModelError(f"weights {uri}: SHA-256 {actual}, the settings say {sha256 or 'none'}")
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise errors of many classes
        first_line = str(error).split("\n", 1)[0]
        raise ModelError(
            f"weights {uri}: not a state dict that torch reads: {first_line}"
        ) from None
    if not isinstance(tensors, Mapping):
        raise ModelError(f"weights {uri}: a {type(tensors).__name__}, not a state dict")
    return dict(tensors)


class ImageFeatures(Algorithm[ImageFeaturesSettings]):
    """The features of the item's first picture, by a network with weights from a file.

    Nothing is learned here, so a night encodes only items that are new or described anew.
    """

    settings_class = ImageFeaturesSettings
    learns = False

    def check_needs(self, kinds: Mapping[str, ModelKind]) -> None:
        """See `Algorithm`. Built on no model. Raises ConfigError without a file of weights."""
        super().check_needs(kinds)
        settings = self.settings
        if not settings.weights or not settings.sha256:
            raise ConfigError(
                "image_features needs the settings weights (a file of torchvision's "
                f"{settings.network}) and sha256 (its checksum); recspark ships no weights. To train "
                "a network on the shop's own pictures, use image"
            )

    def fit(
        self, data: Dataset, options: FitOptions, needed: Needed = NOTHING
    ) -> ImageFeaturesModel:
        """See `Algorithm.fit`. The driver reads the weights once, to check them."""
        settings = self.settings
        self.check_needs({})
        with_weights(
            settings.network, _state_dict(settings.weights, settings.sha256), settings.weights
        )
        return ImageFeaturesModel(settings, data.cutoff)
