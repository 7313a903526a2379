"""Joins of two manifests by sample id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ManifestError
from .manifest import batches_of
from .score_tables import hash_keys

_BLOCK_ROWS = 1 << 20  # rows that are compared at once

RowIndex = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestJoin:
    """Where the samples of both stand in A and in B, (s,), and the rows that each has alone."""

    paths: tuple[Path, Path]
    in_a: RowIndex
    in_b: RowIndex
    alone_a: RowIndex
    alone_b: RowIndex
    codes: tuple[NDArray[np.int32], NDArray[np.int32]]  # of each row, (n,): the place of its id in `names`
    names: pa.Array

    @classmethod
    def of(cls, a: Path, b: Path) -> ManifestJoin:
        """Join two files; ids are compared as they are, not by a hash of them."""
        parts = [_read_ids(path) for path in (a, b)]
        both = pa.chunked_array([chunk for part in parts for chunk in part], pa.large_string()).dictionary_encode()
        chunks = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in both.chunks]
        names = both.chunk(both.num_chunks - 1).dictionary if both.num_chunks else pa.array([], pa.large_string())
        codes = [_concatenate(chunks[: len(parts[0])]), _concatenate(chunks[len(parts[0]) :])]
        for path, code in zip((a, b), codes, strict=True):
            _check_unique(path, code, names)
        place = np.full(len(names), -1, dtype=np.int64)
        place[codes[1]] = np.arange(len(codes[1]))
        there = place[codes[0]]
        in_b = there[there >= 0]
        alone = np.ones(len(codes[1]), dtype=bool)
        alone[in_b] = False
        return cls(
            paths=(a, b),
            in_a=np.flatnonzero(there >= 0),
            in_b=in_b,
            alone_a=np.flatnonzero(there < 0),
            alone_b=np.flatnonzero(alone),
            codes=(codes[0], codes[1]),
            names=names,
        )

    def least(self, codes: NDArray[np.int32], *, most: int) -> NDArray[np.int32]:
        """Give those of the least ids, in their order."""
        held = codes[:0]
        for start in range(0, len(codes), _BLOCK_ROWS):
            some = np.r_[held, codes[start : start + _BLOCK_ROWS]]
            order = pc.sort_indices(self.names.take(pa.array(some))).to_numpy()[:most]
            held = some[order]
        return held

    def rows_of(self, codes: NDArray[np.int32]) -> tuple[RowIndex, RowIndex]:
        """Give the rows in A and in B of samples of both."""
        shared = self.codes[0][self.in_a]
        place = [int(np.argmax(shared == code)) for code in codes]
        return self.in_a[place], self.in_b[place]

    def named(self, codes: NDArray[np.int32]) -> list[str]:
        """Give ids."""
        return [str(each) for each in self.names.take(pa.array(codes)).to_pylist()]

    def pairs(self, name: str, codes: NDArray[np.int32]) -> tuple[tuple[str, Any, Any], ...]:
        """Give id, A's value and B's of some samples of both."""
        if len(codes) == 0:
            return ()
        values = [_values_at(path, name, rows) for path, rows in zip(self.paths, self.rows_of(codes), strict=True)]
        return tuple(zip(self.named(codes), *values, strict=True))


def _read_ids(path: Path) -> list[pa.Array]:
    columns = [table["sample_id"] for table in batches_of(path, columns=["sample_id"])]
    nulls = sum(column.null_count for column in columns)
    if nulls:
        raise ManifestError(f"{nulls} ids are null in {path}: make it anew with mmaudit split")
    return [column.cast(pa.large_string()).combine_chunks() for column in columns]


def _concatenate(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _check_unique(path: Path, codes: NDArray[np.int32], names: pa.Array) -> None:
    times = np.bincount(codes, minlength=len(names))
    if times.max(initial=0) > 1:
        twice = int((times > 1).sum())
        name = names[int(np.argmax(times > 1))].as_py()
        raise ManifestError(f"{twice} ids stand more than once in {path} (one of them: {name}): see mmaudit verify")


def column_keys(path: Path, name: str, num_rows: int) -> NDArray[np.uint64]:
    """Give 64 bits for each value of a column, (n,): of strings a hash, so that a change is missed once in 2^64."""
    return _concatenate_column(
        [np.zeros(0, np.uint64), *(_value_keys(table[name]) for table in batches_of(path, columns=[name]))],
        path,
        num_rows,
    )


def column_numbers(path: Path, name: str, num_rows: int) -> NDArray[np.float64]:
    """Give a column of numbers, (n,), null as NaN."""
    return _concatenate_column(
        [np.zeros(0), *(_floats(table[name]) for table in batches_of(path, columns=[name]))], path, num_rows
    )


def _concatenate_column(parts: Sequence[NDArray[Any]], path: Path, num_rows: int) -> NDArray[Any]:
    found = np.concatenate(parts)
    if len(found) != num_rows:
        raise ManifestError(f"{path} is damaged: a column of {len(found)} values stands beside {num_rows} ids")
    return found


def _value_keys(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return _floats(column).view(np.uint64)
    found = hash_keys(column.fill_null(""), seed=0)
    found[column.is_null().to_numpy()] = 0
    return found


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.array(column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy())


def _values_at(path: Path, name: str, rows: RowIndex) -> list[Any]:
    """Give the values of a column in these rows."""
    found: dict[int, Any] = {}
    start = 0
    for table in batches_of(path, columns=[name]):
        for row in rows[(rows >= start) & (rows < start + len(table))].tolist():
            found[row] = table[name][row - start].as_py()
        start += len(table)
    return [found[row] for row in rows.tolist()]
