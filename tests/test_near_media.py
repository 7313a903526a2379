"""Copies of media are found by fingerprint, and other media are not, however alike they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from mmaudit.audit.features.descriptors import SHAPES, Thumbnails, fingerprint
from mmaudit.audit.features.matrix import RowIndex
from mmaudit.audit.findings import Links
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.near_media import max_tested, near_media

MEDIA = MediaConfig()
NUM_COPIES = 12
Picture = NDArray[np.uint8]
Wave = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFingerprints:
    """Fingerprints of decoded samples in memory."""

    kind: str
    levels: Thumbnails

    @classmethod
    def of(cls, kind: str, decoded: Sequence[NDArray[Any]]) -> MemoryFingerprints:
        rows = [np.frombuffer(fingerprint(sample, kind, MEDIA), np.uint8) for sample in decoded]
        return cls(kind=kind, levels=np.stack(rows).reshape(-1, *SHAPES[kind]).astype(np.float32))

    def read(self, rows: RowIndex) -> Thumbnails:
        return self.levels[rows]


def pictures(count: int, *, detail: float, seed: int = 0) -> list[Picture]:
    """Return pictures (64, 64, 3) of smoothed noise; the smoother, the more alike."""
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal((count, 64, 64, 3)), (0, detail, detail, 0))
    return list(np.clip(128 + 60 * noise / noise.std(axis=(1, 2, 3), keepdims=True), 0, 255).astype(np.uint8))


def resized(image: Image.Image) -> Picture:
    return np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))


def as_jpeg(picture: Picture) -> Picture:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=60)
    return resized(Image.open(file))


PICTURE_COPIES: dict[str, Callable[[Picture], Picture]] = {
    "jpeg": as_jpeg,
    "brighter": lambda picture: resized(ImageEnhance.Brightness(Image.fromarray(picture)).enhance(1.3)),
    "darker": lambda picture: resized(ImageEnhance.Brightness(Image.fromarray(picture)).enhance(0.7)),
    "shifted": lambda picture: np.roll(picture, 2, axis=1),
    "cropped": lambda picture: resized(Image.fromarray(picture).crop((1, 5, 59, 63))),
    "cropped in the middle": lambda picture: resized(Image.fromarray(picture).crop((3, 3, 61, 61))),
}


def copies_found(kind: str, originals: Sequence[NDArray[Any]], copies: Sequence[NDArray[Any]]) -> Links:
    """Search the last third of the originals, and copies of the first of them, among the first two thirds."""
    count = len(originals)
    fingerprints = MemoryFingerprints.of(kind, [*originals, *copies])
    reference = np.arange(2 * count // 3)
    return near_media(fingerprints, reference, np.arange(len(reference), count + len(copies)), neighbours=5)


@pytest.mark.parametrize("name", PICTURE_COPIES)
def test_copies_of_pictures_are_found_and_nothing_else(name: str) -> None:
    originals = pictures(90, detail=4)
    links = copies_found("image", originals, [PICTURE_COPIES[name](picture) for picture in originals[:NUM_COPIES]])
    right = [row for row, match in links.items() if row == len(originals) + match]
    assert len(right) >= 0.8 * NUM_COPIES
    assert len(links) == len(right)


@pytest.mark.parametrize("detail", [2, 6, 12])
def test_clean_pictures_have_no_copies(detail: float) -> None:
    for seed in range(2):
        assert copies_found("image", pictures(150, detail=detail, seed=seed), []) == {}


def test_many_alike_are_no_copies() -> None:
    """Ten photographs of one scene are a scene, not copies of each other."""
    scene = pictures(1, detail=4)[0].astype(float)
    rng = np.random.default_rng(1)
    alike = [np.clip(scene + 2 * rng.standard_normal((64, 64, 3)), 0, 255).astype(np.uint8) for _ in range(13)]
    originals = [*alike[:10], *pictures(80, detail=4, seed=2)]
    assert copies_found("image", originals, alike[10:]) == {}
    assert len(copies_found("image", originals[9:], alike[10:])) == 3


def test_copies_of_videos_are_found() -> None:
    films = list(np.stack(pictures(240, detail=4)).reshape(60, 4, 64, 64, 3))
    cropped = [np.stack([PICTURE_COPIES["cropped"](frame) for frame in film]) for film in films[:NUM_COPIES]]
    links = copies_found("video", films, cropped)
    assert sum(row == len(films) + match for row, match in links.items()) >= 0.8 * NUM_COPIES
    assert len(links) <= NUM_COPIES


@cache
def words(count: int) -> list[Wave]:
    """Return sounds of half a second: four notes of a buzz through resonances that differ from note to note."""
    rng = np.random.default_rng(0)
    waves = []
    for _ in range(count):
        pitch, parts = rng.uniform(90, 220), []
        for _ in range(4):
            time = np.arange(rng.integers(1200, 2800)) / 16_000
            buzz = np.sign(np.sin(2 * np.pi * pitch * rng.uniform(0.9, 1.1) * time)) + 0.3 * rng.standard_normal(
                len(time)
            )
            for hertz in rng.uniform((300, 900), (900, 3000)):
                numerator, denominator = scipy.signal.iirpeak(hertz, 5, fs=16_000)
                buzz = buzz + 6 * scipy.signal.lfilter(numerator, denominator, buzz)
            parts.append(buzz * np.hanning(len(time)) * rng.uniform(0.3, 1))
        wave = np.concatenate(parts)
        waves.append((0.5 * wave / np.abs(wave).max()).astype(np.float32))
    return waves


SOUND_COPIES: dict[str, Callable[[Wave], Wave]] = {
    "slower": lambda wave: scipy.signal.resample_poly(wave, 21, 20).astype(np.float32),
    "faster": lambda wave: scipy.signal.resample_poly(wave, 19, 20).astype(np.float32),
    "quieter": lambda wave: 0.3 * wave,
    "later": lambda wave: np.concatenate([np.zeros(80, np.float32), wave]),
    "trimmed": lambda wave: wave[len(wave) // 20 :],
}


@pytest.mark.parametrize("name", SOUND_COPIES)
def test_copies_of_sounds_are_found_and_nothing_else(name: str) -> None:
    originals = words(90)
    links = copies_found("audio", originals, [SOUND_COPIES[name](wave) for wave in originals[:NUM_COPIES]])
    right = [row for row, match in links.items() if row == len(originals) + match]
    assert len(right) >= 0.8 * NUM_COPIES
    assert len(links) == len(right)


def test_steady_tones_are_not_compared() -> None:
    """Two tones of almost one pitch sound alike by nature."""
    time = np.arange(4000) / 16_000
    tones = [(0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32) for hertz in np.geomspace(200, 4000, 60)]
    assert copies_found("audio", tones, tones[:5]) == {}


def test_number_of_pairs_is_bounded() -> None:
    assert max_tested(10) > 1_000_000
    assert max_tested(200_000) * 200_000 <= 400_000_000
    assert max_tested(10**12) == 1


def test_few_references_and_no_queries_give_nothing() -> None:
    fingerprints = MemoryFingerprints.of("image", pictures(8, detail=4))
    assert near_media(fingerprints, np.arange(5), np.array([5, 6]), neighbours=5) == {}
    assert near_media(fingerprints, np.arange(7), np.array([], dtype=np.intp), neighbours=5) == {}
