"""Rows spread over a source, from which the kinds of its columns are inferred.

The first rows are not enough: the sources that a dataset is joined from often lack a modality each, and are joined one
after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...arrow import dataset_schema, dataset_table
from ...errors import DatasetError
from ...storage import read_batches, read_footer
from ..columns import SPLIT, with_split
from ..modalities import holds_media

SAMPLE_ROWS, MEDIA_ROWS = 64, 16  # rows without media, and with; ours: 64 pictures of 1 MB would take 64 MB
_MIN_VALUES = 8  # of a column that the sample holds, if the source does
_MAX_EXTRA_ROWS = 1_024  # for columns with fewer values: of 10,000 sparse columns only the first are looked up
_MAX_VALID = 1 << 20  # rows with a value among which extra rows are chosen
_NUM_GROUPS = 8  # row groups of Parquet that are opened
_SAMPLE_BYTES = 1 << 27  # of them together, uncompressed: 0.1 to 0.3 s
_MAX_SEARCHED = 1_000  # row groups whose statistics are read for a column that is null in the sample
_SEARCH_ROWS = 1_024  # per batch; nulls take no space
_BUFFER_BYTES = 1 << 20
_SEED = 0


def spread_positions(num_rows: int, count: int) -> list[int]:
    """Return `count` of the numbers 0 .. num_rows - 1, ascending: the first and last quarter, and random ones between.

    All are returned if there are at most `count`. The same arguments give the same numbers.
    """
    if num_rows <= count:
        return list(range(num_rows))
    edge = max(1, count // 4)
    num_random = max(0, count - 2 * edge)
    between = np.random.default_rng([_SEED, num_rows]).choice(num_rows - 2 * edge, num_random, replace=False) + edge
    return sorted({*range(edge), *between.tolist(), *range(num_rows - edge, num_rows)})[:count]


def sample_rows(rows: pa.Table) -> pa.Table:
    """Return a sample of rows in memory, in their order."""
    return take_rows(rows, sample_positions([rows])[0]).combine_chunks()


def sample_positions(tables: Sequence[pa.Table]) -> list[list[int]]:
    """Return the positions, in each table, of rows spread over tables of the same columns, in memory or mapped into it.

    Columns with few values among them get the positions of more rows, if there are any that are not null.
    """
    ends = np.cumsum([rows.num_rows for rows in tables])
    count = sample_size(tables[0].schema)
    chosen = set(spread_positions(int(ends[-1]), count))
    sample = [take_rows(rows, places) for rows, places in zip(tables, _by_table(chosen, ends), strict=True)]
    for index, type_ in enumerate(tables[0].schema.types):  # not by name, which may be repeated
        columns = [rows.column(index) for rows in tables]
        num_values = sum(len(rows) - rows.column(index).null_count for rows in sample)
        if is_scalar(type_) or num_values >= _MIN_VALUES or len(chosen) >= count + _MAX_EXTRA_ROWS:
            continue
        if num_values < sum(len(column) - column.null_count for column in columns):
            valid = _valid_positions(columns)
            chosen.update(valid[index] for index in spread_positions(len(valid), _MIN_VALUES))
    return _by_table(chosen, ends)


def _by_table(positions: Iterable[int], ends: NDArray[np.int64]) -> list[list[int]]:
    """Return the positions within each table of positions within all tables, given where the tables end."""
    by_table: list[list[int]] = [[] for _ in ends]
    for position in sorted(positions):
        table = int(np.searchsorted(ends, position, side="right"))
        by_table[table].append(position - (int(ends[table - 1]) if table else 0))
    return by_table


def take_rows(rows: pa.Table, positions: Sequence[int]) -> pa.Table:
    """Return these rows without a copy. Table.take would first copy all chunks of the table."""
    return pa.concat_tables([rows.slice(0, 0), *(rows.slice(position, 1) for position in positions)])


def sample_size(schema: pa.Schema) -> int:
    """Return the number of rows of a sample."""
    return MEDIA_ROWS if any(map(holds_media, dataset_schema(schema).types)) else SAMPLE_ROWS


def is_scalar(type_: pa.DataType) -> bool:
    """Return whether a column of this type cannot be a modality, whatever its values are."""
    is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)
    return bool(is_number or pa.types.is_null(type_))


def _valid_positions(columns: Iterable[pa.ChunkedArray]) -> list[int]:
    """Return the positions of values that are not null in columns of consecutive tables, at most about a million."""
    positions: list[int] = []
    start = 0
    for chunk in (chunk for column in columns for chunk in column.chunks):
        if chunk.null_count < len(chunk):
            positions += (start + np.flatnonzero(pc.is_valid(chunk).to_numpy(zero_copy_only=False))).tolist()
        if len(positions) >= _MAX_VALID:
            break
        start += len(chunk)
    return positions


RowGroup = tuple[str, int, str | None]  # path, number of the row group, value of the column `split`


def sample_row_groups(groups: Sequence[RowGroup], schema: pa.Schema) -> pa.Table:
    """Return rows of up to eight row groups of Parquet files: the first, the last, and random ones between.

    Of a row group above its share of 128 MiB only the first rows are read, since Parquet cannot skip rows. A column
    that is null in all of these is looked up in other row groups, by their statistics; these rows hold it alone.
    """
    chosen = [groups[index] for index in spread_positions(len(groups), _NUM_GROUPS)]
    rows_of_group = -(-sample_size(schema) // max(1, len(chosen)))
    parts = [schema.empty_table()]
    for path, number, split in chosen:
        first = _first_rows(path, number, max_bytes=_SAMPLE_BYTES // len(chosen))
        positions = spread_positions(first.num_rows, rows_of_group)
        rows = take_rows(first, positions).combine_chunks()  # a copy: slices would keep all rows of the group
        parts.append(with_split(dataset_table(rows), split))
    sample = pa.concat_tables(parts, promote_options="permissive")
    searched = [groups[index] for index in spread_positions(len(groups), _MAX_SEARCHED)]
    for field in schema:
        if field.name != SPLIT and not is_scalar(field.type) and sample[field.name].null_count == sample.num_rows:
            parts += _rows_with(field.name, searched)
    return (
        pa.concat_tables(parts, promote_options="permissive").combine_chunks().replace_schema_metadata(schema.metadata)
    )


def _first_rows(path: str, number: int, *, max_bytes: int) -> pa.Table:
    """Read the first rows of a row group, all if they have at most `max_bytes`."""
    group = read_footer(path, error=DatasetError).row_group(number)
    is_large = group.total_byte_size > max_bytes
    num_rows = max(1, group.num_rows * max_bytes // group.total_byte_size) if is_large else group.num_rows
    batches = read_batches(path, error=DatasetError, rows=num_rows, row_groups=[number], buffer_bytes=_BUFFER_BYTES)
    with closing(batches):
        return next(batches)


def _rows_with(column: str, groups: Iterable[RowGroup]) -> list[pa.Table]:
    """Return the first values of a column that are not null, as a table of this column alone; [] if there are none."""
    for path, number in _groups_with_values(column, groups):
        batches = read_batches(
            path,
            error=DatasetError,
            rows=_SEARCH_ROWS,
            columns=[column],
            row_groups=[number],
            buffer_bytes=_BUFFER_BYTES,
        )
        with closing(batches):
            for batch in batches:
                if batch[column].null_count < batch.num_rows:
                    return [dataset_table(take_rows(batch, _valid_positions([batch[column]])[:_MIN_VALUES]))]
    return []


def _groups_with_values(column: str, groups: Iterable[RowGroup]) -> Iterator[tuple[str, int]]:
    """Yield the row groups in which a column has values by their statistics, and eight without statistics."""
    num_unknown, footer, last_path = 0, None, None
    for path, number, _ in groups:
        if path != last_path:
            footer, last_path = read_footer(path, error=DatasetError), path
        assert footer is not None
        group = footer.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        statistics = [chunk.statistics for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
        if all(entry is not None and entry.has_null_count for entry in statistics):
            if any(entry.num_values for entry in statistics):  # of the statistics: values without nulls
                yield path, number
        elif num_unknown < _NUM_GROUPS:
            num_unknown += 1
            yield path, number
