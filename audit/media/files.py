"""Media files: limits on what is decoded, and reading of large files in ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, overload

from ..errors import ConfigError
from ..quarantine import Reason, UnusableError
from ..storage import open_regular

MAX_FRAME_PIXELS = 2_147_483_647  # FFmpeg counts in 32 bits
_MAX_PIXELS = 178_956_970  # of a picture that Pillow opens: twice its own MAX_IMAGE_PIXELS
_LIMITS: dict[str, tuple[float, float]] = {
    "sample_rate": (2_000, 192_000),
    "max_seconds": (0.01, 3_600),
    "mel_bins": (8, 128),
    "max_clipped": (0, 1),
    "network_seconds": (0.1, 60),
    "network_mel_bins": (8, 256),
    "max_image_pixels": (1, _MAX_PIXELS),
    "max_frame_pixels": (1, MAX_FRAME_PIXELS),
}
BUDGETS = (
    "max_image_pixels",
    "max_image_bytes",
    "max_frame_pixels",
    "max_video_pixels",
    "max_video_bytes",
    "max_packets",
    "max_sound_values",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """What every sample of a modality is brought to before anything is measured on it."""

    sample_rate: int = 16_000  # Hz
    max_seconds: float = 10.0  # of sound and of video; the rest of a longer clip is not looked at
    mel_bins: int = 40
    image_size: int = 64  # pixels; pictures become squares
    num_frames: int = 16  # evenly over the clip
    frame_size: int = 64  # pixels; frames become squares
    text_buckets: int = 1024  # hashed words and word pairs
    max_clipped: float = 0.1  # share of the samples that may stand at full scale; 1: all of them
    network_seconds: float = 3.0  # of sound that a network hears: CREMA-D's clips take 2 to 3
    network_mel_bins: int = 64
    network_frames: int = 3  # that a network sees of a clip, as in the papers
    network_size: int = 112  # pixels; the papers have 224, which takes four times as long
    # Budgets: a file that asks for more is quarantined as too-large, before it is decoded.
    max_image_pixels: int = 1 << 26  # of a picture: 8,192 x 8,192, which take 256 MiB as RGB
    max_image_bytes: int = 1 << 28  # of a picture's file
    max_frame_pixels: int = 1 << 24  # of a frame of video: 5.3K of action cameras is 15.9 million
    max_video_pixels: int = 6_000_000_000  # of the frames of a clip together: 10 s of 4K at 60 a second are 5.0e9
    max_video_bytes: int = 1 << 28  # of a clip's coded frames together
    max_packets: int = 200_000  # of a clip: an hour of sound in AAC has 170,000
    max_sound_values: int = 3_200_000  # samples a second, all channels together: 16 channels at 192 kHz are 3.1e6

    def __post_init__(self) -> None:
        """Refuse what no sample could be brought to."""
        for field in fields(self):
            default = (1, 1 << 40) if field.name in BUDGETS else (1, 4_096)
            (low, high), value = _LIMITS.get(field.name, default), getattr(self, field.name)
            if not low <= value <= high:
                raise ConfigError(f"{field.name} is {value}; set it to {low} .. {high}")

    def to_fingerprint(self) -> list[tuple[str, Any]]:
        """Return names and values of the fields that decide about a vector, sorted.

        A budget at its default is not among them: caches made before there were budgets stay valid.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return sorted(pair for pair in values.items() if pair[0] not in BUDGETS or pair[1] != defaults[pair[0]])


MAX_IN_MEMORY = 1 << 24  # bytes; a smaller file is read at once
# Bytes of a file that its content digest covers whole: a quarter of a second of hashing. Of a larger file it covers the
# size, the first HEAD bytes (10 s of eight channels of 32 bits at 192 kHz are 61 MB), and BLOCKS blocks spread evenly
# over the rest, the last of them at its end. What differs elsewhere only is taken for the same.
MAX_DIGESTED = 1 << 28
HEAD, BLOCKS = 1 << 26, 64
_BLOCK = 1 << 20  # bytes that are read at once
_MAX_SEARCH = 1 << 24  # bytes from the end in which rfind looks


@dataclass(frozen=True, slots=True)
class MediaFile:
    """The bytes of a regular file, read where they are indexed, searched or streamed.

    It has that part of the interface of `bytes` by which headers are read. The file is opened for each access, since a
    folder of frames may hold more files than a process may have open; UnusableError once it has changed.
    """

    path: Path
    size: int
    stamp: tuple[int, int, int]  # device, inode, modification time in ns

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> MediaFile:
        """Describe an open file by its fstat."""
        return cls(path, status.st_size, (status.st_dev, status.st_ino, status.st_mtime_ns))

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, int):
            if not -self.size <= key < self.size:
                raise IndexError(f"byte {key} of {self.size}")
            return self._read(key % self.size, 1)[0]
        start, stop, step = key.indices(self.size)
        assert step == 1
        return self._read(start, max(0, stop - start))

    def startswith(self, prefix: bytes) -> bool:
        """Whether the file begins with these bytes."""
        return self[: len(prefix)] == prefix

    def find(self, sought: bytes, start: int, stop: int) -> int:
        """Return where bytes stand within a range, -1 if they do not."""
        place = self[start:stop].find(sought)
        return place if place < 0 else min(start, self.size) + place

    def rfind(self, sought: bytes, start: int = 0, stop: int | None = None) -> int:
        """Return where bytes stand last within a range, -1 if not within its last 16 MiB."""
        end = self.size if stop is None else min(stop, self.size)
        first = max(start, end - _MAX_SEARCH)
        while end > first:
            begin = max(first, end - _BLOCK)
            place = self[begin:end].rfind(sought)
            if place >= 0:
                return begin + place
            if begin == first:
                return -1
            end = begin + len(sought) - 1  # what lies over the border of two blocks
        return -1

    def digested(self) -> Iterator[bytes]:
        """Yield the bytes that stand for the content, block by block: all, or of a very large file a fixed choice."""
        with self.open() as file:
            for start, stop in _digested_ranges(self.size):
                file.seek(start)
                for at in range(start, stop, _BLOCK):
                    yield file.read(min(_BLOCK, stop - at))

    def open(self) -> BinaryIO:
        """Open the file to be read as a stream."""
        try:
            file = open_regular(self.path)
        except OSError as error:
            raise UnusableError(Reason.MISSING, f"{self.path.name}: {error.strerror}") from error
        if MediaFile.of(self.path, os.fstat(file.fileno())) != self:
            file.close()
            raise UnusableError(Reason.CORRUPT, f"{self.path.name} changed while it was read")
        return file

    def _read(self, start: int, count: int) -> bytes:
        with self.open() as file:
            file.seek(start)
            return file.read(count)


Medium = bytes | MediaFile


def stream_of(data: Medium) -> Any:
    """Open a medium to be read as a stream."""
    return io.BytesIO(data) if isinstance(data, bytes) else data.open()


def _digested_ranges(size: int) -> Iterator[tuple[int, int]]:
    if size <= MAX_DIGESTED:
        yield 0, size
        return
    yield 0, HEAD
    last = size - _BLOCK
    for block in range(BLOCKS):
        start = HEAD + (last - HEAD) * block // (BLOCKS - 1)
        yield start, start + _BLOCK
