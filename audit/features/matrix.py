"""Feature matrices on disk, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cache import column_of, read_arrow
from .encode import EncodeTask, Status

Rows = NDArray[np.intp]
CHUNK_BYTES = 32 << 20  # rows that are read at once: enough for a matrix product to be worth its call


class Inputs(Protocol):
    """n rows of d features, float32 or uint8, of which any can be read. A missing modality's features are NaN."""

    @property
    def num_rows(self) -> int:
        """Rows there are, n."""

    @property
    def num_features(self) -> int:
        """Features of a row, d."""

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""


def chunks(inputs: Inputs, rows: Rows | None = None, *, most_bytes: int = CHUNK_BYTES) -> Iterator[Rows]:
    """Cut rows, all of them by default, into runs whose float32 features take `most_bytes` at most."""
    rows = np.arange(inputs.num_rows) if rows is None else rows
    size = max(256, most_bytes // (4 * inputs.num_features))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def reading_order(inputs: Inputs, rows: Rows) -> Rows:
    """Return the order (b,) of rows in which they are read from front to back of the files they lie in."""
    if isinstance(inputs, JointInputs):
        return reading_order(inputs.parts[0], rows)
    return np.argsort(inputs.row[rows] if isinstance(inputs, FeatureMatrix) else rows, kind="stable")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixInputs:
    """A matrix (n, d) in memory."""

    matrix: NDArray[Any]

    @property
    def num_rows(self) -> int:
        """Rows there are, n."""
        return len(self.matrix)

    @property
    def num_features(self) -> int:
        """Features of a row, d."""
        return int(self.matrix.shape[1])

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d). Rows that follow each other are not copied."""
        if len(rows) and (np.diff(rows) == 1).all():
            return self.matrix[rows[0] : rows[-1] + 1]
        return np.asarray(self.matrix[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowInputs:
    """Rows `first`, `first` + 1, ... of n rows, held in memory: no others can be read."""

    num_rows: int
    first: int
    matrix: NDArray[Any]

    @classmethod
    def of(cls, inputs: Inputs, rows: Rows) -> WindowInputs:
        """Read consecutive rows of other inputs."""
        return cls(num_rows=inputs.num_rows, first=int(rows[0]), matrix=inputs.read(rows))

    @property
    def num_features(self) -> int:
        """Features of a row, d."""
        return int(self.matrix.shape[1])

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        return MatrixInputs(matrix=self.matrix).read(rows - self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMatrix:
    """One modality of n samples in the feature cache; rows where it is missing read as NaN.

    row (n,) are the samples' places in the dataset, starts (s + 1,) the places where the shards begin.
    """

    tasks: tuple[EncodeTask, ...]
    status: Status
    row: Rows
    starts: Rows
    num_features: int

    @classmethod
    def of(cls, tasks: Sequence[EncodeTask], status: Status, row: Rows) -> FeatureMatrix:
        """Open the vectors of these rows of the dataset, one at least of which is usable."""
        starts = np.cumsum([0, *(task.shard.num_rows for task in tasks)])
        opened = cls(tasks=tuple(tasks), status=status, row=row, starts=starts, num_features=0)
        first = row[np.argmax(status.usable[row])]
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        vector = read_arrow(tasks[shard].file(status.modality))["vector"][int(first - starts[shard])]
        return replace(opened, num_features=len(vector))

    @property
    def num_rows(self) -> int:
        """Rows there are, n."""
        return len(self.row)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Tell for each sample (n,) whether it has this modality."""
        return np.asarray(self.status.usable[self.row])

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        place = self.row[rows]
        shard = np.searchsorted(self.starts, place, side="right") - 1
        order = np.argsort(shard, kind="stable")
        out: NDArray[Any] | None = None
        for group in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(rows) else []:
            part = self._read_shard(int(shard[group[0]]), place[group])
            if out is None:
                out = np.empty((len(rows), self.num_features), dtype=part.dtype)
            elif out.dtype != part.dtype:  # NaN stands for what is missing, and bytes have none
                out = out.astype(np.float32)
            out[group] = part
        return np.zeros((0, self.num_features), np.float32) if out is None else out

    def read_all(self) -> NDArray[Any]:
        """Read all rows: (n, d)."""
        return self.read(np.arange(self.num_rows))

    def _read_shard(self, shard: int, place: Rows) -> NDArray[Any]:
        task, start = self.tasks[shard], int(self.starts[shard])
        vector = column_of(read_arrow(task.file(self.status.modality)), "vector")  # not a copy: few rows may be read
        usable = self.status.usable[start : start + task.shard.num_rows]
        held = vector.flatten().to_numpy().reshape(int(usable.sum()), -1)  # flatten leaves out what is null
        wanted = usable[place - start]
        found = held[(np.cumsum(usable) - 1)[place - start][wanted]]
        if wanted.all():
            return np.asarray(found)
        part = np.full((len(place), self.num_features), np.nan, np.float32)
        part[wanted] = found
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class JointInputs:
    """Several inputs of the same n rows, side by side. Those in `masked` read as NaN, as if they were missing."""

    parts: tuple[Inputs, ...]
    masked: frozenset[int] = frozenset()

    @property
    def num_rows(self) -> int:
        """Rows there are, n."""
        return self.parts[0].num_rows

    @property
    def num_features(self) -> int:
        """Features of a row, d."""
        return sum(part.num_features for part in self.parts)

    def mask(self, parts: frozenset[int]) -> JointInputs:
        """Give the same rows with these parts missing."""
        return replace(self, masked=parts)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Read these rows, in this order: (len(rows), d)."""
        out = np.full((len(rows), self.num_features), np.nan, np.float32)
        end = 0
        for index, part in enumerate(self.parts):
            start, end = end, end + part.num_features
            if index not in self.masked:
                out[:, start:end] = part.read(rows)
        return out
