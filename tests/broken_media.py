"""Media files that cannot be used: each with the reason for which it is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recspark.testing.synth import picture, tone

# Limits that the files are refused by.
MAX_BYTES, MAX_PIXELS, MAX_SECONDS = 1 << 20, 1_000_000, 5.0


def saved(pixels: Any, form: str, **options: Any) -> bytes:
    """Return a picture of these pixels in a format of Pillow."""
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, form, **options)
    return out.getvalue()


def noise(width: int = 60, height: int = 40) -> np.ndarray:
    """Return random pixels, uint8 (height, width, 3)."""
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8) -> bytes:
    """Return a grey PNG with this header and these chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        parts.append(struct.pack(">I", len(content)) + name + content + checksum)
    return b"".join(parts)


def wav(
    data: bytes = b"\1\2" * 800,
    tag: int = 1,
    channels: int = 1,
    rate: int = 8000,
    bits: int = 16,
    block: int | None = None,
    fmt: bytes | None = None,
) -> bytes:
    """Return a wav file with this header."""
    block = channels * bits // 8 if block is None else block
    if fmt is None:
        fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(data)) + b"WAVE" + chunks + data


def jpeg_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG whose header says another size."""
    data = bytearray(saved(noise(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def broken_images() -> dict[str, tuple[bytes | None, str]]:
    """Return name -> (content, reason); None = no file is written."""
    jpeg, gif, webp, bmp = (saved(noise(), form) for form in ("JPEG", "GIF", "WEBP", "BMP"))
    drawing, photo = picture(np.zeros(3), np.full(3, 200)), saved(noise(), "PNG")
    pixels = zlib.compress(b"\0" * 9 * 8)  # 8 rows of 8 grey pixels
    wide = saved(np.zeros((1, 5000), np.uint8), "PNG")
    bad_crc = bytearray(photo)
    bad_crc[30] ^= 255  # in the checksum of the header
    gif_of_size = gif[:6] + struct.pack("<HH", 65000, 65000) + gif[10:]
    bmp_of_size = bmp[:18] + struct.pack("<ii", 50_000, 50_000) + bmp[26:]
    large = saved(noise(1300, 1000), "JPEG", progressive=True, quality=20)
    text_bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (80 << 20), 9))
    return {
        "missing.png": (None, "missing file"),
        "empty.png": (b"", "empty file"),
        "heavy.png": (photo + bytes(MAX_BYTES), "file too large"),
        "page.jpg": (b"<!doctype html><title>404</title>" * 9, "unknown format"),
        "text.png": (b"no picture", "unknown format"),
        "zeros.png": (bytes(1000), "unknown format"),
        "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown format"),
        "paper.jpg": (b"%PDF-1.7\n%\xe2\xe3", "unknown format"),
        "scan.png": (saved(noise(), "TIFF"), "unknown format"),
        "icon.png": (saved(noise(32, 32), "ICO"), "unknown format"),
        "sound.png": (tone(440), "unknown format"),
        "start.jpg": (jpeg[:3], "broken"),
        "header.jpg": (jpeg[:200], "truncated"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "nearly.jpg": (jpeg[:-30], "truncated"),
        "half.png": (photo[: len(photo) // 2], "truncated"),
        "nearly.png": (photo[:-12], "truncated"),
        "start.png": (photo[:12], "broken"),
        "checksum.png": (bytes(bad_crc), "broken"),
        "no_pixels.png": (png(8, 8), "broken"),
        "few_pixels.png": (png(8, 8, (b"IDAT", pixels[:-10])), "truncated"),
        "garbage.png": (png(8, 8, (b"IDAT", b"\1" * 50)), "broken"),
        "text_bomb.png": (png(8, 8, text_bomb, (b"IDAT", pixels)), "broken"),
        "bomb.png": (saved(Image.new("1", (20_000, 1500)), "PNG"), "too many pixels"),
        "endless.png": (png(2**31 - 1, 2**31 - 1, (b"IDAT", pixels)), "too many pixels"),
        "bomb.gif": (gif_of_size, "too many pixels"),
        "bomb.bmp": (bmp_of_size, "too many pixels"),
        "bomb.jpg": (jpeg_of_size(65_000, 65_000), "too many pixels"),
        "progressive.jpg": (large, "too many pixels"),
        "line.png": (wide, "too narrow"),
        "half.gif": (gif[: len(gif) // 2], "truncated"),
        "half.webp": (webp[: len(webp) // 2], "broken"),
        "half.bmp": (bmp[: len(bmp) // 2], "truncated"),
        "cut_drawing.png": (drawing[:-20], "truncated"),
    }


def broken_sounds() -> dict[str, tuple[bytes | None, str]]:
    """Return name -> (content, reason); None = no file is written."""
    good = tone(440)
    nan = np.array([0.1, np.nan], "<f4").tobytes()
    return {
        "missing.wav": (None, "missing file"),
        "empty.wav": (b"", "empty file"),
        "song.wav": (b"ID3\3\0\0\0\0\0\0" + bytes(200), "unknown format"),
        "film.wav": (good[:8] + b"AVI " + good[12:], "unknown format"),
        "picture.wav": (picture(np.zeros(3), np.ones(3)), "unknown format"),
        "start.wav": (good[:8], "truncated"),
        "half.wav": (good[: len(good) // 2], "truncated"),
        "no_data.wav": (good[:36], "truncated"),
        "endless.wav": (good[:40] + b"\xff\xff\xff\xff" + good[44:], "truncated"),
        "no_format.wav": (good[:12] + good[36:], "broken"),
        "short_format.wav": (wav(fmt=b"\1\0\1\0"), "broken"),
        "no_channels.wav": (wav(channels=0, block=2), "broken"),
        "channels.wav": (wav(channels=65535, block=2), "broken"),
        "block.wav": (wav(block=3), "broken"),
        "alaw.wav": (wav(tag=6, bits=8), "unknown encoding"),
        "adpcm.wav": (wav(tag=2, bits=4, block=1), "unknown encoding"),
        "twelve.wav": (wav(bits=12, block=2), "unknown encoding"),
        "half_float.wav": (wav(tag=3, bits=16), "unknown encoding"),
        "rate_0.wav": (wav(rate=0), "bad sampling rate"),
        "rate_huge.wav": (wav(rate=4_000_000), "bad sampling rate"),
        "no_samples.wav": (wav(data=b""), "no samples"),
        "one_byte.wav": (wav(data=b"\1"), "no samples"),
        "long.wav": (wav(data=b"\1\2" * 6000, rate=1000), "too long"),
        "silent.wav": (wav(data=bytes(1600)), "silent"),
        "not_finite.wav": (wav(data=nan, tag=3, bits=32), "not finite"),
    }


def write(folder: Path, files: dict[str, tuple[bytes | None, str]]) -> None:
    """Write the files that have a content."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
