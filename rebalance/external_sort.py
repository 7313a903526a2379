"""Sorting on disk: the smallest keys of each cell, and repeated keys.

Rows are chosen by the rank of a hash, which takes a sort; here it takes a sort of a part at a time. Records go to
scratch files by the first bits of their key, so that files follow each other in the order of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..audit.storage import scratch_folder

RECORD = np.dtype([("key", "<u8"), ("cell", "<i4"), ("badness", "<u4")])
_PART_ROWS = 1 << 20  # 16 MB of records
_LARGEST_KEY = np.uint64(2**64 - 1)
_MAX_PARTS = 1_024


class ExternalSort:
    """n records of key, cell (-1: in none) and badness, on disk in `folder` where they are many; a context manager."""

    def __init__(self, num_rows: int, folder: Path) -> None:
        self._bits = min(max(0, (num_rows // _PART_ROWS).bit_length()), _MAX_PARTS.bit_length() - 1)
        self._held: list[NDArray[np.void]] = []
        self._scratch = ExitStack()
        self._files: list[Path] = []  # opened for each writing: a process may hold as few as 256 open
        if self._bits:
            scratch = self._scratch.enter_context(scratch_folder(folder))
            self._files = [scratch / f"{number}" for number in range(1 << self._bits)]
            for file in self._files:
                file.touch()

    def __enter__(self) -> ExternalSort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scratch.close()

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
        return np.concatenate([_repeated_keys(part["key"]) for part in self.parts()])

    def last_keys(
        self, quota: NDArray[np.int64], *, kept_imbalance: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Give the quota-th least key of each cell, (c,): those up to it are the cell's quota. 0 where that is 0.

        A quota above what the cell has takes the largest key there is. What the kept records' badness is, is counted
        into `kept_badness` (r,).
        """
        num_cells = len(quota)
        left, last = quota.copy(), np.zeros(num_cells, dtype=np.uint64)
        for part in self.parts():
            if (part["cell"] < 0).any():
                part = part[part["cell"] >= 0]
            cell = part["cell"]
            number = np.bincount(cell, minlength=num_cells)
            ends_here, takes = (left > 0) & (number >= left), left > 0
            some = part[ends_here[cell]]
            some = some[np.lexsort((some["key"], some["cell"]))]
            cells, first = np.unique(some["cell"], return_index=True)
            last[cells] = some["key"][first + left[cells] - 1]
            left = np.maximum(left - number, 0)
            if kept_imbalance is not None:
                kept = takes[cell] & (part["key"] <= np.where(left > 0, _LARGEST_KEY, last)[cell])
                kept_imbalance += np.bincount(part["badness"][kept], minlength=len(kept_imbalance))
        last[left > 0] = _LARGEST_KEY
        return last


def _repeated_keys(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give the keys (n,) that stand more than once, each once: only those that share a slot of a table are sorted."""
    slots = 1 << max(4, len(key).bit_length() + 3)
    slot = (key & np.uint64(slots - 1)).astype(np.intp)
    holder = np.empty(slots, dtype=np.uint32)
    holder[slot] = np.arange(len(key), dtype=np.uint32)  # of several the last
    there = holder[slot]
    others = np.flatnonzero(there != np.arange(len(key), dtype=np.uint32))
    lost = np.sort(key[others])
    same = np.concatenate([lost[1:][lost[1:] == lost[:-1]], key[others][key[others] == key[there[others]]]])
    return np.unique(same)
