"""Arrow types: conversion of the types that files may have to those that mmaudit reads.

`plain_table` changes how values are stored, not what they are: views (which Polars writes by default), run ends and
extension types become plain columns, which every Arrow function supports. `dataset_table` also decodes dictionaries,
and converts fixed-size binary, half floats, decimals, dates and times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

_INT64_DIGITS, _FLOAT64_DIGITS = 18, 15  # decimals of so many digits are exact as int64 and float64
_VIEWS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}

TypeRule = Callable[[pa.DataType], pa.DataType]


def plain_table(table: pa.Table) -> pa.Table:
    """Convert views, run ends and extension types to plain columns; dictionaries stay, with plain values."""
    return _convert_table(table, plain_type)


def dataset_table(table: pa.Table) -> pa.Table:
    """Convert all columns to the types that datasets are read in; see dataset_type."""
    return _convert_table(table, dataset_type)


def dataset_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of `dataset_table`, with its metadata."""
    fields = [field.with_type(dataset_type(field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def plain_type(type_: pa.DataType) -> pa.DataType:
    """Return the type that `plain_table` converts a type to, itself if nothing is to be done."""
    if type_ in _VIEWS:
        return _VIEWS[type_]
    if isinstance(type_, pa.BaseExtensionType):
        return pa.string() if _is_uuid(type_) else plain_type(_storage_type(type_))
    if pa.types.is_run_end_encoded(type_):
        return plain_type(type_.value_type)
    if pa.types.is_dictionary(type_):
        return pa.dictionary(type_.index_type, plain_type(type_.value_type), type_.ordered)
    return _map_nested(type_, plain_type)


def dataset_type(type_: pa.DataType) -> pa.DataType:
    """Return the type that a column of a dataset is read in.

    Dictionaries become their values, fixed-size binary becomes binary, half floats float32, dates and times strings.
    Decimals become integers or floats where these are exact, else strings; within lists, which are vectors, floats.
    """
    type_ = plain_type(type_)
    if pa.types.is_dictionary(type_):
        return dataset_type(type_.value_type)
    if pa.types.is_fixed_size_binary(type_):
        return pa.binary()
    if pa.types.is_float16(type_):
        return pa.float32()
    if pa.types.is_decimal(type_):
        if type_.scale <= 0 and type_.precision - type_.scale <= _INT64_DIGITS:
            return pa.int64()
        return pa.float64() if type_.precision <= _FLOAT64_DIGITS else pa.string()
    if pa.types.is_duration(type_):
        return pa.int64()
    if pa.types.is_temporal(type_) or type_ == pa.month_day_nano_interval():
        return pa.string()
    return _map_nested(type_, _element_type)


def small_offsets(schema: pa.Schema) -> pa.Schema:
    """Return the schema with strings, bytes and lists of 32-bit offsets: large ones hold the same values."""
    return pa.schema([field.with_type(_small_type(field.type)) for field in schema])


def _small_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(type_):
        return pa.list_(type_.value_field.with_type(_small_type(type_.value_type)))
    return {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}.get(type_, _map_nested(type_, _small_type))


def is_list(type_: pa.DataType) -> bool:
    """Return whether a plain type is a list of any number, or a fixed number, of elements."""
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _element_type(type_: pa.DataType) -> pa.DataType:
    return pa.float64() if pa.types.is_decimal(type_) else dataset_type(type_)


def _map_nested(type_: pa.DataType, rule: TypeRule) -> pa.DataType:
    """Apply a rule to the elements of a list or the fields of a struct; all other types are returned unchanged."""
    if pa.types.is_struct(type_):
        fields = [type_.field(index) for index in range(type_.num_fields)]
        return pa.struct([field.with_type(rule(field.type)) for field in fields])
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(rule(type_.value_type)), type_.list_size)
    if pa.types.is_list(type_) or pa.types.is_list_view(type_):
        return pa.list_(type_.value_field.with_type(rule(type_.value_type)))
    if pa.types.is_large_list(type_) or pa.types.is_large_list_view(type_):
        return pa.large_list(type_.value_field.with_type(rule(type_.value_type)))
    return type_


def _is_uuid(type_: pa.DataType) -> bool:
    return getattr(type_, "extension_name", "") == "arrow.uuid"


def _storage_type(type_: pa.DataType) -> pa.DataType:
    """Return the storage of an extension type; of a tensor of several dimensions nested lists, which keep its shape."""
    if not isinstance(type_, pa.FixedShapeTensorType) or len(type_.shape) < 2:
        return type_.storage_type
    nested = type_.value_type
    for size in reversed(type_.shape):
        nested = pa.list_(nested, size)
    return nested


def _convert_table(table: pa.Table, rule: TypeRule) -> pa.Table:
    for index, field in enumerate(table.schema):
        target = rule(field.type)
        if target != field.type:
            chunks = [_convert(chunk, target) for chunk in table.column(index).chunks]
            table = table.set_column(index, field.with_type(target), pa.chunked_array(chunks, target))
    return table


def _convert(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Convert an array to the type that a rule gives for its own."""
    type_ = array.type
    if type_ == target:
        return array
    if isinstance(type_, pa.BaseExtensionType):
        return _convert_extension(array, target)
    if pa.types.is_run_end_encoded(type_):
        return _convert(pc.run_end_decode(array), target)
    if pa.types.is_dictionary(type_):
        value_type = target.value_type if pa.types.is_dictionary(target) else target
        values = _convert(array.dictionary, value_type)
        converted = pa.DictionaryArray.from_arrays(array.indices, values, ordered=type_.ordered)
        return converted if pa.types.is_dictionary(target) else converted.dictionary_decode()
    if pa.types.is_struct(type_):
        fields = [target.field(index) for index in range(target.num_fields)]
        children = [_convert(array.field(index), field.type) for index, field in enumerate(fields)]
        return pa.StructArray.from_arrays(children, fields=fields, mask=array.is_null())
    if pa.types.is_list(target) or pa.types.is_large_list(target):
        return _convert_list(array, target)
    return _cast(array, target)


def _convert_extension(array: pa.Array, target: pa.DataType) -> pa.Array:
    if _is_uuid(array.type):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], target)
    storage = array.storage
    if isinstance(array.type, pa.FixedShapeTensorType) and len(array.type.shape) > 1:
        return pa.array([_reshape(row, array.type.shape) for row in storage.to_pylist()], target)
    return _convert(storage, target)


def _reshape(numbers: list[float] | None, shape: list[int]) -> object:
    return None if numbers is None else np.array(numbers, dtype=object).reshape(shape).tolist()


def _convert_list(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Convert lists and list views, whose elements need not be in order, by the lengths and elements of the rows."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offset_type = np.int32 if pa.types.is_list(target) else np.int64
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(offset_type)
    values = _convert(array.flatten(), target.value_type)
    list_type = pa.ListArray if pa.types.is_list(target) else pa.LargeListArray
    return list_type.from_arrays(pa.array(offsets), values, type=target, mask=array.is_null())


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast values; what Arrow cannot cast is converted by way of Python."""
    if pa.types.is_timestamp(array.type) and array.type.tz is not None:
        array = array.cast(pa.timestamp(array.type.unit))  # in UTC: Arrow fails on names of zones that it does not know
    if array.type == pa.month_day_nano_interval():
        return pa.array([None if value is None else str(tuple(value)) for value in array.to_pylist()], target)
    try:
        return array.cast(target)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return pa.array(array.to_pylist(), target)


def flat_vectors(column: pa.ChunkedArray) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the numbers of a column of lists of any depth, row after row, with the rows' offsets and validity.

    numbers: float32 (t,), null as NaN. offsets: (n + 1,) into the numbers. validity: (n,), False where a row is null.
    Integers above 2^24 are rounded.
    """
    cells = column.combine_chunks()
    cells = cells.cast(_large_lists(cells.type), safe=False)
    offsets, valid = cells.offsets.to_numpy(), cells.is_valid().to_numpy(zero_copy_only=False)
    values = cells.values
    while is_list(values.type):
        offsets, values = values.offsets.to_numpy()[offsets], values.values
    return values.to_numpy(zero_copy_only=False), offsets, valid


def _large_lists(type_: pa.DataType) -> pa.DataType:
    return pa.large_list(_large_lists(type_.value_type)) if is_list(type_) else pa.float32()


def vector_length(type_: pa.DataType) -> int | None:
    """Return how many numbers lists of fixed sizes hold; None if a size is not fixed."""
    if not is_list(type_):
        return 1
    inner = vector_length(type_.value_type)
    return type_.list_size * inner if pa.types.is_fixed_size_list(type_) and inner is not None else None


_MAX_ROWS_PER_BYTE = 256  # of a Parquet file: ascending integers, which compress best, have about 100


def check_row_number(num_rows: int, stated_rows: int) -> None:
    """Raise ValueError where pages and footer differ in the number of rows, since Arrow then silently returns fewer."""
    if num_rows != stated_rows:
        raise ValueError(f"the footer states {stated_rows:,} rows, the pages hold {num_rows:,}")


def check_footer(footer: pq.FileMetaData, *, size: int) -> None:
    """Raise ValueError for row counts in a footer that contradict each other or the size of the file in bytes."""
    group_rows = [footer.row_group(row_group).num_rows for row_group in range(footer.num_row_groups)]
    if min(group_rows, default=0) < 0 or sum(group_rows) != footer.num_rows:
        raise ValueError(f"the footer states {footer.num_rows:,} rows, its row groups {sum(group_rows):,}")
    if footer.num_rows > size * _MAX_ROWS_PER_BYTE:
        raise ValueError(f"the footer states {footer.num_rows:,} rows, the file has only {size:,} bytes")
