"""Fingerprints of media: of one size, equal for equal media, and almost equal for media that were saved again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.features.descriptors import NUM_BYTES, SHAPES, Fingerprints, fingerprint, resampling
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress

MEDIA = MediaConfig()


def levels(decoded: Any, kind: str, media: MediaConfig = MEDIA) -> NDArray[np.float64]:
    return np.frombuffer(fingerprint(decoded, kind, media), np.uint8).astype(float)


def chirp(*, seconds: float = 1.0, rate: int = 16_000) -> NDArray[np.float32]:
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 900 * time / seconds) * time)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 28, 64, 112])
def test_pictures_of_any_size_have_fingerprints_of_one_size(size: int) -> None:
    rng = np.random.default_rng(size)
    picture = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    assert len(fingerprint(picture, "image", MEDIA)) == NUM_BYTES
    for count in (1, 3, 16):
        assert len(fingerprint(np.repeat(picture[None], count, axis=0), "video", MEDIA)) == NUM_BYTES


@pytest.mark.parametrize("rate", [2000, 8000, 16_000, 48_000])
@pytest.mark.parametrize("length", [1, 100, 50_000])
def test_sounds_of_any_length_have_fingerprints_of_one_size(length: int, rate: int) -> None:
    wave = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    assert len(fingerprint(wave, "audio", MediaConfig(sample_rate=rate))) == NUM_BYTES


def test_texts_and_vectors_have_none() -> None:
    assert fingerprint("words", "text", MEDIA) == b""
    assert "features" not in SHAPES


def test_gain_changes_no_fingerprint_of_a_sound_and_speed_changes_it_little() -> None:
    wave = chirp()
    assert fingerprint(wave, "audio", MEDIA) == fingerprint(0.25 * wave, "audio", MEDIA)
    other = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    faster = np.interp(np.arange(0, 15_990, 1.05), np.arange(16_000), wave).astype(np.float32)
    correlation = [np.corrcoef(levels(wave, "audio"), levels(sound, "audio"))[0, 1] for sound in (faster, other)]
    assert correlation[0] > 0.9
    assert correlation[1] < 0.5


@pytest.mark.parametrize("length", [1, 5, 32, 100])
def test_resampling_keeps_constants_and_the_mean_of_a_slope(length: int) -> None:
    weights = resampling(length, 16)
    np.testing.assert_allclose(weights @ np.ones(length), 1, rtol=1e-5)
    if length >= 32:
        slope = weights @ ((np.arange(length) + 0.5) / length)
        np.testing.assert_allclose(slope[2:-2], ((np.arange(16) + 0.5) / 16)[2:-2], atol=0.01)


def test_fingerprints_are_read_from_the_cache(clips: Path, tmp_path: Path) -> None:
    dataset = open_dataset(clips)
    options: dict[str, Any] = {"media": MEDIA, "num_workers": 0, "progress": no_progress}
    tasks = encode_dataset(dataset, tmp_path / "cache", **options)
    for modality in dataset.modalities:
        fingerprints = Fingerprints.of(tasks, modality)
        assert fingerprints is not None
        rows = np.array([7, 2, 20])
        thumbnails = fingerprints.read(rows)
        assert thumbnails.shape == (3, *SHAPES[modality.kind])
        np.testing.assert_array_equal(thumbnails[1:2], fingerprints.read(rows[1:2]))
        assert thumbnails.std() > 0


def test_vectors_of_the_data_have_no_fingerprints(planted: Any, tmp_path: Path) -> None:
    dataset = open_dataset(planted(), DataConfig())
    options: dict[str, Any] = {"media": MEDIA, "num_workers": 0, "progress": no_progress}
    tasks = encode_dataset(dataset, tmp_path / "cache", **options)
    assert [Fingerprints.of(tasks, modality) for modality in dataset.modalities] == [None, None]
