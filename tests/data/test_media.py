"""Pictures and sounds of items: what is refused by which name, and what good files are read as."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from recspark.data import media
from recspark.data.media import PROBLEMS, MediaError, Source, address_of, decode_image, decode_sound
from recspark.testing.synth import picture, tone
from tests.broken_media import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SECONDS,
    broken_images,
    broken_sounds,
    noise,
    saved,
    wav,
    write,
)

IMAGES, SOUNDS = broken_images(), broken_sounds()
WHITE, RED, BLUE = (np.array(c, np.uint8) for c in ((255,) * 3, (255, 0, 0), (0, 0, 255)))


def problem_of(folder: Path, address: str, kind: media.Kind) -> str | None:
    """The reason for which the file is refused; None = it is read."""
    try:
        data = Source(str(folder), MAX_BYTES).fetch(address)
        if kind == "image":
            decode_image(data, MAX_PIXELS, 32)
        else:
            decode_sound(data, 8000, MAX_SECONDS, 1.0)
    except MediaError as error:
        return error.problem
    return None


def test_there_are_fifty_broken_files_for_nearly_all_reasons() -> None:
    assert len(IMAGES) + len(SOUNDS) >= 50
    reasons = {reason for _, reason in (*IMAGES.values(), *SOUNDS.values())}
    others = {"no image", "no sound", "bad address", "unreadable file", "unknown colours"}
    assert reasons | others == set(PROBLEMS)


@pytest.mark.parametrize("name", IMAGES)
def test_a_broken_picture_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: IMAGES[name]})
    assert problem_of(tmp_path, name, "image") == IMAGES[name][1]


@pytest.mark.parametrize("name", SOUNDS)
def test_a_broken_sound_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: SOUNDS[name]})
    assert problem_of(tmp_path, name, "sound") == SOUNDS[name][1]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("../secret.png", "bad address"),
        ("a/../../secret.png", "bad address"),
        ("a\n.png", "bad address"),
        ("zip://a.png::b.zip", "bad address"),
        ("nonsense://shop/a.png", "bad address"),
        ("folder", "unreadable file"),
        ("memory://shop/none.png", "missing file"),
    ],
)
def test_an_address_is_refused_by_name(address: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(picture(RED, BLUE))
    assert problem_of(tmp_path, address, "image") == problem


def test_a_relative_address_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="bad address"):
        Source("", MAX_BYTES).fetch("a.png")


def test_the_first_picture_of_an_item_is_read_and_its_content_counts(tmp_path: Path) -> None:
    assert address_of(["x/1", "a.wav", None, "b.JPG", "c.png"], "image") == "b.JPG"
    assert address_of(["x/1", "a.wav"], "image") == "x/1"
    assert address_of(["x.v1.pdf", "a.png"], "sound") == "x.v1.pdf"
    for media_of_item in ([], None, ["a.wav"], [""]):
        with pytest.raises(MediaError, match="no image"):
            address_of(media_of_item, "image")
    (tmp_path / "x").write_bytes(picture(RED, BLUE))
    assert problem_of(tmp_path, "x", "image") is None
    assert problem_of(tmp_path, "x", "sound") == "unknown format"


def test_files_are_fetched_in_order_with_what_is_wrong_in_its_place(tmp_path: Path) -> None:
    for n in range(9):
        (tmp_path / f"{n}.png").write_bytes(bytes([n + 1]))
    media_of_item = [[f"{n}.png"] for n in range(9)] + [None, ["none.png"]]
    fetched = list(media.fetched(Source(str(tmp_path), 10), media_of_item, "image", ahead=2))
    assert fetched[:9] == [bytes([n + 1]) for n in range(9)]
    assert [error.problem for error in fetched[9:]] == ["no image", "missing file"]  # type: ignore[union-attr]


# --- pictures -----------------------------------------------------------------------------------


def rgb(data: bytes) -> np.ndarray:
    return np.array(decode_image(data, MAX_PIXELS, 32))


def halves(left: Any, right: Any) -> np.ndarray:
    """A picture of two colours, 40 x 40."""
    pixels = np.empty((40, 40, len(left)), np.uint8)
    pixels[:, :20], pixels[:, 20:] = left, right
    return pixels


def test_every_kind_of_picture_becomes_red_and_blue() -> None:
    image = Image.fromarray(halves(RED, BLUE))
    expected = halves(RED, BLUE)
    transparent = Image.fromarray(halves((*RED, 255), (0, 255, 0, 0)))
    on_white = halves(RED, WHITE)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    exact = {
        "plain": (saved(image, "PNG"), expected),
        "bmp": (saved(image, "BMP"), expected),
        "webp": (saved(image, "WEBP", lossless=True), expected),
        "palette": (saved(palette, "PNG"), expected),
        "gif": (saved(palette, "GIF"), expected),
        "alpha": (saved(transparent, "PNG"), on_white),
        "clear colour": (
            saved(palette, "PNG", transparency=palette.getpixel((30, 0))),
            on_white,
        ),
    }
    for name, (data, pixels) in exact.items():
        np.testing.assert_array_equal(rgb(data), pixels, err_msg=name)
    cmyk = rgb(saved(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - expected).mean() < 8


def test_sixteen_bits_of_grey_become_eight() -> None:
    grey = np.repeat(np.array([[0, 257 * 100, 65535]], np.uint16), 3, axis=0)
    data = saved(Image.fromarray(grey), "PNG")
    np.testing.assert_array_equal(rgb(data)[0], [[0] * 3, [100] * 3, [255] * 3])


def test_the_first_frame_of_an_animation_counts() -> None:
    first, second = (Image.fromarray(np.full((40, 40, 3), c, np.uint8)) for c in (RED, BLUE))
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(first, form, save_all=True, append_images=[second], duration=50, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2, form  # type: ignore[attr-defined]
        np.testing.assert_array_equal(rgb(data)[5, 5], RED, err_msg=form)


def test_a_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    data = saved(Image.fromarray(halves(RED, BLUE)[:30]), "JPEG", exif=exif, quality=95)
    upright = rgb(data).astype(int)
    assert upright.shape == (40, 30, 3)
    assert np.abs(upright[5] - RED).max() < 30
    assert np.abs(upright[-5] - BLUE).max() < 30
    broken = saved(Image.fromarray(halves(RED, BLUE)), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert rgb(broken).shape == (40, 40, 3)


def test_a_huge_jpeg_is_decoded_small() -> None:
    """24 million pixels where one million is allowed: a JPEG is decoded at an eighth of its size."""
    pixels = np.zeros((4000, 6000, 3), np.uint8)
    pixels[:, 3000:] = 255
    data = saved(pixels, "JPEG")
    small = decode_image(data, MAX_PIXELS, 32)
    assert small.size == (750, 500)
    assert np.array(small)[:, [0, -1]].mean(axis=(0, 2)).tolist() == [0, 255]
    several = saved(Image.fromarray(pixels), "MPO", save_all=True, append_images=[small])
    assert decode_image(several, MAX_PIXELS, 32).size == (750, 500)  # as telephones write them
    with pytest.raises(MediaError, match="too many pixels"):  # twice 600 is more than an eighth
        decode_image(data, MAX_PIXELS, 600)


def test_pictures_are_prepared_as_torchvision_prepares_them() -> None:
    import torch
    from torchvision.models import ResNet18_Weights

    from recspark.nets.images import pixels_of

    for width, height in ((300, 280), (257, 400), (640, 300)):
        image = Image.fromarray(noise(width, height))
        expected = ResNet18_Weights.DEFAULT.transforms()(image)
        decoded = decode_image(saved(image, "PNG"), MAX_PIXELS, 256)
        cut = torch.from_numpy(media.middle(decoded, 256, 224))
        torch.testing.assert_close(pixels_of(cut[None])[0], expected)


# --- sounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_those_of_scipy(dtype: str, channels: int) -> None:
    rng = np.random.default_rng(2)
    values = rng.uniform(-0.9, 0.9, (800, channels))
    scale = {"uint8": 127, "int16": 32767, "int32": 2**31 - 1}.get(dtype, 1)
    samples = (values * scale + (128 if dtype == "uint8" else 0)).astype(dtype)
    out = io.BytesIO()
    wavfile.write(out, 8000, samples)
    found = decode_sound(out.getvalue(), 8000, 1, 1)
    np.testing.assert_allclose(found, values.mean(axis=1), atol=0.02)


def test_twenty_four_bits_and_the_extensible_header() -> None:
    values = np.array([-(2**23), -1, 0, 2**22], np.int32)
    raw = b"".join(int(v).to_bytes(3, "little", signed=True) for v in values)
    expected = values / 2.0**23
    np.testing.assert_allclose(decode_sound(wav(raw, bits=24), 8000, 1, 1), expected, atol=1e-7)
    guid = struct.pack("<H", 1) + b"\0\0\0\0\x10\0\x80\0\0\xaa\x008\x9bq"
    fmt = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 8000, 24000, 3, 24, 22, 24, 4) + guid
    np.testing.assert_allclose(decode_sound(wav(raw, fmt=fmt), 8000, 1, 1), expected, atol=1e-7)


@pytest.mark.parametrize("own_rate", [8000, 11025, 16000, 44100, 44101, 48000])
def test_a_tone_keeps_its_pitch_at_another_rate(own_rate: int) -> None:
    samples = decode_sound(tone(500, 1.0, own_rate), 8000, 2, 2)
    assert abs(len(samples) - 8000) <= 10
    spectrum = np.abs(np.fft.rfft(samples, 8000))
    assert abs(int(spectrum.argmax()) - 500) <= 1
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)


def test_the_middle_of_a_long_sound_is_read() -> None:
    ramp = np.linspace(0.1, 0.9, 8000).astype("<f4").tobytes()
    middle = decode_sound(wav(ramp, tag=3, bits=32), 8000, 2, 0.5)
    assert len(middle) == 4000
    assert middle[0] == pytest.approx(0.3, abs=0.001)
    assert middle[-1] == pytest.approx(0.7, abs=0.001)
