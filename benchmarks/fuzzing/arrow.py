"""Arrow arrays of any type, and the ways in which Parquet stores them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .mutate import EDGE_TEXTS

COMPRESSIONS = ("none", "snappy", "zstd", "gzip", "lz4", "brotli")


def write_table(rng: Random, table: pa.Table, path: Path) -> None:
    """Write a table by one of the ways that Parquet allows; what a way cannot hold is written as text."""
    options: dict[str, Any] = {
        "compression": rng.choice(COMPRESSIONS),
        "use_dictionary": rng.random() < 0.6,
        "data_page_version": rng.choice(("1.0", "2.0")),
        "row_group_size": rng.choice((1, 5, 1000, 1000)),
        "write_statistics": rng.random() < 0.7,
    }
    try:
        pq.write_table(table, path, **options)
    except (pa.ArrowException, NotImplementedError):
        columns = [column if pa.types.is_primitive(column.type) else as_text(column) for column in table.columns]
        pq.write_table(pa.Table.from_arrays(columns, names=table.column_names), path)


def as_text(column: Any) -> pa.Array:
    """Return the cells of a column as strings, null as null."""
    cells = column.to_pylist()
    return pa.array([None if cell is None else text_of(cell).replace("\ud800", "?") for cell in cells], pa.string())


def text_of(cell: Any) -> str:
    try:
        return "" if cell is None else str(cell)
    except (ValueError, RecursionError):  # an integer of more digits than str() writes
        return "9" * 5000


def array_of(cells: list[Any]) -> pa.Array:
    try:
        return pa.array(cells)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, RecursionError):
        return pa.array([None if cell is None else text_of(cell).encode("utf-8", "replace").decode() for cell in cells])


ODD_TYPES: tuple[pa.DataType, ...] = (
    pa.null(),
    pa.bool_(),
    pa.int8(),
    pa.uint64(),
    pa.float16(),
    pa.float64(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary(4),
    pa.decimal128(20, 3),
    pa.date32(),
    pa.timestamp("ns", "UTC"),
    pa.time64("us"),
    pa.duration("s"),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.int64()),
    pa.list_(pa.string()),
    pa.list_(pa.float64()),
    pa.large_list(pa.float32()),
    pa.list_(pa.float32(), 3),
    pa.list_(pa.list_(pa.float32())),
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    pa.struct([("a", pa.int32())]),
    pa.map_(pa.string(), pa.int32()),
)


def odd_type(rng: Random, array: Any) -> pa.Array:
    """Return an array of the same length in another type: cast where that can be done, else of made-up values."""
    type_ = rng.choice(ODD_TYPES)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    try:
        return array.cast(type_)
    except (pa.ArrowException, NotImplementedError):
        pass
    cells: list[Any] = [_cell_of(rng, type_) if rng.random() < 0.8 else None for _ in range(len(array))]
    return pa.array(cells, type_)


def _cell_of(rng: Random, type_: pa.DataType) -> Any:
    """Return a value that an array of the type can hold."""
    types = pa.types
    if types.is_nested(type_) or types.is_dictionary(type_):
        return _nested_cell(rng, type_)
    if types.is_fixed_size_binary(type_) and not types.is_decimal(type_):
        return rng.randbytes(type_.byte_width)
    if types.is_binary(type_) or types.is_large_binary(type_):
        return rng.choice((b"", b"\xff\xfe", b"RIFF", b"\x89PNG\r\n\x1a\n", b"x"))
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return rng.choice(EDGE_TEXTS)
    if types.is_boolean(type_):
        return rng.random() < 0.5
    if types.is_floating(type_):
        return rng.choice((0.0, 0.5, 1.0, 2.0, -1.0, float("nan"), float("inf")))
    return rng.choice((0, 1, 2)) if types.is_integer(type_) else None


def _nested_cell(rng: Random, type_: pa.DataType) -> Any:
    if pa.types.is_dictionary(type_):
        return _cell_of(rng, type_.value_type)
    if pa.types.is_map(type_):
        return [("k", 1)]
    if pa.types.is_struct(type_):
        return {field.name: _cell_of(rng, field.type) for field in type_}
    length = type_.list_size if pa.types.is_fixed_size_list(type_) else rng.choice((0, 1, 3))
    return [_cell_of(rng, type_.value_type) for _ in range(length)]
