"""A large file of media, read in ranges: it never stands in memory as a whole."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

from ..quality import Reason, UnusableError
from ..regular_file import open_regular

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
