"""Encoders of pictures and sounds: items a second of one task, and memory with huge pictures.

Speed: one process with one thread, as a Spark task has. Files are on the local disk, so fetching
takes next to nothing. Networks have random weights; the speed does not depend on them.

Memory: the largest resident size of a process that decodes one picture, less that before it.

    python -m benchmarks media
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks import machine
from recspark import storage
from recspark.testing.synth import tone

NETWORKS = ("alexnet", "vgg11", "vgg16", "googlenet", "resnet18", "resnet50")
TRAINED = (("small", 64), ("resnet18", 64), ("resnet18", 224))
CUTOFF = datetime(2024, 1, 1, tzinfo=UTC)


def run(*, smoke: bool) -> None:
    """Print and write the figures."""
    figures: dict[str, Any] = {"items_per_s": {}, "memory": {}}
    with tempfile.TemporaryDirectory() as folder:
        addresses = _pictures(Path(folder), 4 if smoke else 24)
        sounds = _sounds(Path(folder), 4 if smoke else 100)
        for name, make in _coders(Path(folder), smoke=smoke).items():
            media = sounds if name == "audio" else addresses
            figures["items_per_s"][name] = _per_second(make(), media)
            print(f"{name:28s} {figures['items_per_s'][name]:8.1f} items a second", flush=True)
        for name, path in _huge(Path(folder), smoke=smoke).items():
            figures["memory"][name] = _memory(path)
            print(f"{name:28s} {figures['memory'][name]}", flush=True)
    if not smoke:
        machine.write("media", "python -m benchmarks media", figures)


def _pictures(folder: Path, n: int) -> list[str]:
    """Write photos as shops have them: JPEG of 800 x 800, of smooth noise."""
    addresses = []
    for k in range(n):
        coarse = np.random.default_rng(k).integers(0, 256, (25, 25, 3), np.uint8)
        path = folder / f"{k}.jpg"
        Image.fromarray(coarse).resize((800, 800)).save(path, quality=85)
        addresses.append(str(path))
    return addresses


def _sounds(folder: Path, n: int) -> list[str]:
    """Write sounds of three seconds at 44.1 kHz."""
    for k in range(n):
        (folder / f"{k}.wav").write_bytes(tone(200 + 10 * k, 3.0, 44_100))
    return [str(folder / f"{k}.wav") for k in range(n)]


def _coders(folder: Path, *, smoke: bool) -> dict[str, Callable[[], Any]]:
    """Return name -> function that makes the coder, so that one network is in memory at a time."""
    from recspark.models.content import audio, colours, image

    coders: dict[str, Callable[[], Any]] = {
        "colours": lambda: colours.ColoursModel(colours.ColoursSettings(), CUTOFF).coder(),  # type: ignore[call-arg]
        "audio": lambda: _trained(audio.AudioModel(audio.AudioSettings(), CUTOFF, {})),  # type: ignore[call-arg]
    }
    for network in NETWORKS[4:5] if smoke else NETWORKS:
        coders[f"image_features {network}"] = lambda network=network: _pretrained(network, folder)  # type: ignore[misc]
    for network, size in TRAINED[:1] if smoke else TRAINED:
        settings = image.ImageSettings(network=network, image_size=size)  # type: ignore[call-arg,arg-type]
        coders[f"image {network} {size}"] = lambda settings=settings: _trained(  # type: ignore[misc]
            image.ImageModel(settings, CUTOFF, {})
        )
    return coders


def _pretrained(network: Any, folder: Path) -> Any:
    import torch

    from recspark.models.content import image_features
    from recspark.nets.images import untrained

    path = folder / "weights.pth"
    torch.save(untrained(network, 1).state_dict(), path)
    settings = image_features.ImageFeaturesSettings(  # type: ignore[call-arg]
        network=network, weights=str(path), sha256=storage.sha256(str(path))
    )
    return image_features.ImageFeaturesModel(settings, CUTOFF).coder()


def _trained(model: Any, size: int = 64) -> Any:
    """Return the coder of a network for factors of `size` numbers, with its first weights."""
    from recspark.models.content.factor_regression import CENTRE, SCALE
    from recspark.models.neural import net_arrays

    arrays = net_arrays(model.make_net(size, 1))
    factors = {CENTRE: np.zeros(size, np.float32), SCALE: np.ones(1, np.float32)}
    return type(model)(model.settings, CUTOFF, {**arrays, **factors}).coder()


def _per_second(coder: Any, addresses: list[str]) -> float:
    """Return items per second, after two that load the network."""

    def encode(media: list[str]) -> None:
        batch = pa.RecordBatch.from_pydict({"media": [[address] for address in media]})
        assert np.isfinite(coder.encode(batch)).all()

    encode(addresses[:2])
    begun = time.perf_counter()
    encode(addresses)
    return round(len(addresses) / (time.perf_counter() - begun), 1)


def _huge(folder: Path, *, smoke: bool) -> dict[str, Path]:
    """Write pictures of 100 million pixels (of 1 million in smoke mode)."""
    side = 1000 if smoke else 10_000
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:: side // 100] = 200
    paths = {}
    for name, shown, form, options in (
        ("JPEG", pixels, "JPEG", {"quality": 80}),
        ("progressive JPEG", pixels, "JPEG", {"quality": 80, "progressive": True}),
        ("PNG", pixels, "PNG", {"compress_level": 1}),
        ("PNG of a quarter", pixels[: side // 2, : side // 2], "PNG", {"compress_level": 1}),
    ):
        paths[name] = folder / f"huge{len(paths)}"
        Image.fromarray(shown).save(paths[name], form, **options)
    # A file of a few bytes that says that it has 100 million pixels: as GIF, for a bomb.
    out = io.BytesIO()
    Image.new("P", (1, 1)).save(out, "GIF")
    data = bytearray(out.getvalue())
    data[6:10] = side.to_bytes(2, "little") * 2
    paths["GIF header"] = folder / "bomb"
    paths["GIF header"].write_bytes(bytes(data))
    return paths


def _memory(path: Path) -> dict[str, Any]:
    """Return what a process of its own says of one picture."""
    command = [sys.executable, "-m", "benchmarks.media", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answer, megabytes, seconds = out.split("|")
    return {"answer": answer, "mb": float(megabytes), "s": float(seconds)}


def _decode_one(path: str) -> None:
    from recspark.data.media import MediaError, Source, decode_image

    def peak_mb() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        [line] = [
            line for line in lines if line.startswith("VmHWM")
        ]  # in KB, of this program alone
        return int(line.split()[1]) / 1024

    before, begun = peak_mb(), time.perf_counter()
    try:
        data = Source("", 200 << 20).fetch(path)
        answer = "{} x {}".format(*decode_image(data, 25_000_000, 256).size)
    except MediaError as error:
        answer = error.problem
    seconds = time.perf_counter() - begun
    size = os.path.getsize(path) / 2**20
    print(f"{answer}, file of {size:.1f} MB|{peak_mb() - before:.0f}|{seconds:.2f}")


if __name__ == "__main__":
    _decode_one(sys.argv[1])
