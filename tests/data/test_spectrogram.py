"""Log-mel frames: a filter bank worked by hand, and a tone that lands in its band."""

from __future__ import annotations

import numpy as np
import pytest

from recspark.data.media_inputs import SoundReader
from recspark.data.spectrogram import hertz, log_mel, mel, mel_bank
from recspark.testing.synth import tone


def test_a_bank_worked_by_hand() -> None:
    """1 + f / 700 goes from 1 to 8 up to 4,900 Hz, so the corners are 0, 700, 2,100 and 4,900 Hz;
    the columns are 700 Hz apart.
    """
    expected = [[0, 1, 1 / 2, 0, 0, 0, 0, 0], [0, 0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4, 0]]
    np.testing.assert_allclose(mel_bank(2, 14, 9800), expected, atol=1e-12)
    np.testing.assert_allclose(hertz(mel(np.array([50.0, 3000.0]))), [50, 3000])


@pytest.mark.parametrize("band", [4, 10, 20, 30, 38])
def test_a_tone_lands_in_its_band(band: int) -> None:
    """The tone has the frequency at which the filter of the band is 1."""
    frequency = float(hertz(np.linspace(0, mel(4000), 42))[band + 1])
    reader = SoundReader(8000, 40, 200, 80, 1.0, 10.0)
    frames = reader.read(tone(frequency, 0.5))
    logs = frames["frames"].reshape(reader.max_frames, 40)[: int(frames["n_frames"])]
    assert set(logs.argmax(axis=1).tolist()) == {band}


def test_neither_loudness_nor_length_counts() -> None:
    """A quieter recording has the same frames; a shorter one has fewer of them."""
    rng = np.random.default_rng(4)
    sound = rng.normal(size=2000) * 0.1
    loud, quiet = (log_mel(sound * gain, 8000, 20, 200, 80) for gain in (1.0, 0.01))
    np.testing.assert_allclose(loud, quiet, atol=1e-4)
    assert loud.shape == (23, 20)
    assert log_mel(sound[:50], 8000, 20, 200, 80).shape == (1, 20)
    assert abs(loud.mean()) < 1e-5
    assert abs(loud.std() - 1) < 1e-4
