"""Columns of every Arrow type, and datasets that hold them."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DAY = datetime.datetime(2020, 1, 2, 3, 4, 5)


def dictionary(values: pa.Array) -> pa.Array:
    present = [value for value in values.to_pylist() if value is not None]
    codes = [None if value is None else present.index(value) for value in values.to_pylist()]
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(present, values.type))


def extension(type_: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(type_, pa.array(values, type_.storage_type))


def nested(rows: list[Any], type_: pa.DataType) -> pa.Array:
    return pa.array(rows, type_)


UUID = uuid.UUID(int=7)
CASES: dict[str, tuple[pa.Array, pa.DataType, list[Any]]] = {
    "string view": (pa.array(["a", None], pa.string_view()), pa.string(), ["a", None]),
    "large string": (pa.array(["a", None], pa.large_string()), pa.large_string(), ["a", None]),
    "binary view": (pa.array([b"a", None], pa.binary_view()), pa.binary(), [b"a", None]),
    "dictionary": (dictionary(pa.array(["a", None])), pa.string(), ["a", None]),
    "dictionary of views": (dictionary(pa.array(["a", None], pa.string_view())), pa.string(), ["a", None]),
    "dictionary of numbers": (dictionary(pa.array([5, 6])), pa.int64(), [5, 6]),
    "run ends": (pc.run_end_encode(pa.array(["a", "a", None])), pa.string(), ["a", "a", None]),
    "fixed binary": (pa.array([b"ab", None], pa.binary(2)), pa.binary(), [b"ab", None]),
    "half": (pa.array(np.array([0.5, 2], np.float16)), pa.float32(), [0.5, 2.0]),
    "whole decimal": (pa.array([Decimal(3), None], pa.decimal128(18, 0)), pa.int64(), [3, None]),
    "decimal": (pa.array([Decimal("3.25"), None], pa.decimal128(15, 2)), pa.float64(), [3.25, None]),
    "long decimal": (pa.array([Decimal("3.250")], pa.decimal128(38, 3)), pa.string(), ["3.250"]),
    "timestamp": (pa.array([DAY], pa.timestamp("s")), pa.string(), ["2020-01-02 03:04:05"]),
    "unknown zone": (pa.array([0]).cast(pa.timestamp("s", "No/Where")), pa.string(), ["1970-01-01 00:00:00"]),
    "date": (pa.array([10_000_000], pa.int32()).cast(pa.date32()), pa.string(), ["29349-01-26"]),
    "time": (pa.array([DAY.time()], pa.time32("s")), pa.string(), ["03:04:05"]),
    "duration": (pa.array([7], pa.duration("ns")), pa.int64(), [7]),
    "interval": (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), pa.string(), ["(1, 2, 3)"]),
    "uuid": (extension(pa.uuid(), [UUID.bytes, None]), pa.string(), [str(UUID), None]),
    "json": (extension(pa.json_(), ['{"a": 1}', None]), pa.string(), ['{"a": 1}', None]),
    "list view": (nested([[1.0], None, [2.0, 3.0]], pa.list_view(pa.float32())), pa.list_(pa.float32()), []),
    "large list view": (nested([[b"a"], None], pa.large_list_view(pa.binary_view())), pa.large_list(pa.binary()), []),
    "list of views": (nested([["a", None], None], pa.list_(pa.string_view())), pa.list_(pa.string()), []),
    "list of halves": (
        nested([[np.float16(0.5)], None], pa.list_(pa.float16(), 1)),
        pa.list_(pa.float32(), 1),
        [[0.5], None],
    ),
    "list of decimals": (nested([[Decimal("0.5")]], pa.list_(pa.decimal128(38, 2))), pa.list_(pa.float64()), [[0.5]]),
    "struct of views": (
        nested([{"bytes": b"a"}, None], pa.struct([("bytes", pa.binary_view())])),
        pa.struct([("bytes", pa.binary())]),
        [],
    ),
    "tensor": (
        extension(pa.fixed_shape_tensor(pa.float32(), [2, 3]), [[1, 2, 3, 4, 5, 6], None]),
        pa.list_(pa.list_(pa.float32(), 3), 2),
        [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], None],
    ),
    "vector of fixed shape": (
        extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2]]),
        pa.list_(pa.float32(), 2),
        [[1.0, 2.0]],
    ),
    "map": (nested([[("a", 1)]], pa.map_(pa.string(), pa.int64())), pa.map_(pa.string(), pa.int64()), []),
}


# Classes, splits and groups repeat.
N = 24
VALUES = {"id": [f"{row:02d}" for row in range(N)], "label": ["1", "2"] * (N // 2), "group": ["7", "8", "9"] * (N // 3)}
VALUES["split"] = ["train"] * (N - 6) + ["test"] * 6
DOORS = ["parquet", "saved"]


def write_rows(columns: dict[str, pa.Array], door: str, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        vectors = pa.array(rng.standard_normal(2 * N, dtype=np.float32))
        columns[name] = pa.FixedSizeListArray.from_arrays(vectors, 2)
    rows = pa.table(columns)
    folder.mkdir()
    if door == "parquet":
        pq.write_table(rows, folder / "rows.parquet", row_group_size=10)
        return folder / "rows.parquet"
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=10)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    return folder
