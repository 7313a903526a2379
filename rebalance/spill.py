"""Spill: which keys are the least of each cell, and does any stand twice, when there are more than memory should hold?

Rows are chosen by the rank of a hash, which takes a sort; here it takes a sort of a part at a time. Records go to
scratch files by the first bits of their key, so that files follow each other in the order of the keys.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype([("key", "<u8"), ("cell", "<i4"), ("badness", "<u4")])
_ROWS_A_PART = 1 << 20  # 16 MB of records
_MOST_PARTS = 1_024


class Spill:
    """n records of key, cell (-1: in none) and badness, on disk in `folder` where they are many; a context manager."""

    def __init__(self, num_rows: int, folder: Path) -> None:
        self._bits = min(max(0, (num_rows // _ROWS_A_PART).bit_length()), _MOST_PARTS.bit_length() - 1)
        self._held: list[NDArray[np.void]] = []
        self._scratch = None
        self._files: list[Path] = []  # opened for each writing: a process may hold as few as 256 open
        if self._bits:
            folder.mkdir(parents=True, exist_ok=True)
            self._scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".mmaudit-")
            self._files = [Path(self._scratch.name) / f"{number}" for number in range(1 << self._bits)]
            for file in self._files:
                file.touch()

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()

    def add(self, key: NDArray[np.uint64], cell: NDArray[np.int32], badness: NDArray[np.uint32]) -> None:
        """Add some records, arrays (n,)."""
        records = np.empty(len(key), dtype=RECORD)
        records["key"], records["cell"], records["badness"] = key, cell, badness
        if not self._files:
            self._held.append(records)
            return
        part = (key >> np.uint64(64 - self._bits)).astype(np.uint16)
        records = records[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=len(self._files)))
        for file, first, end in zip(self._files, np.r_[0, ends[:-1]], ends, strict=True):
            if end > first:
                with file.open("ab") as part_file:
                    part_file.write(records[first:end].tobytes())

    def parts(self) -> Iterator[NDArray[np.void]]:
        """Give all records in parts: every key of one is less than every key of the next."""
        if not self._files:
            yield np.concatenate(self._held) if self._held else np.empty(0, dtype=RECORD)
            return
        for file in self._files:
            yield np.fromfile(file, dtype=RECORD)

    def repeated(self) -> NDArray[np.uint64]:
        """Give the keys that stand more than once."""
        found = []
        for part in self.parts():
            key = np.sort(part["key"])
            found.append(np.unique(key[1:][key[1:] == key[:-1]]))
        return np.concatenate(found)

    def last_keys(self, quota: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Give the quota-th least key of each cell, (c,): those up to it are the cell's quota. 0 where that is 0.

        A quota above what the cell has takes the largest key there is.
        """
        num_cells = len(quota)
        left, last = quota.copy(), np.zeros(num_cells, dtype=np.uint64)
        for part in self.parts():
            part = part[part["cell"] >= 0]
            number = np.bincount(part["cell"], minlength=num_cells)
            ends_here = (left > 0) & (number >= left)
            some = part[ends_here[part["cell"]]]
            some = some[np.lexsort((some["key"], some["cell"]))]
            cells, first = np.unique(some["cell"], return_index=True)
            last[cells] = some["key"][first + left[cells] - 1]
            left = np.maximum(left - number, 0)
        last[left > 0] = np.iinfo(np.uint64).max
        return last


def scratch_bytes(num_rows: int) -> int:
    """Tell how many bytes of scratch space a spill of so many rows takes beside the manifest."""
    return RECORD.itemsize * num_rows if num_rows >= _ROWS_A_PART else 0
