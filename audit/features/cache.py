"""Files of the feature cache: one Arrow file per shard and modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DatasetError
from ..quarantine import Reason, UnusableError
from ..storage import atomic_write
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
