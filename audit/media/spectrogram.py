"""Sound over time and pitch: how strong is each mel band in each hundredth of a second?"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from .decode import MediaConfig

Vector = NDArray[np.float32]

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
FLOOR = 1e-6  # of the strongest band: 60 dB below it everything counts as equally quiet


def log_mel(wave: Vector, config: MediaConfig) -> Vector:
    """Natural log of the power in mel bands (config.mel_bins, frames), a frame each 10 ms, of a waveform (t,).

    By scipy: torch.stft in its default threads takes 3.2 ms for half a second, this 0.3, and so no worker loads torch.
    """
    window = _window(config.sample_rate)
    padded = np.pad(wave.astype(np.float32, copy=False), len(window) // 2 + 1)
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(window))[:: _hop(config.sample_rate)]
    spectrum = scipy.fft.rfft(frames * window, _fft_size(len(window)))
    power = _mel_filters(config.mel_bins, config.sample_rate) @ (spectrum.real**2 + spectrum.imag**2).T
    floor = max(float(power.max()) * FLOOR, 1e-20)  # the second for what is wholly silent
    return np.asarray(np.log(np.maximum(power, floor)), dtype=np.float32)


def network_spectrogram(wave: Vector, config: MediaConfig) -> Vector:
    """Log-mel bands (config.network_mel_bins, t) of the first config.network_seconds of a waveform, for a network.

    A shorter sound is said again until the time is full, as OGM-GE's code does with CREMA-D.
    """
    wave = np.resize(wave, round(config.network_seconds * config.sample_rate))  # repeats, or cuts
    bands = log_mel(wave, replace(config, mel_bins=config.network_mel_bins))
    return bands[:, : network_steps(config)]


def network_steps(config: MediaConfig) -> int:
    """Count the steps in time t of a network's spectrogram: one a hundredth of a second."""
    return max(1, round(config.network_seconds * config.sample_rate) // _hop(config.sample_rate))


def _hop(sample_rate: int) -> int:
    return max(1, round(HOP_SECONDS * sample_rate))


@lru_cache(maxsize=8)
def _window(sample_rate: int) -> Vector:
    size = max(2, round(WINDOW_SECONDS * sample_rate))
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)  # periodic Hann


def _fft_size(window_size: int) -> int:
    return 1 << (window_size - 1).bit_length()


@lru_cache(maxsize=8)
def _mel_filters(mel_bins: int, sample_rate: int) -> Vector:
    """Triangles of height 1 (mel_bins, frequencies) from 20 Hz to half the rate, on HTK's scale."""
    size = _fft_size(len(_window(sample_rate)))
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (20, sample_rate / 2))
    edges = 700 * (10 ** (np.linspace(low, high, mel_bins + 2) / 2595) - 1)
    frequencies = np.arange(size // 2 + 1) * (sample_rate / size)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return np.asarray(np.maximum(0, np.minimum(rising, falling)), dtype=np.float32)
