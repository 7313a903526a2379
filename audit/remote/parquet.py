"""Parquet files at URLs: the ranges of column chunks, and footers that are read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from .paths import RemotePath

_MAX_FOOTERS = 1_000
_footers: dict[object, tuple[pq.FileMetaData, int]] = {}  # with the size of the file, by URL and status


@dataclass(frozen=True, slots=True, kw_only=True)
class Preload:
    """Columns and row group that are read at once of a file at a URL; by default all."""

    row_group: int | None = None
    columns: Sequence[str] | None = None

    def ranges(self, footer: pq.FileMetaData) -> list[tuple[int, int]]:
        """Return the ranges of bytes of the column chunks, (start, end)."""
        groups = range(footer.num_row_groups) if self.row_group is None else [self.row_group]
        chunks = [footer.row_group(group).column(index) for group in groups for index in range(footer.num_columns)]
        names = None if self.columns is None else tuple(f"{name}." for name in self.columns)
        ranges = []
        for chunk in chunks:
            if names is None or f"{chunk.path_in_schema}.".startswith(names):
                start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
                ranges.append((start, start + chunk.total_compressed_size))
        return ranges


def known_footer(path: object) -> tuple[pq.FileMetaData, int] | None:
    """Return footer and size of a file at a URL that was opened before and has not changed, else None."""
    return _footers.get((path, path.status())) if isinstance(path, RemotePath) else None


def keep_footer(path: object, footer: pq.FileMetaData, size: int) -> None:
    """Keep the footer of a file at a URL, whose row groups are opened one by one."""
    if len(_footers) >= _MAX_FOOTERS:
        _footers.clear()
    if isinstance(path, RemotePath):
        _footers[path, path.status()] = footer, size
