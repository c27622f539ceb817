"""Pictures and sounds of items: fetched through `recspark.storage` and decoded with limits.

Addresses and files come from outside. Whatever is wrong with one of them is a `MediaError` with a
short reason (`PROBLEMS`), so that one item has no vector and all others have theirs. Every limit is
checked before the memory that it limits is taken.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from recspark import storage
from recspark.data.blocks import Array
from recspark.errors import RecsparkError

Kind = Literal["image", "sound"]

MISSING, UNREADABLE = "missing file", "unreadable file"
# Why an item has no vector.
PROBLEMS = (
    "no image",
    "no sound",
    "bad address",  # relative without a folder, with "..", or of a scheme that nothing reads
    MISSING,
    UNREADABLE,  # the store refused, or the address is a folder
    "empty file",
    "file too large",
    "unknown format",
    "truncated",
    "broken",
    "too many pixels",
    "too narrow",  # one side is more than 20 times the other
    "unknown colours",  # numbers per pixel that are no colours, such as 32-bit measurements
    "unknown encoding",  # a wav file that is neither PCM nor floating-point numbers
    "bad sampling rate",
    "no samples",
    "too long",
    "not finite",
    "silent",
)

EXTENSIONS: dict[Kind, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "webp", "bmp"),
    "sound": ("wav", "wave"),
}
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
_WIDEST = 20  # longer side of a picture / shorter side, at most
_PNG_SIGNATURE, _PNG_CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">I4s")
_SCANS_OF_JPEG = {0xC0, 0xC1, 0xC2}  # SOF markers of the JPEG kinds that libjpeg decodes
_LEAST_RATE, _LARGEST_RATE = 1_000, 400_000  # Hz
_MOST_CHANNELS = 32
_SILENCE = 1e-4  # largest sample of a sound that is silent; 1 = full scale
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


class MediaError(Exception):
    """A picture or sound cannot be used; `problem` is one of `PROBLEMS`."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True)
class Source:
    """Where media are, and how much of a file is read.

    Parameters
    ----------
    folder : URI that addresses without a scheme and without a leading slash are below; "" = such
        addresses are refused, as a worker's own folder is not known
    max_bytes : largest file
    """

    folder: str
    max_bytes: int

    def uri(self, address: str) -> str:
        """Return the URI of an address of column `media`.

        >>> Source("s3://shop/pictures", 1).uri("a/1.png")
        's3://shop/pictures/a/1.png'
        """
        is_relative = "://" not in address and not address.startswith("/")
        parts = address.replace("\\", "/").split("/")
        if not address.isprintable() or "::" in address or ".." in parts:
            raise MediaError("bad address")
        if is_relative and not self.folder:
            raise MediaError("bad address")
        return storage.join(self.folder, address) if is_relative else address

    def fetch(self, address: str) -> bytes:
        """Return the bytes of one file; raises MediaError. At most `max_bytes` + 1 are read."""
        uri = self.uri(address)
        try:
            n_bytes = storage.size(uri)
            if n_bytes is None:
                raise MediaError(MISSING)
            if n_bytes == 0:
                raise MediaError("empty file")
            if n_bytes > self.max_bytes:
                raise MediaError("file too large")
            data = storage.read_bytes(uri, 0, self.max_bytes + 1)
        except FileNotFoundError:
            raise MediaError(MISSING) from None
        except (
            RecsparkError,
            ValueError,
            ImportError,
        ):  # no such scheme, or its package is missing
            raise MediaError("bad address") from None
        except MediaError:
            raise
        except Exception:  # stores raise errors of their own classes
            raise MediaError(UNREADABLE) from None
        if not data:
            raise MediaError("empty file")
        if len(data) > self.max_bytes:
            raise MediaError("file too large")
        return data


def address_of(media: Sequence[str | None] | None, kind: Kind) -> str:
    """Return the address of the first image (or sound) among an item's media.

    It is the first whose name has an extension of the kind; else the first whose name has no
    extension of any kind, whose content then decides. Raises MediaError where there is none.

    >>> address_of(["a.wav", "b.PNG?size=3", "c.jpg"], "image")
    'b.PNG?size=3'
    """
    unknown = None
    for address in media or ():
        if not address:
            continue
        extension = _extension(address)
        if extension in EXTENSIONS[kind]:
            return address
        if unknown is None and not any(extension in names for names in EXTENSIONS.values()):
            unknown = address
    if unknown is None:
        raise MediaError(f"no {kind}")
    return unknown


def _extension(address: str) -> str:
    name = address.split("?", 1)[0].split("#", 1)[0].rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[1].lower() if "." in name else ""


def fetched(
    source: Source,
    media_of_items: Iterable[Sequence[str | None] | None],
    kind: Kind,
    ahead: int = 4,
) -> Iterator[bytes | MediaError]:
    """Yield the bytes of the image (or sound) of each item, or why there are none, in order.

    `ahead` files are fetched by threads while the caller decodes the one before. Memory: `ahead`
    files.
    """

    def fetch(media: Sequence[str | None] | None) -> bytes | MediaError:
        try:
            return source.fetch(address_of(media, kind))
        except MediaError as error:
            return error

    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[Future[bytes | MediaError]] = deque()
        for media in media_of_items:
            waiting.append(pool.submit(fetch, media))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- pictures -----------------------------------------------------------------------------------


def decode_image(data: bytes, max_pixels: int, wanted_size: int) -> Image.Image:
    """Return a picture as RGB; raises MediaError.

    Parameters
    ----------
    data : a file of JPEG, PNG, GIF, WebP or BMP, by its content
    max_pixels : largest number of pixels that are decoded. A JPEG of one scan is decoded at a half,
        a quarter or an eighth of its size where it is so large, so it may have up to 64 times as
        many
    wanted_size : both sides of the result have at least twice this size, where the picture has

    The first frame of an animation is taken. Palettes, grey, CMYK (by its plain formula, without
    colour profiles) and 16-bit grey become RGB; transparent parts lie on white. A picture is turned
    as its EXIF orientation says. Memory: at most about 16 bytes for each
    of `max_pixels`, and 4 where the file has red, green and blue.
    """
    with warnings.catch_warnings():
        # Pillow's warning about large pictures: the limit is checked here.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(image, data, max_pixels, wanted_size)
            image.load()
            return _upright(_rgb(image))
        except MediaError:
            raise
        except UnidentifiedImageError:
            # Pillow says the same of a file whose header is cut short.
            raise MediaError("broken" if _has_known_start(data) else "unknown format") from None
        except Image.DecompressionBombError:
            raise MediaError("too many pixels") from None
        except Exception as error:  # decoders raise errors of many classes
            is_cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
            raise MediaError("truncated" if is_cut else "broken") from None


def _has_known_start(data: bytes) -> bool:
    starts = (b"\xff\xd8\xff", _PNG_SIGNATURE, b"GIF87a", b"GIF89a", b"BM")
    return data.startswith(starts) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _check_size(image: Image.Image, data: bytes, max_pixels: int, wanted_size: int) -> None:
    """Raise MediaError where too much would be decoded; ask for a smaller JPEG where it is large."""
    width, height = image.size
    if max(width, height) > _WIDEST * min(width, height):
        raise MediaError("too narrow")
    if image.format in ("JPEG", "MPO") and _is_of_one_scan(data):  # MPO: a JPEG with more behind it
        # Draft mode keeps both sides at least as long as those asked for.
        shorter = 2 * wanted_size
        scale = max(shorter / width, shorter / height)
        image.draft(None, (math.ceil(scale * width), math.ceil(scale * height)))
    if image.width * image.height > max_pixels:
        raise MediaError("too many pixels")
    if image.format == "PNG" and not _has_end(data):
        raise MediaError("truncated")  # Pillow shows the rows that are there


def _is_of_one_scan(data: bytes) -> bool:
    """Return whether a JPEG has all components in its first scan, and is not progressive.

    libjpeg decodes any other JPEG from an array of all its coefficients, at full size.
    """
    position, n_components, is_progressive = 2, 0, False
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return False
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _SCANS_OF_JPEG and position + 9 < len(data):
            n_components, is_progressive = data[position + 9], marker == 0xC2
        if marker == 0xDA:
            is_complete = position + 4 < len(data) and data[position + 4] == n_components
            return is_complete and not is_progressive
        position += 2 + length
    return False


def _has_end(png: bytes) -> bool:
    """Return whether the chunks of a PNG reach its last one, IEND."""
    position = len(_PNG_SIGNATURE)
    while position + _PNG_CHUNK.size <= len(png):
        length, name = _PNG_CHUNK.unpack_from(png, position)
        position += 12 + length
        if name == b"IEND":
            return True
    return False


def _rgb(image: Image.Image) -> Image.Image:
    """Return a decoded picture as RGB; its EXIF data stay in `info`."""
    info = image.info
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise MediaError("unknown colours")
        image = Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise MediaError("unknown colours")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.info.update({name: info[name] for name in ("exif",) if name in info})
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # broken EXIF data: the picture stays as it is
        return image
    return image


def squeezed(image: Image.Image, size: int) -> Array:
    """Return the whole picture in a square, uint8 (size, size, 3); its proportions change."""
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def middle(image: Image.Image, size: int, crop: int) -> Array:
    """Return the middle of a picture whose shorter side is made `size`, uint8 (crop, crop, 3).

    As torchvision's networks were trained: `torchvision.transforms` resize and centre crop.
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2.0), round((height - crop) / 2.0)
    return np.array(resized.crop((left, top, left + crop, top + crop)))


# --- sounds -------------------------------------------------------------------------------------


def decode_sound(data: bytes, rate: int, max_seconds: float, excerpt_seconds: float) -> Array:
    """Return the middle of a sound as one channel, float32 (n,) in [-1, 1]; raises MediaError.

    Parameters
    ----------
    data : a wav file, PCM of 8, 16, 24 or 32 bits or floating-point numbers of 32 or 64 bits
    rate : samples per second of the result
    max_seconds : a longer sound is refused
    excerpt_seconds : at most this much is decoded, from the middle of the sound

    Channels are averaged. Memory: that of the file and about 40 bytes per sample of the excerpt.
    """
    format_, samples = _chunks(data)
    dtype, n_channels, own_rate = _encoding(format_)
    frame_bytes = n_channels * dtype.itemsize
    n_frames = len(samples) // frame_bytes
    if n_frames == 0:
        raise MediaError("no samples")
    if n_frames > max_seconds * own_rate:
        raise MediaError("too long")
    kept = min(n_frames, math.ceil(excerpt_seconds * own_rate))
    first = (n_frames - kept) // 2
    raw = samples[first * frame_bytes : (first + kept) * frame_bytes]
    mono = _numbers(raw, dtype).reshape(kept, n_channels).mean(axis=1)
    if not np.isfinite(mono).all():
        raise MediaError("not finite")
    if np.abs(mono).max() < _SILENCE:
        raise MediaError("silent")
    return _resampled(mono, own_rate, rate)


def _chunks(data: bytes) -> tuple[bytes, memoryview]:
    """Return the chunks `fmt ` and `data` of a wav file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        is_cut = len(data) < 12 and data.startswith(b"RIFF"[: len(data)])
        raise MediaError("truncated" if is_cut else "unknown format")
    position, format_ = 12, b""
    while position + 8 <= len(data):
        name, length = (
            data[position : position + 4],
            int.from_bytes(data[position + 4 : position + 8], "little"),
        )
        begin = position + 8
        if begin + length > len(data):
            raise MediaError("truncated")
        if name == b"fmt ":
            format_ = data[begin : begin + length]
        if name == b"data":
            if not format_:
                raise MediaError("broken")
            return format_, memoryview(data)[begin : begin + length]
        position = begin + length + length % 2
    raise MediaError("truncated")


def _encoding(format_: bytes) -> tuple[np.dtype[np.generic], int, int]:
    """Return the type of a sample, the number of channels and the sampling rate.

    A sample of 24 bits has the type `V3`.
    """
    if len(format_) < 16:
        raise MediaError("broken")
    tag, n_channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", format_)
    if tag == _EXTENSIBLE and len(format_) >= 26:
        tag = int.from_bytes(format_[24:26], "little")
    names = {(_PCM, 8): "u1", (_PCM, 16): "<i2", (_PCM, 24): "V3", (_PCM, 32): "<i4"}
    names |= {(_FLOAT, 32): "<f4", (_FLOAT, 64): "<f8"}
    if (tag, bits) not in names:
        raise MediaError("unknown encoding")
    dtype = np.dtype(names[tag, bits])
    if not 1 <= n_channels <= _MOST_CHANNELS or block != n_channels * dtype.itemsize:
        raise MediaError("broken")
    if not _LEAST_RATE <= rate <= _LARGEST_RATE:
        raise MediaError("bad sampling rate")
    return dtype, n_channels, rate


def _numbers(raw: memoryview, dtype: np.dtype[np.generic]) -> Array:
    """Return samples as float64 in [-1, 1]."""
    if dtype.kind == "V":  # 24 bits: the upper three bytes of 32
        words = np.zeros((len(raw) // 3, 4), np.uint8)
        words[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return np.asarray(words.view("<i4")[:, 0] / 2.0**31)
    values: Array = np.frombuffer(raw, dtype)
    if dtype.kind == "u":
        return np.asarray((values - 128.0) / 128)
    if dtype.kind == "i":
        return np.asarray(values / 2.0 ** (8 * dtype.itemsize - 1))
    return values.astype(np.float64)


def _resampled(samples: Array, own_rate: int, rate: int) -> Array:
    from scipy.signal import resample_poly

    if own_rate != rate:
        # Odd rates are rounded by less than a thousandth: the filter's length grows with both terms.
        ratio = Fraction(rate, own_rate).limit_denominator(1000)
        samples = resample_poly(samples, ratio.numerator, ratio.denominator)
    return np.clip(samples, -1, 1).astype(np.float32)
