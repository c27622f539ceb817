"""Weights from a file: torchvision's names and shapes, or an error that says which do not fit."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image as PilImage

from recspark.data.media import middle
from recspark.errors import ConfigError, ModelError
from recspark.models.content.image import Image
from recspark.models.content.image_features import (
    ImageFeatures,
    ImageFeaturesCoder,
    ImageFeaturesModel,
    network_of,
)
from recspark.nets.images import FeatureNet, pixels_of, untrained, with_weights
from recspark.testing.synth import picture

pytestmark = pytest.mark.torch

SMALL = {"resize": 40, "crop": 32}


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    return untrained("resnet18", 3).eval()


def saved(path: Path, weights: Any) -> dict[str, str]:
    """Save weights; return the settings that name them."""
    torch.save(weights, path)
    return {"weights": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def coder_of(settings: dict[str, Any]) -> ImageFeaturesCoder:
    algorithm = ImageFeatures.from_dict(settings)
    algorithm.check_needs({})
    return ImageFeaturesModel(algorithm.settings, datetime(2024, 1, 1, tzinfo=UTC)).coder()


def test_features_are_those_of_torchvision(resnet: torch.nn.Module, tmp_path: Path) -> None:
    """The average over places, which torchvision's network gives to its last layer."""
    given: list[torch.Tensor] = []
    hook = resnet.fc.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))  # type: ignore[operator,union-attr]
    path = tmp_path / "a.png"
    path.write_bytes(picture(np.array([250, 20, 90]), np.array([10, 200, 30])))
    settings = saved(tmp_path / "resnet18.pth", resnet.state_dict())
    coder = coder_of({**settings, **SMALL})
    batch = pa.RecordBatch.from_pydict({"media": [[str(path)], ["/none.png"]]})
    vectors, problems = coder.encode_or_explain(batch)
    with torch.inference_mode():
        resnet(pixels_of(torch.from_numpy(middle(PilImage.open(path), 40, 32))[None]))
    hook.remove()
    np.testing.assert_allclose(vectors[0], given[0][0].numpy(), rtol=1e-4, atol=1e-6)
    assert np.isnan(vectors[1]).all()
    assert problems == [None, "missing file"]


def test_lengths_of_the_features() -> None:
    """On random weights: pooled and hidden, of the networks that are small enough for a test."""
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        for network, layer, length in (
            ("alexnet", "pooled", 256),
            ("alexnet", "hidden", 4096),
            ("googlenet", "pooled", 1024),
        ):
            net = FeatureNet(untrained(network, 1), network, layer).eval()  # type: ignore[arg-type]
            assert net(pixels).shape == (1, length), (network, layer)


def test_the_further_classifiers_of_googlenet_are_left_out() -> None:
    import torchvision

    with torch.device("meta"):
        published = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    weights = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in published.state_dict().items()
    }
    assert any(name.startswith("aux1.") for name in weights)
    network: Any = with_weights("googlenet", weights, "weights")
    assert network.transform_input  # the published weights expect their own scale


Change = Callable[[dict[str, Any]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda w: {k: v for k, v in w.items() if k != "conv1.weight"},
        "not the weights of torchvision's resnet18: missing: conv1.weight$",
    ),
    "unknown": (lambda w: {**w, "fc2.bias": torch.zeros(1)}, "unknown: fc2.bias$"),
    "prefixed": (
        lambda w: {f"module.{k}": v for k, v in w.items()},
        r"missing: conv1.weight.* and 117 more; unknown: module.conv1.weight.* and 117 more$",
    ),
    "shape": (
        lambda w: {**w, "fc.bias": torch.zeros(10)},
        r"of another shape: fc.bias \(10,\), expected \(1000,\)$",
    ),
    "no tensor": (lambda w: {**w, "fc.bias": 3}, "no tensors: fc.bias$"),
    "a list": (lambda w: [1, 2], "a list, not a state dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_do_not_fit_are_named(
    name: str, resnet: torch.nn.Module, tmp_path: Path
) -> None:
    change, message = BROKEN[name]
    settings = saved(tmp_path / "w.pth", change(dict(resnet.state_dict())))
    with pytest.raises(ModelError, match=message):
        network_of("resnet18", settings["weights"], settings["sha256"], "pooled")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never"),))


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Evil()))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="not a state dict that torch reads"):
        network_of("resnet18", str(path), sha256, "pooled")
    with pytest.raises(ModelError, match=f"SHA-256 {sha256}, the settings say {'0' * 64}"):
        network_of("resnet18", str(path), "0" * 64, "pooled")
    with pytest.raises(ModelError, match="none.pth cannot be read"):
        network_of("resnet18", str(tmp_path / "none.pth"), sha256, "pooled")


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(ConfigError, match="image_features needs the settings weights"):
        ImageFeatures.from_dict({}).check_needs({})
    with pytest.raises(ConfigError, match="resnet18 has no hidden layer"):
        ImageFeatures.from_dict({"layer": "hidden"})
    with pytest.raises(ConfigError, match="crop = 224 is larger than resize = 100"):
        ImageFeatures.from_dict({"resize": 100})
    with pytest.raises(ConfigError, match="alexnet needs crop >= 64"):
        ImageFeatures.from_dict({"network": "alexnet", "crop": 63})
    with pytest.raises(ConfigError, match="alexnet needs image_size >= 64"):
        Image.from_dict({"network": "alexnet", "image_size": 63})
    with pytest.raises(ConfigError, match="sha256"):
        ImageFeatures.from_dict({"sha256": "ABC"})
