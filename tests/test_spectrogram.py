"""Tests of spectrograms: those for networks cover the same duration of every sound, from its beginning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.media.audio import log_mel, network_spectrogram, spectrogram_shape
from mmaudit.audit.media.files import MediaConfig

CONFIG = MediaConfig()


def noise(count: int) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(0).standard_normal(count)).astype(np.float32)


@settings(max_examples=40, deadline=None)
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
