"""Feature matrices: the files of the feature cache, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError, Reason, UnusableError
from ..storage import atomic_write
from .encode import EncodeTask, Status
from .encoders import EncodedRows, Vector

EncodeResult = Vector | UnusableError


def read_arrow(path: Path) -> pa.Table:
    """Map an Arrow file into memory; DatasetError if it is damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it, and it is created again") from error


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file atomically."""
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as file,
    ):
        file.write_table(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedVectors:
    """The existing cache file of a shard and modality, if there is one; `row` maps a content digest to its row."""

    table: pa.Table | None
    row: dict[bytes, int]

    @classmethod
    def of(cls, path: Path) -> CachedVectors:
        """Read the file; a damaged one, for example after a power failure, counts as absent and is written again."""
        try:
            table = read_arrow(path) if path.exists() else None
        except DatasetError:
            table = None
        return cls(
            table=table,
            row={} if table is None else {digest_: n for n, digest_ in enumerate(content_of(table).tolist())},
        )

    def find(self, content: bytes) -> EncodeResult | None:
        """Return the vector or the error of this content, None if it is not in the file."""
        if self.table is None or content not in self.row:
            return None
        row = self.row[content]
        vector = column_of(self.table, "vector")
        if vector[row].is_valid:
            start, end = vector.offsets[row].as_py(), vector.offsets[row + 1].as_py()
            return np.asarray(vector.values[start:end].to_numpy())
        return UnusableError(Reason(self.table["reason"][row].as_py()), self.table["detail"][row].as_py())

    def is_current(self, ids: Sequence[str], content: NDArray[np.bytes_]) -> bool:
        """Return whether the file contains exactly these rows, in this order."""
        if self.table is None or self.table.num_rows != len(content):
            return False
        same_ids = column_of(self.table, "sample_id").equals(pa.array(ids, pa.string()))
        return bool(same_ids and (content_of(self.table) == content).all())


def column_of(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array, without a copy if it has one chunk, which combine_chunks would copy."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def content_of(table: pa.Table) -> NDArray[np.bytes_]:
    """Return the content digests of the rows (n,), dtype S32."""
    column = column_of(table, "content")
    return np.frombuffer(column.buffers()[1], dtype="S32", count=len(column), offset=32 * column.offset)


def problems_of(table: pa.Table) -> Iterator[tuple[int, Reason, str]]:
    """Yield row, reason and detail of each unusable row."""
    rows = np.flatnonzero(column_of(table, "reason").is_valid().to_numpy(zero_copy_only=False))
    unusable = table.select(["reason", "detail"]).take(pa.array(rows))
    for row, reason, detail in zip(
        rows.tolist(), unusable["reason"].to_pylist(), unusable["detail"].to_pylist(), strict=True
    ):
        yield row, Reason(reason), detail


def lengths_of(table: pa.Table) -> set[int]:
    """Return the distinct lengths of the usable vectors."""
    vector = column_of(table, "vector")
    valid = vector.is_valid().to_numpy(zero_copy_only=False)
    return set(np.unique(np.diff(vector.offsets.to_numpy())[valid]).tolist())


def combine_results(content: Sequence[bytes], results: Sequence[EncodeResult], *, encoder: str) -> EncodedRows:
    """Combine the vector or error of each row; DatasetError if vectors differ in length."""
    vectors = [result for result in results if not isinstance(result, UnusableError)]
    check_lengths({len(vector) for vector in vectors}, encoder)
    return EncodedRows(
        content=np.array(content, dtype="S32"),
        usable=np.array([not isinstance(result, UnusableError) for result in results], dtype=bool),
        vector=np.stack(vectors) if vectors else np.zeros((0, 0), np.float32),
        problem={row: result for row, result in enumerate(results) if isinstance(result, UnusableError)},
    )


def check_lengths(lengths: set[int], encoder: str) -> None:
    """Raise DatasetError if there is more than one length."""
    if len(lengths) > 1:
        raise DatasetError(
            f"{encoder} returns vectors of {min(lengths)} and of {max(lengths)} numbers; vectors of a modality must "
            "have the same length"
        )


def encoded_table(ids: Sequence[str], encoded: EncodedRows) -> pa.Table:
    """Return the table of a cache file: sample_id, content, reason, detail (null if usable) and vector (else null)."""
    lengths = np.where(encoded.usable, encoded.vector.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    vector = pa.LargeListArray.from_arrays(offsets, pa.array(encoded.vector.ravel()), mask=pa.array(~encoded.usable))
    rows = range(len(encoded.usable))
    reason = [encoded.problem[row].reason.value if row in encoded.problem else None for row in rows]
    detail = [encoded.problem[row].detail if row in encoded.problem else None for row in rows]
    content = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(encoded.content), [None, pa.py_buffer(np.ascontiguousarray(encoded.content))]
    )
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "content": content,
            "reason": pa.array(reason, pa.string()),
            "detail": pa.array(detail, pa.string()),
            "vector": vector,
        }
    )


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
    """

    tasks: tuple[EncodeTask, ...]
    status: Status
    row: RowIndex
    shard_starts: RowIndex
    num_features: int

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

    def read_all(self) -> NDArray[Any]:
        """Read all rows: (n, d)."""
        return self.read(np.arange(self.num_rows))

    def _read_shard(self, shard: int, dataset_rows: RowIndex) -> NDArray[Any]:
        task, start = self.tasks[shard], int(self.shard_starts[shard])
        # No copy: often only a few rows are read.
        vector = column_of(read_arrow(task.file(self.status.modality)), "vector")
        shard_usable = self.status.usable[start : start + task.shard.num_rows]
        usable_vectors = vector.flatten().to_numpy().reshape(int(shard_usable.sum()), -1)  # flatten skips nulls
        is_usable = shard_usable[dataset_rows - start]
        vectors = usable_vectors[(np.cumsum(shard_usable) - 1)[dataset_rows - start][is_usable]]
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
