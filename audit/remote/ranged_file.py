"""Files at URLs as streams that read ranges: what is preloaded, else windows around what is read."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .requests import FileStatus, read_ranges

# Bytes that a read outside of all parts fetches at least: the first number, doubled up to the second while reads follow
# each other. Headers of a tar with large members then cost little, and small members few requests; ours.
_WINDOW, _MAX_WINDOW = 1 << 16, 1 << 22
_MAX_WINDOWS = 16  # kept: columns of a row group are read in turn
_TAIL = 1 << 17  # bytes of the last window: most footers of Parquet fit


class RangedFile(io.RawIOBase):
    """A file of known size, read by ranges; never all of it at once."""

    def __init__(self, url: str, status: FileStatus) -> None:
        super().__init__()
        self.url, self.size = url, status.size
        self._position = 0
        self._starts: list[int] = []
        self._parts: list[bytes] = []
        self._windows: OrderedDict[int, bytes] = OrderedDict()

    def preload(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Read ranges (start, end) concurrently, in place of those preloaded before."""
        parts = read_ranges(self.url, [(start, min(end, self.size)) for start, end in ranges], size=self.size)
        joined: list[tuple[int, list[bytes]]] = []
        end = -1
        for start, data in parts:
            if start == end:
                joined[-1][1].append(data)
            else:
                joined.append((start, [data]))
            end = start + len(data)
        self._starts = [start for start, _ in joined]
        self._parts = [chunks[0] if len(chunks) == 1 else b"".join(chunks) for _, chunks in joined]

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; fewer bytes only at the end."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes, or all to the end."""
        start = self._position
        end = self.size if size is None or size < 0 else min(self.size, start + size)
        if end <= start:
            return b""
        data = self._read(start, end)
        self._position = start + len(data)
        return data

    def _read(self, start: int, end: int) -> bytes:
        index = bisect_right(self._starts, start) - 1
        if index >= 0 and end <= self._starts[index] + len(self._parts[index]):
            offset = self._starts[index]
            return self._parts[index][start - offset : end - offset]
        for offset, window in self._windows.items():
            if offset <= start and end <= offset + len(window):
                self._windows.move_to_end(offset)
                return window[start - offset : end - offset]
        is_tail = end == self.size and self.size - start < _TAIL
        offset = max(0, self.size - _TAIL) if is_tail else start
        stop = min(self.size, max(end, start + self._window_bytes(start)))
        window = b"".join(data for _, data in read_ranges(self.url, [(offset, stop)], size=self.size))
        self._windows[offset] = window
        if len(self._windows) > _MAX_WINDOWS:
            self._windows.popitem(last=False)
        return window[start - offset : end - offset]

    def _window_bytes(self, start: int) -> int:
        """Return the bytes to fetch from a position on: twice those of a window that ends shortly before it."""
        for offset, window in self._windows.items():
            if 0 <= start - offset - len(window) <= len(window):
                del self._windows[offset]
                return min(_MAX_WINDOW, 2 * len(window))
        return _WINDOW
