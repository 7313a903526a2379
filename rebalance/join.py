"""Join of two manifests by sample id."""

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
from .manifest import read_batches_of_manifest
from .score_tables import hash_keys

_BLOCK_ROWS = 1 << 20  # rows sorted at a time

RowIndex = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestJoin:
    """Row indices in A and B of the shared samples, (s,), and of the samples that only one of them has."""

    paths: tuple[Path, Path]
    in_a: RowIndex
    in_b: RowIndex
    only_a: RowIndex
    only_b: RowIndex
    codes: tuple[NDArray[np.int32], NDArray[np.int32]]  # index of each row's id in `names`, (n,)
    names: pa.Array

    @classmethod
    def of(cls, a: Path, b: Path) -> ManifestJoin:
        """Join two files by their ids themselves, not by a hash of them."""
        id_chunks = [_read_ids(path) for path in (a, b)]
        all_ids = pa.chunked_array(
            [chunk for file_ids in id_chunks for chunk in file_ids], pa.large_string()
        ).dictionary_encode()
        chunks = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in all_ids.chunks]
        names = all_ids.chunks[-1].dictionary if all_ids.num_chunks else pa.array([], pa.large_string())
        codes = [_concatenate(chunks[: len(id_chunks[0])]), _concatenate(chunks[len(id_chunks[0]) :])]
        for path, code in zip((a, b), codes, strict=True):
            _check_unique(path, code, names)
        row_in_b = np.full(len(names), -1, dtype=np.int64)
        row_in_b[codes[1]] = np.arange(len(codes[1]))
        matched_row = row_in_b[codes[0]]
        in_b = matched_row[matched_row >= 0]
        only_in_b = np.ones(len(codes[1]), dtype=bool)
        only_in_b[in_b] = False
        return cls(
            paths=(a, b),
            in_a=np.flatnonzero(matched_row >= 0),
            in_b=in_b,
            only_a=np.flatnonzero(matched_row < 0),
            only_b=np.flatnonzero(only_in_b),
            codes=(codes[0], codes[1]),
            names=names,
        )

    def smallest_codes(self, codes: NDArray[np.int32], *, max_ids: int) -> NDArray[np.int32]:
        """Return the codes of the `max_ids` smallest ids, in the order of the ids."""
        smallest = codes[:0]
        for start in range(0, len(codes), _BLOCK_ROWS):
            candidates = np.r_[smallest, codes[start : start + _BLOCK_ROWS]]
            order = pc.sort_indices(self.names.take(pa.array(candidates))).to_numpy()[:max_ids]
            smallest = candidates[order]
        return smallest

    def rows_of(self, codes: NDArray[np.int32]) -> tuple[RowIndex, RowIndex]:
        """Return the row indices in A and in B of shared samples."""
        shared = self.codes[0][self.in_a]
        positions = [int(np.argmax(shared == code)) for code in codes]
        return self.in_a[positions], self.in_b[positions]

    def sample_ids(self, codes: NDArray[np.int32]) -> list[str]:
        """Return the ids of these codes."""
        return [str(sample_id) for sample_id in self.names.take(pa.array(codes)).to_pylist()]

    def pairs(self, name: str, codes: NDArray[np.int32]) -> tuple[tuple[str, Any, Any], ...]:
        """Return (id, A's value, B's value) of a column for shared samples."""
        if len(codes) == 0:
            return ()
        values = [_values_at(path, name, rows) for path, rows in zip(self.paths, self.rows_of(codes), strict=True)]
        return tuple(zip(self.sample_ids(codes), *values, strict=True))


def _read_ids(path: Path) -> list[pa.Array]:
    columns = [table["sample_id"] for table in read_batches_of_manifest(path, columns=["sample_id"])]
    nulls = sum(column.null_count for column in columns)
    if nulls:
        raise ManifestError(f"{nulls} null ids in {path}: recreate it with mmaudit split")
    return [column.cast(pa.large_string()).combine_chunks() for column in columns]


def _concatenate(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _check_unique(path: Path, codes: NDArray[np.int32], names: pa.Array) -> None:
    counts = np.bincount(codes, minlength=len(names))
    if counts.max(initial=0) > 1:
        num_repeated = int((counts > 1).sum())
        name = names[int(np.argmax(counts > 1))].as_py()
        raise ManifestError(
            f"{num_repeated} ids occur more than once in {path} (for example {name}): run mmaudit verify"
        )


def column_keys(path: Path, name: str, num_rows: int) -> NDArray[np.uint64]:
    """Return 64 bits for each value of a column, (n,); strings are hashed: a change is missed once in 2^64."""
    return _join_values(
        [
            np.zeros(0, np.uint64),
            *(_value_keys(table[name]) for table in read_batches_of_manifest(path, columns=[name])),
        ],
        path,
        num_rows,
    )


def column_numbers(path: Path, name: str, num_rows: int) -> NDArray[np.float64]:
    """Read a column of numbers, (n,), null as NaN."""
    return _join_values(
        [np.zeros(0), *(_floats(table[name]) for table in read_batches_of_manifest(path, columns=[name]))],
        path,
        num_rows,
    )


def _join_values(parts: Sequence[NDArray[Any]], path: Path, num_rows: int) -> NDArray[Any]:
    values = np.concatenate(parts)
    if len(values) != num_rows:
        raise ManifestError(
            f"{path} is damaged: a column has {len(values)} values, expected {num_rows} as there are ids"
        )
    return values


def _value_keys(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return _floats(column).view(np.uint64)
    keys = hash_keys(column.fill_null(""), seed=0)
    keys[column.is_null().to_numpy()] = 0
    return keys


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.array(column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy())


def _values_at(path: Path, name: str, rows: RowIndex) -> list[Any]:
    """Read the values of a column in these rows."""
    value_of_row: dict[int, Any] = {}
    start = 0
    for table in read_batches_of_manifest(path, columns=[name]):
        for row in rows[(rows >= start) & (rows < start + len(table))].tolist():
            value_of_row[row] = table[name][row - start].as_py()
        start += len(table)
    return [value_of_row[row] for row in rows.tolist()]
