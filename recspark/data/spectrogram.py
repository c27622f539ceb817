"""Sounds as frames of log-mel energies, which audio networks read."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from recspark.data.blocks import Array

_DYNAMIC_RANGE = 1e-8  # an energy below this share of the largest one counts as this share: 80 dB


def mel(hertz: Array | float) -> Array:
    """Return frequencies on the mel scale: 2595 log10(1 + f / 700).

    Source: O'Shaughnessy 1987, "Speech Communication: Human and Machine".

    >>> float(mel(0.0)), round(float(mel(1000.0)))
    (0.0, 1000)
    """
    return np.asarray(2595 * np.log10(1 + np.asarray(hertz, np.float64) / 700))


def hertz(mels: Array | float) -> Array:
    """Return frequencies from the mel scale; the inverse of `mel`."""
    return np.asarray(700 * (10 ** (np.asarray(mels, np.float64) / 2595) - 1))


def mel_bank(n_bands: int, n_fft: int, rate: int) -> Array:
    """Return triangular filters at equal steps on the mel scale, float64 (n_bands, n_fft // 2 + 1).

    The corner frequencies are n_bands + 2 points from 0 to rate / 2. Band b rises linearly in hertz
    from corner b to 1 at corner b + 1, and falls to 0 at corner b + 2. Column j is the frequency
    j * rate / n_fft. A band that lies between two columns is empty.

    Source: Davis & Mermelstein 1980, "Comparison of Parametric Representations for Monosyllabic Word
    Recognition".
    """
    corners = hertz(np.linspace(0, mel(rate / 2), n_bands + 2))  # (n_bands + 2,)
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft  # (n_fft // 2 + 1,)
    low, peak, high = (corners[k : k + n_bands, None] for k in range(3))  # (n_bands, 1) each
    rising = (frequencies - low) / (peak - low)  # (n_bands, n_fft // 2 + 1)
    falling = (high - frequencies) / (high - peak)
    return np.clip(np.minimum(rising, falling), 0, None)


def n_frames(n_samples: int, window: int, step: int) -> int:
    """Return the number of frames of a sound; a sound shorter than a window has one.

    >>> n_frames(400, 200, 80), n_frames(10, 200, 80)
    (3, 1)
    """
    return 1 + max(0, n_samples - window) // step


def log_mel(samples: Array, rate: int, n_bands: int, window: int, step: int) -> Array:
    """Return the log energy of each band in each frame, float32 (n_frames, n_bands).

    Parameters
    ----------
    samples : float (n,), at `rate` samples per second; not silent
    window, step : samples of a frame, and between the beginnings of two frames

    A frame is weighted by a Hann window and transformed with the next power of two of points. The
    values are natural logs, at least 80 dB below the largest; their mean over the sound is 0 and
    their standard deviation 1, so that neither the loudness nor the range of a recording counts.
    """
    n_fft = 1 << (window - 1).bit_length()
    padded = np.pad(samples.astype(np.float64), (0, max(0, window - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::step]  # (T, window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)  # (window,)
    power = np.abs(np.fft.rfft(frames * hann, n_fft)) ** 2  # (T, n_fft // 2 + 1)
    energies = power @ _bank(n_bands, n_fft, rate).T  # (T, n_bands)
    logs = np.log(np.maximum(energies, _DYNAMIC_RANGE * energies.max() + 1e-30))  # (T, n_bands)
    return np.asarray((logs - logs.mean()) / (logs.std() + 1e-6), np.float32)


@lru_cache(maxsize=4)
def _bank(n_bands: int, n_fft: int, rate: int) -> Array:
    return mel_bank(n_bands, n_fft, rate)
