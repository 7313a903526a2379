"""Arrow types: conversion to the types that datasets are read in, and every type in every role and door."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from arrow_columns import CASES, DOORS, VALUES, N, extension, write_rows

from mmaudit.audit.arrow import dataset_schema, dataset_table, flat_vectors, plain_table, vector_length
from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.samples import read_samples


@pytest.mark.parametrize("case", CASES)
def test_column_is_converted_to_a_plain_type(case: str) -> None:
    array, type_, values = CASES[case]
    table = pa.table({"x": array, "n": range(len(array))}).replace_schema_metadata({"k": "v"})
    converted = dataset_table(table)
    converted.validate(full=True)
    assert converted.schema.types == [type_, pa.int64()]
    assert converted["x"].to_pylist() == (values or array.to_pylist())
    assert converted.schema.equals(dataset_schema(table.schema), check_metadata=True)
    assert dataset_table(converted) is converted
    slice_ = dataset_table(table.slice(1))
    assert slice_["x"].to_pylist() == converted["x"].to_pylist()[1:]


def test_plain_table_keeps_the_meaning_of_types() -> None:
    names = ["dictionary", "fixed binary", "half", "decimal", "timestamp"]
    table = pa.table({name: CASES[name][0].slice(0, 1) for name in names})
    assert plain_table(table) is table
    views = plain_table(pa.table({"x": CASES["dictionary of views"][0]}))
    assert views.schema.types == [pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize(
    ("rows", "type_", "numbers", "offsets", "length"),
    [
        ([[1, 2], None, [3]], pa.list_(pa.int8()), [1, 2, 3], [0, 2, 2, 3], None),
        ([[[1, 2], [3]], [], [[4]]], pa.list_(pa.list_(pa.float64())), [1, 2, 3, 4], [0, 3, 3, 4], None),
        ([[[1, 2], [3, 4]]], pa.list_(pa.list_(pa.float32(), 2), 2), [1, 2, 3, 4], [0, 4], 4),
        ([[True, False]], pa.list_(pa.bool_(), 2), [1, 0], [0, 2], 2),
    ],
)
def test_lists_of_any_depth_are_flattened(
    rows: list[Any], type_: pa.DataType, numbers: list[float], offsets: list[int], length: int | None
) -> None:
    column = pa.chunked_array([pa.array(rows, type_)])
    flat, ends, valid = flat_vectors(column)
    assert flat.dtype == np.float32
    assert (flat.tolist(), ends.tolist()) == (numbers, offsets)
    assert valid.tolist() == [row is not None for row in rows]
    assert vector_length(type_) == length


TEXT_TYPES: dict[str, Any] = {
    "string": pa.array,
    "large string": lambda values: pa.array(values, pa.large_string()),
    "string view": lambda values: pa.array(values, pa.string_view()),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
    "binary": lambda values: pa.array([value.encode() for value in values], pa.binary()),
    "binary view": lambda values: pa.array([value.encode() for value in values], pa.binary_view()),
    "fixed binary": lambda values: pa.array([value.encode().ljust(5, b"\0") for value in values], pa.binary(5)),
    "json": lambda values: extension(pa.json_(), values),
    "run ends": lambda values: pc.run_end_encode(pa.array(values)),
}
NUMBER_TYPES: dict[str, Any] = {
    "int8": pa.int8(),
    "uint64": pa.uint64(),
    "half": pa.float16(),
    "decimal": pa.decimal128(6, 2),
    "whole decimal": pa.decimal256(60, 0),
    "timestamp": pa.timestamp("ns", "UTC"),
    "date": pa.date32(),
    "duration": pa.duration("s"),
}


@pytest.mark.parametrize(
    ("door", "type_name"),
    [(door, name) for door in DOORS for name in TEXT_TYPES if (door, name) != ("parquet", "run ends")],
)
def test_text_of_every_type_is_read_in_every_role(tmp_path: Path, door: str, type_name: str) -> None:
    columns = {role: TEXT_TYPES[type_name](values) for role, values in VALUES.items()}
    samples = read_samples(open_dataset(write_rows(columns, door, tmp_path / "d")), seed=0, test_fraction=0.2)
    assert samples.sample_id.tolist() == VALUES["id"]
    assert [samples.class_names[label] for label in samples.label] == VALUES["label"]
    assert samples.split.tolist() == VALUES["split"]
    assert samples.group is not None
    assert samples.group.tolist() == VALUES["group"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("type_name", NUMBER_TYPES)
def test_numbers_of_every_type_are_read_in_every_role(tmp_path: Path, door: str, type_name: str) -> None:
    type_ = NUMBER_TYPES[type_name]
    numbers = {role: [int(value) for value in VALUES[role]] for role in ("id", "label", "group")}
    width = pa.int32() if type_name == "date" else pa.int64()
    is_cast = pa.types.is_temporal(type_)
    columns = {
        role: pa.array(values, width).cast(type_) if is_cast else pa.array([_number(v, type_) for v in values], type_)
        for role, values in numbers.items()
    }
    dataset = open_dataset(write_rows(columns, door, tmp_path / "d"), DataConfig(group="group"))
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    assert len(set(samples.sample_id)) == N
    assert samples.group is not None
    for values, names in ((samples.label, numbers["label"]), (samples.group, numbers["group"])):
        assert len(set(zip(values.tolist(), names, strict=True))) == len(set(names))
    if not is_cast:
        assert samples.class_names == ("1", "2")


def _number(value: int, type_: pa.DataType) -> Any:
    return Decimal(value) if pa.types.is_decimal(type_) else np.float16(value) if type_ == pa.float16() else value


@pytest.mark.parametrize("door", DOORS)
def test_ids_of_random_bytes_are_written_in_hexadecimal(tmp_path: Path, door: str) -> None:
    ids = [bytes([200 + row, 3]) for row in range(N)]
    columns = {"id": pa.array(ids, pa.binary(2)), "label": pa.array(VALUES["label"])}
    samples = read_samples(open_dataset(write_rows(columns, door, tmp_path / "d")), seed=0, test_fraction=0.2)
    assert samples.sample_id.tolist() == [name.hex() for name in ids]


VECTOR_TYPES = [
    pa.list_(pa.float16()),
    pa.large_list(pa.decimal128(9, 3)),
    pa.list_view(pa.float64()),
    pa.list_(pa.bool_(), 2),
    pa.fixed_shape_tensor(pa.float32(), [2]),
    pa.list_(pa.list_(pa.float32(), 1), 2),
]


@pytest.mark.parametrize(
    ("door", "type_"),
    [(door, type_) for door in DOORS for type_ in VECTOR_TYPES if door == "saved" or not pa.types.is_list_view(type_)],
    ids=str,
)
def test_vectors_of_every_type_are_read(tmp_path: Path, door: str, type_: pa.DataType) -> None:
    storage = getattr(type_, "storage_type", type_)
    number = {pa.float16(): np.float16, pa.decimal128(9, 3): Decimal, pa.bool_(): bool}.get(storage.value_type, float)
    wrap = (lambda value: [float(value)]) if storage.value_type == pa.list_(pa.float32(), 1) else number
    values = pa.array([[wrap(row % 2), wrap(1)] for row in range(N)], storage)
    array = values if storage == type_ else pa.ExtensionArray.from_storage(type_, values)
    columns = {"id": pa.array(VALUES["id"]), "label": pa.array(VALUES["label"]), "v": array}
    modality = ("v=v:features", "a=a") if "1]>" in str(type_) or wrap is not number else ()
    dataset = open_dataset(write_rows(columns, door, tmp_path / "d"), DataConfig(modality=modality))
    vectors = next(item for item in dataset.modalities if item.name == "v")
    assert (vectors.kind, vectors.length) == ("features", 2)
    rows = pa.concat_tables([dataset.read(shard) for shard in dataset.shards])
    flat, _, _ = flat_vectors(rows["v"])
    assert flat.reshape(N, 2).tolist() == [[row % 2, 1] for row in range(N)]
