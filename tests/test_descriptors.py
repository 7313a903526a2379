"""Hand-made descriptors: which changes of the input they must ignore, and which not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmaudit.audit.features.descriptors import audio_statistics, image_statistics, video_statistics
from mmaudit.audit.media.audio import log_mel
from mmaudit.audit.media.files import MediaConfig

CONFIG = MediaConfig()


def noise(count: int = 8_000, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(count) * 0.1).astype(np.float32)


def picture(height: int = 64, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """Return an image of smooth blobs, with gradients in every direction."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    waves = [
        np.sin(rows * a / height + columns * b / width + c)[..., None] * rng.uniform(20, 40, 3)
        for a, b, c in rng.uniform(-9, 9, (4, 3))
    ]
    return np.asarray(np.clip(128 + np.sum(waves, axis=0), 0, 255), dtype=np.uint8)


def clip(num_frames: int = 16) -> NDArray[np.uint8]:
    return np.stack([np.roll(picture(), 3 * index, axis=1) for index in range(num_frames)])


@settings(max_examples=examples(40))
@given(
    count=st.integers(1, 40_000), rate=st.sampled_from([8_000, 16_000, 44_100]), mel_bins=st.sampled_from([8, 40, 96])
)
def test_audio_of_any_duration_has_fixed_length(count: int, rate: int, mel_bins: int) -> None:
    vector = audio_statistics(noise(count), MediaConfig(sample_rate=rate, mel_bins=mel_bins))
    assert vector.shape == (220,)
    assert vector.dtype == np.float32
    assert np.isfinite(vector).all()


@settings(max_examples=examples(40))
@given(height=st.integers(1, 150), width=st.integers(1, 150), num_frames=st.integers(1, 20))
def test_images_of_any_size_have_fixed_length(height: int, width: int, num_frames: int) -> None:
    image = picture(height, width)
    for vector, length in (
        (image_statistics(image, CONFIG), 480),
        (video_statistics(np.repeat(image[None], num_frames, axis=0), CONFIG), 764),
    ):
        assert vector.shape == (length,)
        assert vector.dtype == np.float32
        assert np.isfinite(vector).all()


def test_descriptors_are_deterministic_and_keep_their_input() -> None:
    cases: list[tuple[Any, Any]] = [
        (audio_statistics, noise()),
        (image_statistics, picture()),
        (video_statistics, clip()),
    ]
    for describe, sample in cases:
        before = sample.copy()
        np.testing.assert_array_equal(describe(sample, CONFIG), describe(sample, CONFIG))
        np.testing.assert_array_equal(sample, before)


def test_gain_changes_only_the_level() -> None:
    change = (audio_statistics(noise() * 8, CONFIG) - audio_statistics(noise(), CONFIG)).reshape(11, 20)
    level = 2 * np.log(8) * np.sqrt(CONFIG.mel_bins)  # log power, through an orthonormal cosine transform
    expected = np.zeros((11, 20))
    expected[[0, *range(3, 11)], 0] = level  # the mean and the means of the eight segments; no std, no shape
    np.testing.assert_allclose(change, expected, atol=2e-3)


def test_tone_peaks_in_its_band() -> None:
    times = np.arange(16_000) / 16_000
    peaks = []
    for hertz in (200, 1_000, 4_000):
        bands = log_mel(np.sin(2 * np.pi * hertz * times).astype(np.float32), CONFIG)
        assert bands.shape[0] == CONFIG.mel_bins
        assert bands.shape[1] == pytest.approx(100, abs=2)
        peaks.append(int(bands.mean(1).argmax()))
    mel = 2595 * np.log10(1 + np.array([200, 1_000, 4_000]) / 700)
    low, high = 2595 * np.log10(1 + np.array([20, 8_000]) / 700)
    np.testing.assert_allclose(peaks, (mel - low) / (high - low) * 41 - 1, atol=0.6)


def test_surrounding_silence_does_not_matter() -> None:
    early, late = (audio_statistics(np.pad(noise(), pad), CONFIG) for pad in ((1_600, 9_600), (4_800, 800)))
    np.testing.assert_allclose(early, late, atol=1e-3)  # padding by whole frames of 160 samples keeps the frame grid


def test_time_order_changes_audio_and_video() -> None:
    rising = noise() * np.linspace(0.1, 1, 8_000, dtype=np.float32)
    forth, back = (audio_statistics(wave, CONFIG).reshape(11, 20) for wave in (rising, rising[::-1]))
    np.testing.assert_allclose(forth[0], back[0], atol=0.35)
    np.testing.assert_allclose(forth[3:, 0], back[:2:-1, 0], atol=1.5)
    assert np.all(np.diff(forth[3:, 0]) > 0)
    forth, back = (video_statistics(frames, CONFIG)[:700].reshape(5, 140) for frames in (clip(), clip()[::-1]))
    np.testing.assert_allclose(forth[::2], back[::2], atol=1e-5)  # even cosines
    np.testing.assert_allclose(forth[1::2], -back[1::2], atol=1e-5)  # odd ones
    assert np.abs(forth[1::2]).max() > 0.01


def histogram(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return image_statistics(image, CONFIG)[:432].reshape(6, 6, 12)


def test_mirrored_image_mirrors_cells_and_directions() -> None:
    directions = np.arange(12)
    left_right = histogram(picture()[:, ::-1])
    np.testing.assert_allclose(left_right, histogram(picture())[:, ::-1][..., (6 - directions) % 12], atol=1e-4)
    upside_down = histogram(picture()[::-1])
    np.testing.assert_allclose(upside_down, histogram(picture())[::-1][..., -directions % 12], atol=1e-4)


def test_rotated_image_rotates_directions() -> None:
    turned = histogram(np.rot90(picture()))  # to the left: right becomes up, three of twelve directions back
    np.testing.assert_allclose(turned, np.roll(np.rot90(histogram(picture())), -3, axis=2), atol=1e-4)


def test_negative_image_reverses_every_gradient() -> None:
    np.testing.assert_allclose(histogram(255 - picture()), np.roll(histogram(picture()), 6, axis=2), atol=1e-4)


def test_ramp_has_one_direction_independent_of_brightness() -> None:
    ramp = np.repeat(np.tile(np.arange(64, dtype=np.uint8) * 2, (64, 1))[..., None], 3, axis=2)
    inner = histogram(ramp)[1:-1, 1:-1]
    assert (inner.argmax(axis=2) == 0).all()
    np.testing.assert_allclose(inner[..., 6], 0, atol=1e-6)
    np.testing.assert_allclose(histogram(ramp + 100), histogram(ramp), atol=1e-5)
    np.testing.assert_allclose(histogram(ramp // 2 * 3)[1:-1, 1:-1, 0], inner[..., 0], atol=0.05)


def test_colours_are_located_in_their_cells() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:16, 48:, 0] = 255
    red, green, blue = image_statistics(image, CONFIG)[432:].reshape(3, 4, 4)
    assert red.argmax() == 3  # the right cell of the upper row
    assert red.max() > 0.7  # the triangle weights overlap the neighbouring cells
    assert green.max() == blue.max() == 0


def test_motion_is_located_in_space_and_time() -> None:
    frames = np.repeat(picture()[None], 16, axis=0)
    assert video_statistics(frames, CONFIG)[700:].max() == 0
    frames[12:, :16, :16] = 255 - frames[12:, :16, :16]
    motion = video_statistics(frames, CONFIG)[700:].reshape(4, 4, 4)
    assert motion.argmax() in {2 * 16, 3 * 16}  # the upper left cell, in the third or fourth segment
    assert motion[:2].max() == 0
    assert motion[:, 2:, 2:].max() == 0
