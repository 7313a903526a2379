"""Row tables of all parts: cells of some rows, columns part by part, and groups by the hashes of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.label_columns import ColumnParts
from ..dataset.labels import coded_part
from ..hashing import hash_ids, hash_rank
from ..row_arrays import (
    NUM_PIECES,
    gather,
    index_type,
    piece_of,
    positions_of,
    slices,
    sorted_pieces,
    stable_argsort,
)

ReadTable = Callable[[int], pa.Table]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """The row tables of all parts, read when they are needed."""

    read_rows: ReadTable
    num_parts: int

    def ids_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return the ids of some rows, in their order."""
        return read_cells(self.read_rows, self.num_parts, "id", rows)

    def groups_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return the names of the groups of some rows, in their order."""
        return read_cells(self.read_rows, self.num_parts, "group", rows)

    def hash_rows(self, rows: NDArray[np.integer[Any]], *, seed: int, purpose: str) -> NDArray[np.uint64]:
        """Return hash(seed, purpose, id) of distinct rows (b,), in their order, with 4 bytes a row besides the result.

        The seed is that of the row tables.
        """
        num_rows = sum(self.read_rows(index).num_rows for index in range(self.num_parts))
        hashes, position = np.zeros(len(rows), np.uint64), positions_of(rows, num_rows)
        for part, table in located_tables(self.read_rows, self.num_parts):
            inside = np.flatnonzero(position[part] >= 0)
            hashes[position[part][inside]] = table[f"hash {purpose}"].to_numpy()[inside]
        return hashes


def located_tables(read: ReadTable, num_parts: int) -> Iterator[tuple[slice, pa.Table]]:
    """Yield the table of each part with its rows."""
    first = 0
    for index in range(num_parts):
        table = read(index)
        yield slice(first, first + table.num_rows), table
        first += table.num_rows


def read_cells(read_rows: ReadTable, num_parts: int, name: str, rows: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
    """Return the texts of a column in some rows, in their order."""
    cells = np.empty(len(rows), dtype=object)
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    first = 0
    for index in range(num_parts if len(rows) else 0):
        if first > ordered[-1]:
            break
        column = read_rows(index)[name]
        start, stop = np.searchsorted(ordered, np.array([first, first + len(column)], ordered.dtype))
        if stop > start:
            cells[order[start:stop]] = column.take(pa.array(ordered[start:stop] - first)).to_pylist()
        first += len(column)
    return cells


def read_hashes(read_rows: ReadTable, num_parts: int, purpose: str) -> NDArray[np.uint64]:
    """Return the hashes of all rows (n,), a part at a time."""
    num_rows = sum(read_rows(index).num_rows for index in range(num_parts))
    hashes = np.empty(num_rows, np.uint64)
    for part, table in located_tables(read_rows, num_parts):
        hashes[part] = table[f"hash {purpose}"].to_numpy()
    return hashes


def sorted_rows(
    read: ReadTable, num_parts: int, name: str, num_rows: int
) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.uint64]]]:
    """Yield all rows in the order of a column of words, and these, in pieces; equal ones in the order of the rows."""
    piece_of_row = np.empty(num_rows, np.uint8)
    for part, table in located_tables(read, num_parts):
        piece_of_row[part] = piece_of(table[name].to_numpy(), num_rows)
    for piece in range(NUM_PIECES):
        rows, words = [], []
        for part, table in located_tables(read, num_parts):
            inside = np.flatnonzero(piece_of_row[part] == piece)
            words.append(table[name].to_numpy()[inside])
            rows.append((inside + part.start).astype(index_type(num_rows)))
        own_rows, own_words = np.concatenate(rows), np.concatenate(words)
        if len(own_rows):
            order = stable_argsort(own_words)
            yield own_rows[order], own_words[order]


def columns_of_parts(read_rows: ReadTable, num_parts: int, num_rows: int) -> Callable[[str], ColumnParts]:
    """Return a function that returns a column of all parts, of the type that holds the values of all."""

    def column(name: str) -> ColumnParts:
        schemas = [read_rows(index).select([name]).schema.remove_metadata() for index in range(num_parts)]
        empty = pa.unify_schemas(schemas, promote_options="permissive").empty_table()

        def read(index: int) -> pa.ChunkedArray:
            table = read_rows(index).select([name]).replace_schema_metadata()
            return pa.concat_tables([empty, table], promote_options="permissive")[name]

        return ColumnParts(num_rows=num_rows, num_parts=num_parts, read=read)

    return column


def code_groups(column: ColumnParts) -> tuple[NDArray[np.int32], int]:
    """Return the index of each row's group (n,), in the order of the first rows of the groups, and their number.

    Groups may be as many as rows: names are told apart by 128 bits of hashes, those of each part's distinct names.
    """
    codes = np.empty(column.num_rows, np.int32)
    hashes: list[list[NDArray[np.uint64]]] = [[], []]
    num_names = 0
    for rows, part in column.located():
        names, own = coded_part(part)
        codes[rows] = own + num_names
        num_names += len(names)
        for number in (0, 1):
            hashes[number].append(hash_ids(names, seed=number, purpose="group"))
    high, low = (np.concatenate([np.zeros(0, np.uint64), *hashes.pop(0)]) for _ in (0, 1))
    code_of_name = np.arange(num_names, dtype=np.int32)  # first the first name that is equal to each
    for piece in sorted_pieces(high):
        if not (np.diff(high[piece]) == 0).any():
            continue
        piece = piece[np.lexsort((piece, low[piece], high[piece]))]
        is_first = np.r_[True, (np.diff(high[piece]) != 0) | (np.diff(low[piece]) != 0)]
        code_of_name[piece] = piece[np.maximum.accumulate(np.where(is_first, np.arange(len(piece)), 0))]
    del high, low
    code_of_first, num_groups = np.empty(num_names, np.int32), 0
    for rows in slices(num_names):
        is_first = code_of_name[rows] == np.arange(rows.start, rows.stop)
        code_of_first[rows] = num_groups - 1 + np.cumsum(is_first)
        num_groups += int(is_first.sum())
    code_of_name = gather(code_of_first, code_of_name, out=code_of_name)
    return gather(code_of_name, codes, out=codes), num_groups


def read_groups(read_rows: ReadTable, group: NDArray[np.int32], num_groups: int) -> Iterator[list[str]]:
    """Yield the names of the groups (g,), of each part those whose first row it has."""
    first, num_read, index = 0, 0, 0
    while num_read < num_groups:
        column = read_rows(index)["group"]
        codes = group[first : first + len(column)]
        is_first = codes > np.maximum.accumulate(np.r_[np.int32(num_read - 1), codes])[:-1]
        names = column.take(pa.array(np.flatnonzero(is_first))).to_pylist()
        yield names
        first, num_read, index = first + len(column), num_read + len(names), index + 1


def hash_groups(
    read_rows: ReadTable, group: NDArray[np.int32], num_groups: int, *, seed: int, purpose: str
) -> NDArray[np.uint64]:
    """Return hash(seed, purpose, name) of each group (g,)."""
    hashes, start = np.empty(num_groups, np.uint64), 0
    for names in read_groups(read_rows, group, num_groups):
        hashes[start : start + len(names)] = hash_rank(names, seed=seed, purpose=purpose)
        start += len(names)
    return hashes
