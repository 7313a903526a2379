"""Tests of spectrograms: those for networks cover the same duration of every sound, from its beginning."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import scipy.signal
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.media import audio
from mmaudit.audit.media.audio import log_mel, network_spectrogram, spectrogram_shape
from mmaudit.audit.media.files import MediaConfig

CONFIG = MediaConfig()


def noise(count: int) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(0).standard_normal(count)).astype(np.float32)


@settings(max_examples=examples(40))
@given(count=st.integers(1, 60_000), seconds=st.floats(0.1, 2.0), rate=st.sampled_from([2_000, 11_025, 16_000, 44_100]))
def test_spectrogram_has_fixed_shape_for_any_duration(count: int, seconds: float, rate: int) -> None:
    config = MediaConfig(network_seconds=seconds, sample_rate=rate)
    spectrogram = network_spectrogram(noise(count), config)
    assert spectrogram.shape == spectrogram_shape(config)
    assert spectrogram.dtype == np.float32
    assert np.isfinite(spectrogram).all()


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 10), (1.0, 100), (3.0, 300)])
def test_time_step_is_ten_milliseconds(seconds: float, steps: int) -> None:
    assert spectrogram_shape(MediaConfig(network_seconds=seconds)) == (64, steps)


def test_short_sound_is_repeated_and_long_sound_is_cut() -> None:
    short = network_spectrogram(noise(16_000), CONFIG)
    np.testing.assert_allclose(short[:, 5:95], short[:, 105:195], atol=1e-3)
    np.testing.assert_array_equal(
        network_spectrogram(noise(90_000), CONFIG), network_spectrogram(noise(48_000), CONFIG)
    )


def test_fourfold_power_adds_log_of_four() -> None:
    quiet, loud = (log_mel(gain * noise(8_000), CONFIG) for gain in (1, 2))
    np.testing.assert_allclose(loud - quiet, np.log(4), atol=1e-3)


def reference_log_magnitude(
    wave: NDArray[np.float32], *, n_fft: int, hop: int, mode: Literal["constant", "reflect"] = "constant"
) -> NDArray[np.float64]:
    """Compute log(|STFT| + 1e-7) window by window, as librosa.stft is documented: centred, with a periodic Hann."""
    padded = np.pad(wave.astype(np.float64), n_fft // 2, mode=mode)
    window = scipy.signal.get_window("hann", n_fft)
    columns = [np.fft.rfft(padded[start : start + n_fft] * window) for start in range(0, len(padded) - n_fft + 1, hop)]
    return np.log(np.abs(np.array(columns).T) + 1e-7)


OGM_GE = {"sample_rate": 22_050, "network_spectrogram": "log-magnitude", "network_n_fft": 512, "network_hop": 353}


@pytest.mark.parametrize(("seconds", "shape"), [(3.0, (257, 188)), (20.0, (257, 1250))])
@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_spectrogram_of_ogm_ge(seconds: float, shape: tuple[int, int], padding: str) -> None:
    config = MediaConfig(**OGM_GE, network_seconds=seconds, network_padding=padding)  # type: ignore[arg-type]
    wave = noise(round(2.3 * 22_050))
    spectrogram = network_spectrogram(wave, config)
    tiled = np.tile(wave, 10)[: round(seconds * 22_050)]
    expected = reference_log_magnitude(tiled, n_fft=512, hop=353, mode="constant" if padding == "zero" else "reflect")
    assert spectrogram.shape == spectrogram_shape(config) == expected.shape == shape
    np.testing.assert_allclose(spectrogram, expected, atol=2e-3)
    assert np.abs(spectrogram - expected).mean() < 1e-5


def test_silence_is_the_log_of_epsilon_and_short_sound_can_be_padded() -> None:
    config = MediaConfig(**OGM_GE, network_extend="pad")  # type: ignore[arg-type]
    spectrogram = network_spectrogram(noise(22_050), config)
    np.testing.assert_allclose(spectrogram[:, 66:], np.log(1e-7), rtol=1e-6)
    assert spectrogram[:, :60].mean() > -5
    louder = network_spectrogram(noise(22_050), replace(config, network_epsilon=1e-2))
    np.testing.assert_allclose(louder[:, 66:], np.log(1e-2), rtol=1e-5)


def test_lowest_linear_bins_are_kept() -> None:
    config = MediaConfig(**OGM_GE)  # type: ignore[arg-type]
    full, lowest = (network_spectrogram(noise(9_000), replace(config, network_linear_bins=bins)) for bins in (None, 80))
    np.testing.assert_array_equal(lowest, full[:80])


def test_window_shorter_than_the_transform_is_centred() -> None:
    config = MediaConfig(**OGM_GE, network_window=400)  # type: ignore[arg-type]
    wave = noise(66_150)
    padded = np.pad(wave.astype(np.float64), 256)
    window = np.pad(scipy.signal.get_window("hann", 400), 56)
    third = np.fft.rfft(padded[2 * 353 : 2 * 353 + 512] * window)
    np.testing.assert_allclose(network_spectrogram(wave, config)[:, 2], np.log(np.abs(third) + 1e-7), atol=1e-3)


def test_mel_spectrogram_with_its_own_transform() -> None:
    config = MediaConfig(network_n_fft=1024, network_hop=400, network_mel_bins=200)
    assert network_spectrogram(noise(48_000), config).shape == (200, 120)


def test_long_sound_is_transformed_in_blocks_of_equal_values(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = noise(30_000)
    whole = log_mel(wave, CONFIG)
    monkeypatch.setattr(audio, "_BLOCK_WINDOWS", 50)
    np.testing.assert_allclose(log_mel(wave, CONFIG), whole, atol=1e-5)
