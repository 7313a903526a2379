"""Files of the feature cache: the vectors of one shard each."""

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
from .encoders import Encoded, Vector

Found = Vector | UnusableError


def read_arrow(path: Path) -> pa.Table:
    """Map an Arrow file into memory; DatasetError where it is damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it, and it is made anew") from error


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file whole or not at all."""
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as file,
    ):
        file.write_table(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a shard's file of one modality holds already; `row` finds it by content."""

    table: pa.Table | None
    row: dict[bytes, int]

    @classmethod
    def of(cls, path: Path) -> Known:
        """Read it; a damaged file, as a power cut leaves it, is made anew."""
        try:
            table = read_arrow(path) if path.exists() else None
        except DatasetError:
            table = None
        return cls(table=table, row={} if table is None else {c: n for n, c in enumerate(content_of(table).tolist())})

    def find(self, content: bytes) -> Found | None:
        """Give the vector or the problem of this content, None where it is new."""
        if self.table is None or content not in self.row:
            return None
        row = self.row[content]
        vector = column_of(self.table, "vector")
        if vector[row].is_valid:
            start, end = vector.offsets[row].as_py(), vector.offsets[row + 1].as_py()
            return np.asarray(vector.values[start:end].to_numpy())
        return UnusableError(Reason(self.table["reason"][row].as_py()), self.table["detail"][row].as_py())

    def is_current(self, ids: Sequence[str], content: NDArray[np.bytes_]) -> bool:
        """Whether the file holds these rows and no others, in this order."""
        if self.table is None or self.table.num_rows != len(content):
            return False
        same_ids = column_of(self.table, "sample_id").equals(pa.array(ids, pa.string()))
        return bool(same_ids and (content_of(self.table) == content).all())


def column_of(table: pa.Table, name: str) -> pa.Array:
    """Give a column as one array; combine_chunks copies it even where there is but one chunk."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def content_of(table: pa.Table) -> NDArray[np.bytes_]:
    """Give the digests of the rows' content (n,), dtype S32."""
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
    """Give the lengths of the usable vectors."""
    vector = column_of(table, "vector")
    valid = vector.is_valid().to_numpy(zero_copy_only=False)
    return set(np.unique(np.diff(vector.offsets.to_numpy())[valid]).tolist())


def gather(content: Sequence[bytes], found: Sequence[Found], *, encoder: str) -> Encoded:
    """Put rows together, each with its vector or its problem; DatasetError where vectors differ in length."""
    vectors = [each for each in found if not isinstance(each, UnusableError)]
    check_lengths({len(vector) for vector in vectors}, encoder)
    return Encoded(
        content=np.array(content, dtype="S32"),
        usable=np.array([not isinstance(each, UnusableError) for each in found], dtype=bool),
        vector=np.stack(vectors) if vectors else np.zeros((0, 0), np.float32),
        problem={row: each for row, each in enumerate(found) if isinstance(each, UnusableError)},
    )


def check_lengths(lengths: set[int], encoder: str) -> None:
    """Refuse vectors of several lengths."""
    if len(lengths) > 1:
        raise DatasetError(
            f"{encoder} gives vectors of {min(lengths)} and of {max(lengths)} numbers; all of a modality must have one "
            "length"
        )


def encoded_table(ids: Sequence[str], encoded: Encoded) -> pa.Table:
    """Give the columns of a file: sample_id, content, reason and detail, null where usable, and vector, else null."""
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
