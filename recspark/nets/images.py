"""Networks that read pictures: those of torchvision, and a small one for training on CPUs.

Sources: AlexNet: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural
networks"; VGG: Simonyan & Zisserman 2015; GoogLeNet: Szegedy et al. 2015; ResNet: He et al. 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from recspark.errors import ModelError
from recspark.train.random_numbers import torch_random

Architecture = Literal["alexnet", "vgg11", "vgg16", "googlenet", "resnet18", "resnet50"]
# Mean and standard deviation of red, green and blue on ImageNet, of numbers in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The module whose output describes a picture, after the average over places, and its length.
LENGTHS: dict[str, int] = {
    "alexnet": 256,
    "vgg11": 512,
    "vgg16": 512,
    "googlenet": 1024,
    "resnet18": 512,
    "resnet50": 2048,
}
LEAST_SIDE_OF_ALEXNET = 64  # pixels; of a smaller picture its layers leave nothing
HIDDEN_LENGTH = 4096  # of AlexNet and VGG
_NAMED_AT_MOST = 5  # names in an error


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Return bytes (B, H, W, 3) as numbers (B, 3, H, W) of about mean 0 and deviation 1.

    The numbers are those that torchvision's networks were trained on.
    """
    numbers = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    mean = torch.tensor(_MEAN, device=numbers.device)[:, None, None]  # (3, 1, 1)
    std = torch.tensor(_STD, device=numbers.device)[:, None, None]
    return (numbers - mean) / std


class FeatureNet(nn.Module):
    """The part of one of torchvision's networks that describes a picture; the classes are left out.

    `pooled`: the average over places of the last convolutions, 256 to 2,048 numbers. `hidden`
    (AlexNet and VGG): the 4,096 numbers before the classes (fc7).
    """

    def __init__(self, network: nn.Module, architecture: Architecture, layer: str) -> None:
        super().__init__()
        self.architecture, self.layer = architecture, layer
        untyped: Any = network
        if architecture in ("googlenet", "resnet18", "resnet50"):
            untyped.fc = nn.Identity()
        elif layer == "hidden":
            untyped.classifier = untyped.classifier[:-1]
        else:
            untyped.classifier = nn.Identity()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the description of each picture, (B, D). `pixels` (B, 3, H, W)."""
        untyped: Any = self.network
        if self.architecture.startswith(("alexnet", "vgg")) and self.layer == "pooled":
            places = untyped.features(pixels)  # (B, D, h, w)
            return functional.adaptive_avg_pool2d(places, 1).flatten(1)  # (B, D)
        features: torch.Tensor = untyped(pixels)  # (B, D)
        return features


def _builder(architecture: str) -> Any:
    import torchvision  # takes seconds, and the small network does without

    return getattr(torchvision.models, architecture)


def untrained(architecture: Architecture, seed: int, **settings: Any) -> nn.Module:
    """Return torchvision's network with first weights drawn from `seed`."""
    build = _builder(architecture)
    if architecture == "googlenet":
        settings = {"aux_logits": False, "init_weights": True, **settings}
    with torch_random(seed, "cpu"):
        network: nn.Module = build(weights=None, **settings)
    return network


def with_weights(architecture: Architecture, weights: Mapping[str, Any], where: str) -> nn.Module:
    """Return torchvision's network for the 1,000 classes of ImageNet, with these weights.

    `weights` : name -> tensor, exactly as torchvision names them. The two further classifiers of
    GoogLeNet (`aux1`, `aux2`) may be among them; they are left out. `where` begins the errors.
    Raises ModelError that names tensors that are missing, unknown or of another shape.
    """
    tensors = {
        name: value
        for name, value in weights.items()
        if architecture != "googlenet" or not name.startswith(("aux1.", "aux2."))
    }
    build = _builder(architecture)
    settings: dict[str, Any] = {}
    if architecture == "googlenet":  # its published weights expect pixels scaled in another way
        settings = {"aux_logits": False, "init_weights": False, "transform_input": True}
    with torch.device("meta"):  # shapes without numbers: nothing is drawn
        network: nn.Module = build(weights=None, **settings)
    expected = network.state_dict()
    problems = []
    not_tensors = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if not_tensors:
        problems.append(f"no tensors: {_few(not_tensors)}")
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing: {_few(missing)}")
    if unknown := [name for name in tensors if name not in expected]:
        problems.append(f"unknown: {_few(unknown)}")
    others = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if isinstance(tensors.get(name), torch.Tensor)
        and tensors[name].shape != expected[name].shape
    ]
    if others:
        problems.append(f"of another shape: {_few(others)}")
    if problems:
        raise ModelError(
            f"{where}: not the weights of torchvision's {architecture}: {'; '.join(problems)}"
        )
    network.load_state_dict(tensors, strict=True, assign=True)
    return network


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


class SmallResNet(nn.Module):
    """A residual network of 9 layers for pictures of 32 to 128 pixels a side.

    He et al. 2016, section 4.2, with one block a stage, after a first layer of stride 2.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            [_Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)]
        )
        self.fc = nn.Linear(4 * width, size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return (B, size). `pixels` (B, 3, H, W)."""
        x = functional.relu(self.stem_norm(self.stem(pixels)))  # (B, W, H / 2, W / 2)
        for block in self.blocks:
            x = block(x)  # (B, 4 W, H / 8, W / 8) in the end
        means: torch.Tensor = self.fc(x.mean(dim=(2, 3)))  # (B, size)
        return means


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(n_out)
        self.second = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        hidden = self.second_norm(self.second(hidden))
        shown: torch.Tensor = functional.relu(hidden + self.shortcut(x))
        return shown


def untrained_small(width: int, size: int, seed: int) -> SmallResNet:
    """Return a `SmallResNet` with first weights drawn from `seed`."""
    with torch_random(seed, "cpu"):
        return SmallResNet(width, size)


def changed_at_random(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return pictures (B, H, W, 3), half of them mirrored, each shifted by up to an eighth a side.

    A shift repeats the pixels at the edge. `generator` draws.
    """
    n, height, width, _ = images.shape
    device = images.device
    draws = torch.rand(3, n, generator=generator, device=device)  # (3, B)
    dy = ((draws[0] * 2 - 1) * height / 8).round().long()  # (B,)
    dx = ((draws[1] * 2 - 1) * width / 8).round().long()
    y = (torch.arange(height, device=device) + dy[:, None]).clamp(0, height - 1)  # (B, H)
    x = (torch.arange(width, device=device) + dx[:, None]).clamp(0, width - 1)  # (B, W)
    x = torch.where((draws[2] < 0.5)[:, None], x.flip(1), x)
    row = torch.arange(n, device=device)  # (B,)
    return images[row[:, None, None], y[:, :, None], x[:, None, :]]  # (B, H, W, 3)


def without_last_layer(net: nn.Module) -> None:
    """Make a network return what its last layer reads."""
    untyped: Any = net
    if hasattr(net, "fc"):
        untyped.fc = nn.Identity()
    else:
        untyped.classifier = untyped.classifier[:-1]
