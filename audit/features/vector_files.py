"""Vectors of cache files, read at their positions in the files: no file is mapped, or read as a whole, for some rows.

Pages of mapped files count as resident memory, so that random rows of a large cache soon are all of it. What is read
here takes the memory of the rows and of one block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from .cached_matrix import FeatureMatrix
from .encode import column_of, locate_arrow
from .matrix import Inputs, RowIndex

MAX_GAP = 1 << 16  # ours, bytes: rows with fewer bytes between them are read together
BLOCK_BYTES = 1 << 22  # ours: read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFile:
    """Where the vectors of a cache file lie: `num_features` numbers each, one after the other, from the byte `start`.

    size: bytes of the file when it was opened.
    """

    path: Path
    size: int
    start: int
    num_features: int
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, path: Path, *, num_vectors: int) -> VectorFile | None:
        """Find the vectors of a file; None where its column is not one block of so many vectors of one length.

        Raises DatasetError where the file is damaged.
        """
        table, address = locate_arrow(path)
        column = column_of(table, "vector")
        values = column.values
        first, last = column.offsets.to_numpy()[[0, -1]].tolist()
        num_features, dtype = (last - first) // max(1, num_vectors), np.dtype(values.type.to_pandas_dtype())
        size = path.stat().st_size
        start = values.buffers()[1].address - address + (values.offset + first) * dtype.itemsize
        is_block = 0 < num_features * num_vectors == last - first and table["vector"].num_chunks == 1
        if not is_block or not 0 < start <= size - (last - first) * dtype.itemsize:
            return None
        return cls(path=path, size=size, start=start, num_features=num_features, dtype=dtype)

    def read_into(self, features: NDArray[Any], positions: RowIndex, vectors: RowIndex) -> None:
        """Read vectors (b,), ascending, into rows of `features` (n, d); DatasetError where the file has changed."""
        row_bytes = self.num_features * self.dtype.itemsize
        try:
            with self.path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise _changed(self.path)
                for rows in _blocks(vectors, row_bytes=row_bytes):
                    first, last = int(vectors[rows.start]), int(vectors[rows.stop - 1])
                    block = np.empty((last - first + 1, self.num_features), self.dtype)
                    _read_exactly(file, block, self.start + first * row_bytes, path=self.path)
                    features[positions[rows]] = block[vectors[rows] - first]
        except OSError as error:
            raise DatasetError(f"{self.path} cannot be read: {error.strerror}") from error


def _blocks(vectors: RowIndex, *, row_bytes: int) -> Iterator[slice]:
    """Yield slices of ascending row numbers that are read together: near each other, and of at most a block."""
    is_far = np.diff(vectors) > 1 + MAX_GAP // row_bytes
    run = np.concatenate([[0], np.cumsum(is_far)])
    first_of_run = vectors[np.concatenate([[0], np.flatnonzero(is_far) + 1])]
    block = (vectors - first_of_run[run]) // max(1, BLOCK_BYTES // row_bytes)
    ends = np.flatnonzero((np.diff(run) > 0) | (np.diff(block) > 0)) + 1
    for start, stop in zip([0, *ends.tolist()], [*ends.tolist(), len(vectors)], strict=True):
        yield slice(start, stop)


def _read_exactly(file: BinaryIO, block: NDArray[Any], position: int, *, path: Path) -> None:
    """Fill an array with the bytes from a position; DatasetError where the file ends before."""
    view = block.data.cast("B")
    file.seek(position)
    while len(view):
        if not (num_read := file.readinto(view)):  # type: ignore[attr-defined]
            raise _changed(path)
        view = view[num_read:]


def _changed(path: Path) -> DatasetError:
    return DatasetError(f"{path} was cut off or changed while it was read: delete it, and it is created again")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInputs:
    """The rows of a feature matrix, read from the positions of their vectors; otherwise as the matrix itself.

    files, ranks: by shard where it was read before, the position of its vectors, and of each of its rows the number of
    its vector; None: they are all there, in order.
    """

    matrix: FeatureMatrix
    files: dict[int, VectorFile | None] = field(default_factory=dict)
    ranks: dict[int, NDArray[np.int32] | None] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return self.matrix.num_rows

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return self.matrix.num_features

    def reading_order(self, rows: RowIndex) -> RowIndex:
        """Return the order (b,) in which these rows are read sequentially from their files."""
        return self.matrix.reading_order(rows)

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        dataset_rows = self.matrix.row[rows]
        order = np.argsort(dataset_rows, kind="stable")
        ends = np.searchsorted(dataset_rows[order], self.matrix.shard_starts)
        features: NDArray[Any] | None = None
        for shard in np.flatnonzero(np.diff(ends)).tolist():
            positions = order[ends[shard] : ends[shard + 1]]
            local_rows = dataset_rows[positions] - self.matrix.shard_starts[shard]
            is_usable = self._usable(shard)[local_rows]
            file = self._file(shard) if is_usable.any() else None
            if file is None and is_usable.any():
                return self.matrix.read(rows)
            dtype = np.dtype(np.float32) if file is None or not is_usable.all() else file.dtype
            if features is None:
                features = np.empty((len(rows), self.num_features), dtype=dtype)
            elif features.dtype != dtype:  # missing rows are NaN, which uint8 cannot represent
                features = features.astype(np.float32)
            if not is_usable.all():
                features[positions[~is_usable]] = np.nan
            if file is not None:
                file.read_into(features, positions[is_usable], self._vectors(shard, local_rows[is_usable]))
        return np.zeros((0, self.num_features), np.float32) if features is None else features

    def _usable(self, shard: int) -> NDArray[np.bool_]:
        start, end = self.matrix.shard_starts[shard : shard + 2]
        return self.matrix.status.usable[start:end]

    def _file(self, shard: int) -> VectorFile | None:
        if shard not in self.files:
            path = self.matrix.tasks[shard].file(self.matrix.status.modality)
            self.files[shard] = VectorFile.of(path, num_vectors=int(self._usable(shard).sum()))
        return self.files[shard]

    def _vectors(self, shard: int, local_rows: RowIndex) -> RowIndex:
        """Return the number of the vector of each row of a shard, among those of the rows that have one."""
        if shard not in self.ranks:
            usable = self._usable(shard)
            self.ranks[shard] = None if usable.all() else np.cumsum(usable, dtype=np.int32) - 1
        rank = self.ranks[shard]
        return local_rows if rank is None else rank[local_rows].astype(np.intp)


def from_files(inputs: Inputs) -> Inputs:
    """Return the same inputs, of which a feature matrix is read by the positions of its vectors.

    Hashed terms of texts and selected columns are read as before, from mapped files.
    """
    if not isinstance(inputs, FeatureMatrix) or inputs.has_terms or inputs.columns is not None:
        return inputs
    return FileInputs(matrix=inputs)
