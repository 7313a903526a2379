"""Media in memory or read from large files in ranges, and wav files of samples."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import Reason, UnusableError
from ..remote.cache import cached_file, read_cached
from ..remote.paths import RemotePath
from ..storage import open_regular

MAX_IN_MEMORY = 1 << 24  # bytes; smaller files are read into memory
MAX_ARRAY_BYTES = 1 << 26  # of a .npy file: 16 million numbers, more than any probe can fit
# Size in bytes up to which a file is hashed completely: a quarter of a second. The digest of a larger file covers its
# size, the first HEAD bytes (10 s of eight channels of 32 bits at 192 kHz are 61 MB), and BLOCKS blocks spread evenly
# over the rest, the last one at its end. Files that differ only elsewhere have the same digest.
MAX_DIGESTED = 1 << 28
HEAD, BLOCKS = 1 << 26, 64
_BLOCK = 1 << 20  # bytes per read
_MAX_SEARCH = 1 << 24  # bytes before the end that rfind searches


@dataclass(frozen=True, slots=True)
class MediaFile:
    """The bytes of a regular file, read on demand when they are indexed, searched or streamed.

    It implements the part of the interface of `bytes` that is needed to read headers. The file is opened for each
    access, since a folder of frames may hold more files than a process may open. Raises UnusableError once the file has
    changed.
    """

    path: Path
    size: int
    stamp: tuple[int, int, int]  # device, inode, modification time in ns

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> MediaFile:
        """Build from the fstat of an open file."""
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
        """Return whether the file begins with these bytes."""
        return self[: len(prefix)] == prefix

    def find(self, pattern: bytes, start: int, stop: int) -> int:
        """Return the position of the first occurrence in a range, -1 if there is none."""
        position = self[start:stop].find(pattern)
        return position if position < 0 else min(start, self.size) + position

    def rfind(self, pattern: bytes, start: int = 0, stop: int | None = None) -> int:
        """Return the position of the last occurrence in a range, -1 if there is none in its last 16 MiB."""
        end = self.size if stop is None else min(stop, self.size)
        search_start = max(start, end - _MAX_SEARCH)
        while end > search_start:
            block_start = max(search_start, end - _BLOCK)
            position = self[block_start:end].rfind(pattern)
            if position >= 0:
                return block_start + position
            if block_start == search_start:
                return -1
            end = block_start + len(pattern) - 1  # occurrences that span two blocks
        return -1

    def digest_blocks(self) -> Iterator[bytes]:
        """Yield the bytes to hash, block by block: all, or fixed ranges of a very large file."""
        with self.open() as file:
            for start, stop in _digested_ranges(self.size):
                file.seek(start)
                for block_start in range(start, stop, _BLOCK):
                    yield file.read(min(_BLOCK, stop - block_start))

    def open(self) -> BinaryIO:
        """Open the file as a stream."""
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


@dataclass(frozen=True, slots=True)
class RemoteMediaFile(MediaFile):
    """The bytes of a large file at a URL, read from its copy in the cache, which is downloaded again if it is removed.

    The cache names a copy by the tag of the file, so that its content does not change.
    """

    remote: RemotePath

    @classmethod
    def at(cls, remote: RemotePath) -> RemoteMediaFile:
        """Download a file."""
        file = cached_file(remote)
        return cls(file, remote.file_status().size, (0, 0, 0), remote)

    def open(self) -> BinaryIO:
        """Open the copy as a stream."""
        try:
            return read_cached(self.remote, open_regular)
        except OSError as error:
            raise UnusableError(Reason.MISSING, f"{self.remote.name}: {error.strerror}") from error


Medium = bytes | MediaFile


def open_stream(data: Medium) -> Any:
    """Open a medium as a stream."""
    return io.BytesIO(data) if isinstance(data, bytes) else data.open()


def wave_file(samples: NDArray[Any], rate: int) -> bytes:
    """Return samples (t,) or (channels, t) as a wav file: of 16 bits if they are integers, else of 32-bit floats."""
    type_, format_code = ("<i2", 1) if samples.dtype.kind in "iu" else ("<f4", 3)
    num_channels = 1 if samples.ndim == 1 else len(samples)
    raw = np.ascontiguousarray(samples.T, dtype=type_).tobytes()
    block_bytes = num_channels * np.dtype(type_).itemsize
    layout = struct.pack(
        "<HHIIHH", format_code, num_channels, rate, rate * block_bytes, block_bytes, 8 * np.dtype(type_).itemsize
    )
    chunks = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(raw))
    return b"RIFF" + struct.pack("<I", len(chunks) + len(raw)) + chunks + raw


def _digested_ranges(size: int) -> Iterator[tuple[int, int]]:
    if size <= MAX_DIGESTED:
        yield 0, size
        return
    yield 0, HEAD
    last_start = size - _BLOCK
    for block in range(BLOCKS):
        start = HEAD + (last_start - HEAD) * block // (BLOCKS - 1)
        yield start, start + _BLOCK
