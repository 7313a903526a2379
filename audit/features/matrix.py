"""Feature matrices on disk, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .encode import EncodeTask, column_of, read_arrow

if TYPE_CHECKING:
    from .encoded_samples import Status

RowIndex = NDArray[np.intp]
CHUNK_BYTES = 32 << 20  # read at once: large enough for efficient matrix products


class Inputs(Protocol):
    """n rows of d features, float32 or uint8, with random access. Features of a missing modality are NaN."""

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""

    @property
    def num_features(self) -> int:
        """Number of features, d."""

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""


def chunks(inputs: Inputs, rows: RowIndex | None = None, *, max_bytes: int = CHUNK_BYTES) -> Iterator[RowIndex]:
    """Yield the rows, by default all, in chunks of at most `max_bytes` of float32 features, but at least 256 rows."""
    rows = np.arange(inputs.num_rows) if rows is None else rows
    size = max(256, max_bytes // (4 * inputs.num_features))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def reading_order(inputs: Inputs, rows: RowIndex) -> RowIndex:
    """Return the order (b,) in which these rows are read sequentially from their files."""
    if isinstance(inputs, JointInputs):
        return reading_order(inputs.parts[0], rows)
    return np.argsort(inputs.row[rows] if isinstance(inputs, FeatureMatrix) else rows, kind="stable")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixInputs:
    """A matrix (n, d) in memory."""

    matrix: NDArray[Any]

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return len(self.matrix)

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return int(self.matrix.shape[1])

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d). Consecutive rows are returned as a view."""
        if len(rows) and (np.diff(rows) == 1).all():
            return self.matrix[rows[0] : rows[-1] + 1]
        return np.asarray(self.matrix[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowInputs:
    """Consecutive rows in memory, from `first`, of n rows; only these can be read."""

    num_rows: int
    first: int
    matrix: NDArray[Any]

    @classmethod
    def of(cls, inputs: Inputs, rows: RowIndex) -> WindowInputs:
        """Read consecutive rows of `inputs` into memory."""
        return cls(num_rows=inputs.num_rows, first=int(rows[0]), matrix=inputs.read(rows))

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return int(self.matrix.shape[1])

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        return MatrixInputs(matrix=self.matrix).read(rows - self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMatrix:
    """One modality of n samples in the feature cache; rows without the modality read as NaN.

    row: dataset row of each sample (n,). shard_starts: first dataset row of each shard, and the end (s + 1,).
    columns: the columns that are read, (d,); None: all.
    """

    tasks: tuple[EncodeTask, ...]
    status: Status
    row: RowIndex
    shard_starts: RowIndex
    num_features: int
    columns: RowIndex | None = None

    @classmethod
    def of(cls, tasks: Sequence[EncodeTask], status: Status, row: RowIndex) -> FeatureMatrix:
        """Open the vectors of these dataset rows, of which at least one must be usable."""
        shard_starts = np.cumsum([0, *(task.shard.num_rows for task in tasks)])
        opened = cls(tasks=tuple(tasks), status=status, row=row, shard_starts=shard_starts, num_features=0)
        first = row[np.argmax(status.usable[row])]
        shard = int(np.searchsorted(shard_starts, first, side="right")) - 1
        vector = read_arrow(tasks[shard].file(status.modality))["vector"][int(first - shard_starts[shard])]
        return replace(opened, num_features=len(vector))

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return len(self.row)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Mask (n,) of the samples that have this modality."""
        return np.asarray(self.status.usable[self.row])

    def take(self, rows: RowIndex) -> FeatureMatrix:
        """Return the matrix of these rows, in this order."""
        return replace(self, row=self.row[rows])

    def select_columns(self, columns: RowIndex) -> FeatureMatrix:
        """Return the matrix of the same rows with these of its columns, (c,), in this order."""
        selected = columns if self.columns is None else self.columns[columns]
        return replace(self, columns=selected, num_features=len(selected))

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        dataset_rows = self.row[rows]
        shard = np.searchsorted(self.shard_starts, dataset_rows, side="right") - 1
        order = np.argsort(shard, kind="stable")
        features: NDArray[Any] | None = None
        for positions in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(rows) else []:
            part = self._read_shard(int(shard[positions[0]]), dataset_rows[positions])
            if features is None:
                features = np.empty((len(rows), self.num_features), dtype=part.dtype)
            elif features.dtype != part.dtype:  # missing rows are NaN, which uint8 cannot represent
                features = features.astype(np.float32)
            features[positions] = part
        return np.zeros((0, self.num_features), np.float32) if features is None else features

    def _read_shard(self, shard: int, dataset_rows: RowIndex) -> NDArray[Any]:
        task, start = self.tasks[shard], int(self.shard_starts[shard])
        # No copy: often only a few rows are read.
        vector = column_of(read_arrow(task.file(self.status.modality)), "vector")
        shard_usable = self.status.usable[start : start + task.shard.num_rows]
        usable_vectors = vector.flatten().to_numpy().reshape(int(shard_usable.sum()), -1)  # flatten skips nulls
        is_usable = shard_usable[dataset_rows - start]
        vectors = usable_vectors[(np.cumsum(shard_usable) - 1)[dataset_rows - start][is_usable]]
        vectors = vectors if self.columns is None else vectors[:, self.columns]
        if is_usable.all():
            return np.asarray(vectors)
        part = np.full((len(dataset_rows), self.num_features), np.nan, np.float32)
        part[is_usable] = vectors
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class JointInputs:
    """Concatenated features of several inputs of the same n rows. Parts in `masked` read as NaN, as if missing."""

    parts: tuple[Inputs, ...]
    masked: frozenset[int] = frozenset()

    @property
    def num_rows(self) -> int:
        """Number of rows, n."""
        return self.parts[0].num_rows

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        return sum(part.num_features for part in self.parts)

    def mask(self, parts: frozenset[int]) -> JointInputs:
        """Return the same rows with these parts masked."""
        return replace(self, masked=parts)

    def read(self, rows: RowIndex) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        features = np.full((len(rows), self.num_features), np.nan, np.float32)
        end = 0
        for index, part in enumerate(self.parts):
            start, end = end, end + part.num_features
            if index not in self.masked:
                features[:, start:end] = part.read(rows)
        return features
