"""Fingerprints of media: thumbnails of 1,024 bytes, by which copies are found though they were saved again or cropped.

A picture is 32 x 32 grey levels, a video 16 x 16 of four frames, a sound 32 time segments x 32 frequency bands, both
relative: a faster or resampled copy has the same ones, but for a shift in frequency. The design is mmaudit's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import scipy.fft
from numpy.typing import NDArray

from ..dataset.modalities import Modality
from ..media.files import MediaConfig
from .descriptors import LUMA

if TYPE_CHECKING:
    from .encode import EncodeTask
    from .matrix import RowIndex

Thumbnails = NDArray[np.float32]

NUM_BYTES = 1024
SHAPES = {"image": (1, 32, 32), "audio": (1, 32, 32), "video": (4, 16, 16), "frames": (4, 16, 16)}

WINDOW_SECONDS = 0.032
NUM_FRAMES = 96  # of a sound of any length, so that a faster copy has the same ones
LOWEST_HZ, HIGHEST_SHARE = 80.0, 0.875  # of half the sample rate, above which resampling filters
ACTIVE = 1e-3  # 30 dB below the loudest frame: quieter ends are trimmed
POWER_RANGE = 1e-5  # 50 dB below the loudest band


def fingerprint(decoded: Any, kind: str, config: MediaConfig) -> bytes:
    """Return the fingerprint of a decoded sample, see `Encoder`; empty where the kind has none."""
    if kind not in SHAPES:
        return b""
    if kind == "audio":
        return _sound_levels(decoded, config.sample_rate).tobytes()
    frames, height, width = SHAPES[kind]
    pictures = decoded[None] if kind == "image" else decoded
    middles = [(2 * part + 1) * len(pictures) // (2 * frames) for part in range(frames)]
    grey = pictures[middles].astype(np.float32) @ LUMA
    small = resampling(grey.shape[1], height) @ grey @ resampling(grey.shape[2], width).T
    return bytes(np.rint(small).astype(np.uint8).tobytes())


def _sound_levels(wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.uint8]:
    """Compute log power (32, 32), over time and frequency, of the active part of a waveform (t,), 255 = loudest."""
    _, num_segments, num_bands = SHAPES["audio"]
    size = max(16, round(WINDOW_SECONDS * sample_rate))
    window, filters = _band_filters(sample_rate, size, num_bands)
    padded = np.pad(wave.astype(np.float32, copy=False), size // 2 + 1)
    starts = np.rint(np.linspace(0, len(padded) - size, NUM_FRAMES)).astype(np.intp)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[starts]
    spectrum = scipy.fft.rfft(frames * window)
    power = (spectrum.real**2 + spectrum.imag**2) @ filters.T
    energy = power.sum(axis=1)
    active = np.flatnonzero(energy >= ACTIVE * energy.max())
    power = power[active[0] : active[-1] + 1]
    levels = 1 - np.log(np.maximum(power / max(float(power.max()), 1e-20), POWER_RANGE)) / np.log(POWER_RANGE)
    return np.asarray(np.rint(255 * (resampling(len(levels), num_segments) @ levels)), dtype=np.uint8)


@lru_cache(maxsize=8)
def _band_filters(sample_rate: int, size: int, num_bands: int) -> tuple[Thumbnails, Thumbnails]:
    """Return a window (size,) and triangular filters (bands, size // 2 + 1) of equal width in log frequency."""
    frequency = np.arange(size // 2 + 1) * sample_rate / size
    highest = HIGHEST_SHARE * sample_rate / 2
    edges = LOWEST_HZ * (highest / LOWEST_HZ) ** (np.arange(num_bands + 2) / (num_bands + 1))
    filters = np.zeros((num_bands, len(frequency)), dtype=np.float32)
    for band, ((low, centre), (_, high)) in enumerate(pairwise(pairwise(edges))):
        rising, falling = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
        filters[band] = np.maximum(0, np.minimum(rising, falling))
        filters[band, np.argmin(np.abs(frequency - centre))] += 1e-3  # a low band may lie between two frequencies
    return np.hanning(size).astype(np.float32), filters


@lru_cache(maxsize=512)
def resampling(length: int, cells: int, start: float = 0.0, stop: float = 1.0) -> Thumbnails:
    """Return weights (cells, length) that sample the part [start, stop] of a side of length 1; each row sums to 1."""
    centres = start + (np.arange(cells) + 0.5) / cells * (stop - start)
    width = max(1.0, (stop - start) * length / cells)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] * length - 0.5 - np.arange(length)) / width)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprints:
    """Fingerprints of one modality of n samples in the feature cache."""

    tasks: tuple[EncodeTask, ...]
    modality: Modality

    @property
    def kind(self) -> str:
        """Kind of the media: image, audio, video or frames."""
        return self.modality.kind

    @classmethod
    def of(cls, tasks: Sequence[EncodeTask], modality: Modality) -> Fingerprints | None:
        """Open the fingerprints; None if the modality has none: vectors, texts and inputs of pretrained networks."""
        from .encode import column_of, read_arrow

        if modality.kind not in SHAPES:
            return None
        has_any = any(
            column_of(read_arrow(task.file(modality)), "fingerprint").null_count < task.shard.num_rows for task in tasks
        )
        return cls(tasks=tuple(tasks), modality=modality) if has_any else None

    def read(self, rows: RowIndex) -> Thumbnails:
        """Read these rows, in this order: (b, f, h, w) in [0, 255]; missing ones are 0."""
        from .encode import column_of, read_arrow

        starts = np.cumsum([0, *(task.shard.num_rows for task in self.tasks)])
        shard_of_row = np.searchsorted(starts, rows, side="right") - 1
        levels = np.zeros((len(rows), NUM_BYTES), dtype=np.uint8)
        for shard in np.unique(shard_of_row).tolist():
            positions = np.flatnonzero(shard_of_row == shard)
            column = column_of(read_arrow(self.tasks[shard].file(self.modality)), "fingerprint")
            cells = column.take(pa.array(rows[positions] - starts[shard])).fill_null(bytes(NUM_BYTES))
            levels[positions] = np.frombuffer(b"".join(cells.to_pylist()), np.uint8).reshape(-1, NUM_BYTES)
        return levels.reshape(-1, *SHAPES[self.modality.kind]).astype(np.float32)
