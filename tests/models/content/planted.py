"""Pictures and sounds whose class decides who likes them: the class is in the form, not in what is
easily counted.
"""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
from PIL import Image

N_CLASSES = 4
RATE = 8000


def pictures(classes: np.ndarray, folder: Path, seed: int) -> list[str]:
    """Write a picture for each item: stripes across, stripes down, a square, or a frame.

    Two colours are drawn for each picture, so no colour tells the class. Returns the addresses.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = np.arange(48) // 6 % 2 == 0
    middle = np.zeros((48, 48), bool)
    middle[12:36, 12:36] = True
    edge = np.zeros((48, 48), bool)
    edge[:7], edge[-7:], edge[:, :7], edge[:, -7:] = True, True, True, True
    masks = (
        np.broadcast_to(lines[:, None], (48, 48)),
        np.broadcast_to(lines, (48, 48)),
        middle,
        edge,
    )
    addresses = []
    for n, k in enumerate(classes.tolist()):
        dark, light = rng.integers(0, 110, 3), rng.integers(145, 256, 3)
        if rng.random() < 0.5:
            dark, light = light, dark
        pixels = np.where(masks[k][:, :, None], dark, light) + rng.normal(0, 8, (48, 48, 3))
        path = folder / f"{n}.png"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        addresses.append(str(path))
    return addresses


def sounds(classes: np.ndarray, folder: Path, seed: int) -> list[str]:
    """Write a sound for each item, of two tones: low low, low high, high low, or high high.

    Loudness and length are drawn; the second and the third class differ in nothing but the order.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    addresses = []
    for n, k in enumerate(classes.tolist()):
        length = int(rng.uniform(0.12, 0.2) * RATE)
        tones = []
        for is_high in (k >= 2, k % 2 == 1):
            hertz = rng.uniform(1400, 1800) if is_high else rng.uniform(350, 500)
            tones.append(np.sin(2 * np.pi * hertz * np.arange(length) / RATE))
        samples = rng.uniform(0.05, 0.8) * np.concatenate(tones)
        samples += rng.normal(0, 0.002, len(samples))
        out = io.BytesIO()
        with wave.open(out, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
        path = folder / f"{n}.wav"
        path.write_bytes(out.getvalue())
        addresses.append(str(path))
    return addresses


def ndcg(scores: np.ndarray, classes: np.ndarray, k: int = 10) -> float:
    """Return the mean NDCG@k over classes: `scores` (N_CLASSES, n), of the users who like each."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gains = []
    for liked, row in enumerate(scores):
        hits = classes[np.argsort(-row, kind="stable")[:k]] == liked
        n_best = min(k, int((classes == liked).sum()))
        gains.append((hits * discounts).sum() / discounts[:n_best].sum())
    return float(np.mean(gains))
