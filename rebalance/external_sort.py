"""Sorting on disk: the smallest keys of each cell, and repeated keys.

Rows are selected by the rank of a hash, which needs a sort. Records are partitioned into scratch files by the first
bits of their key, so that the files are in key order and only one part at a time is sorted in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..audit.storage import scratch_folder

RECORD = np.dtype([("key", "<u8"), ("cell", "<i4"), ("imbalance", "<u4")])
_PART_ROWS = 1 << 20  # 16 MB of records
_LARGEST_KEY = np.uint64(2**64 - 1)
_MAX_PARTS = 1_024


class ExternalSort:
    """n records of key, cell (-1: none) and imbalance; above 2^20 rows on disk in `folder`. A context manager."""

    def __init__(self, num_rows: int, folder: Path) -> None:
        self._bits = min(max(0, (num_rows // _PART_ROWS).bit_length()), _MAX_PARTS.bit_length() - 1)
        self._records: list[NDArray[np.void]] = []
        self._scratch = ExitStack()
        self._files: list[Path] = []  # opened per write: the limit of open files may be as low as 256
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

    def add(self, key: NDArray[np.uint64], cell: NDArray[np.int32], imbalance: NDArray[np.uint32]) -> None:
        """Add records, arrays (n,)."""
        records = np.empty(len(key), dtype=RECORD)
        records["key"], records["cell"], records["imbalance"] = key, cell, imbalance
        if not self._files:
            self._records.append(records)
            return
        part = (key >> np.uint64(64 - self._bits)).astype(np.uint16)
        records = records[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=len(self._files)))
        for file, first, end in zip(self._files, np.r_[0, ends[:-1]], ends, strict=True):
            if end > first:
                with file.open("ab") as part_file:
                    part_file.write(records[first:end].tobytes())

    def parts(self) -> Iterator[NDArray[np.void]]:
        """Yield all records in parts: every key of one part is less than every key of the next."""
        if not self._files:
            yield np.concatenate(self._records) if self._records else np.empty(0, dtype=RECORD)
            return
        for file in self._files:
            yield np.fromfile(file, dtype=RECORD)

    def repeated(self) -> NDArray[np.uint64]:
        """Return the keys that occur more than once."""
        return np.concatenate([_repeated_keys(part["key"]) for part in self.parts()])

    def last_keys(
        self, quota: NDArray[np.int64], *, kept_imbalance: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Compute the quota-th smallest key of each cell, (c,); keys up to it are kept. 0 where the quota is 0.

        For a quota above the cell's count it is the largest possible key. The imbalance of the kept records is counted
        into `kept_imbalance` (r,).
        """
        num_cells = len(quota)
        remaining, last = quota.copy(), np.zeros(num_cells, dtype=np.uint64)
        for part in self.parts():
            if (part["cell"] < 0).any():
                part = part[part["cell"] >= 0]
            cell = part["cell"]
            part_counts = np.bincount(cell, minlength=num_cells)
            ends_here, has_quota = (remaining > 0) & (part_counts >= remaining), remaining > 0
            candidates = part[ends_here[cell]]
            candidates = candidates[np.lexsort((candidates["key"], candidates["cell"]))]
            cells, first = np.unique(candidates["cell"], return_index=True)
            last[cells] = candidates["key"][first + remaining[cells] - 1]
            remaining = np.maximum(remaining - part_counts, 0)
            if kept_imbalance is not None:
                is_kept = has_quota[cell] & (part["key"] <= np.where(remaining > 0, _LARGEST_KEY, last)[cell])
                kept_imbalance += np.bincount(part["imbalance"][is_kept], minlength=len(kept_imbalance))
        last[remaining > 0] = _LARGEST_KEY
        return last


def _repeated_keys(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the distinct repeated keys of (n,): only keys that share a slot of a hash table are sorted."""
    slots = 1 << max(4, len(key).bit_length() + 3)
    slot = (key & np.uint64(slots - 1)).astype(np.intp)
    owner_of_slot = np.empty(slots, dtype=np.uint32)
    owner_of_slot[slot] = np.arange(len(key), dtype=np.uint32)  # the last of several
    slot_owner = owner_of_slot[slot]
    displaced = np.flatnonzero(slot_owner != np.arange(len(key), dtype=np.uint32))
    displaced_keys = np.sort(key[displaced])
    repeated = np.concatenate(
        [
            displaced_keys[1:][displaced_keys[1:] == displaced_keys[:-1]],
            key[displaced][key[displaced] == key[slot_owner[displaced]]],
        ]
    )
    return np.unique(repeated)
