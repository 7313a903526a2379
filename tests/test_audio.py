"""Tests of sound: the fast wav reader equals PyAV, resampling equals scipy, and clipping is detected."""

from __future__ import annotations

import io
import struct
import wave as wave_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import firwin, resample_poly

from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.media import audio as sound
from mmaudit.audit.media.audio import clipped_share, decode_audio, decode_native, resample
from mmaudit.audit.media.files import MediaConfig

RATE = 8_000


def write_wav(samples: NDArray[Any], *, channels: int = 1, width: int = 2) -> bytes:
    file = io.BytesIO()
    with wave_module.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(RATE)
        writer.writeframes(samples.tobytes())
    return file.getvalue()


def sine(hertz: float, *, peak: float = 1.0, seconds: float = 1.0) -> NDArray[np.float64]:
    return peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def clipped_sine(share: float) -> NDArray[np.float64]:
    """Return a sine of 101 Hz that is at full scale for this share of the time."""
    return np.asarray(np.clip(sine(101) / np.cos(np.pi / 2 * share), -1, 1))


@pytest.mark.parametrize("steps", [2, 3, 5, 147, 441, 1_000])
def test_filter_of_the_resampling_is_that_of_scipy(steps: int) -> None:
    expected = firwin(20 * steps + 1, 1 / steps, window=("kaiser", 5.0)).astype(np.float32)
    assert sound._low_pass(steps).tobytes() == expected.tobytes()


@given(
    values=st.lists(st.integers(-32_768, 32_767), min_size=24, max_size=200),
    channels=st.integers(1, 3),
    seconds=st.sampled_from([0.01, 0.02, 10.0]),
    chunk=st.booleans(),
    lost=st.integers(0, 8),
)
def test_fast_wav_reader_equals_pyav(values: list[int], channels: int, seconds: float, chunk: bool, lost: int) -> None:
    data = write_wav(np.array(values[: len(values) // 6 * 6], dtype=np.int16), channels=channels)
    if chunk:  # a chunk with another name and an odd length before the samples
        data = data[:36] + b"junk" + struct.pack("<I", 3) + b"abc\0" + data[36:]
    data = data[: len(data) - lost]
    # PyAV is given whole frames: FFmpeg 6.1 to 8.0, of PyAV 13 to 16.0, decodes nothing of a packet with an odd length.
    num_extra = (len(data) - data.index(b"data") - 8) % (2 * channels)
    expected, rate = sound._decoded_wave(data[: len(data) - num_extra], MediaConfig(max_seconds=seconds))
    wave, wave_rate = decode_native(data, MediaConfig(max_seconds=seconds))
    assert wave_rate == rate
    np.testing.assert_allclose(wave, expected, atol=1e-7)


def test_other_sample_widths_are_decoded_by_pyav() -> None:
    wide = write_wav((sine(440) * 2**30).astype("<i4"), width=4)
    narrow = write_wav((sine(440) * 127 + 128).astype(np.uint8), width=1)
    np.testing.assert_allclose(decode_native(wide, MediaConfig())[0], sine(440, peak=0.5), atol=1e-6)
    np.testing.assert_allclose(decode_native(narrow, MediaConfig())[0], sine(440), atol=0.02)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_resample_equals_scipy(rate: int) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(4_000)).astype(np.float32)
    up, down = {8_000: (2, 1), 22_050: (320, 441), 44_100: (160, 441)}[rate]
    np.testing.assert_allclose(resample(noise, rate, 16_000), resample_poly(noise, up, down), atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_clipped_share_equals_time_at_full_scale(share: float) -> None:
    assert clipped_share(clipped_sine(share).astype(np.float32)) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("peak", [0.5, 0.98, 1.0])
@pytest.mark.parametrize("hertz", [50, 440, 2_000])
def test_tone_that_just_reaches_full_scale_is_not_clipped(hertz: float, peak: float) -> None:
    wave = np.round(sine(hertz + 0.37, peak=peak) * 32_767) / 32_768
    assert clipped_share(wave.astype(np.float32)) < 0.02


@pytest.mark.parametrize(("peak", "share"), [(0.98, 0.0), (1.0, 1.0), (2.0, 1.0)])
def test_square_wave_at_full_scale_is_clipped(peak: float, share: float) -> None:
    assert clipped_share((peak * np.sign(sine(101) + 1e-9)).astype(np.float32)) == share


def test_two_samples_at_the_peak_are_not_clipped() -> None:
    wave = np.tile(np.array([1, 1, 0.2, -1, -1, -0.2], dtype=np.float32), 100)
    assert clipped_share(wave) == 0
    assert clipped_share(np.repeat(wave, 2)) == pytest.approx(2 / 3)
    assert clipped_share(np.tile(np.array([1, -1, 1, -1], dtype=np.float32), 100)) == 0  # alternating sign


def test_sound_beyond_max_clipped_is_unusable() -> None:
    samples = np.round(clipped_sine(0.3) * 32_767).astype(np.int16)
    share = clipped_share(decode_native(write_wav(samples), MediaConfig())[0])
    for allowed, is_usable in ((share - 0.001, False), (share + 0.001, True), (1.0, True)):
        config = MediaConfig(max_clipped=allowed)
        if is_usable:
            assert len(decode_audio(write_wav(samples), config)) == 2 * RATE
        else:
            with pytest.raises(UnusableError, match=r"\d+% of 1\.00 s are at the peak 1\.00") as caught:
                decode_audio(write_wav(samples), config)
            assert caught.value.reason is Reason.CLIPPED
    low, high = (np.round(clipped_sine(clipped) * 32_767).astype(np.int16) for clipped in (0.06, 0.14))
    assert len(decode_audio(write_wav(low), MediaConfig()))  # a tenth is allowed
    with pytest.raises(UnusableError, match="clipped"):
        decode_audio(write_wav(high), MediaConfig())
