"""Plans of csv, jsonl and Parquet files: a sample of the rows and their shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from ...arrow import dataset_table, small_offsets
from ...errors import DatasetError
from ...remote.paths import AnyPath, RemotePath, source_path
from ...remote.requests import thread_pool
from ...storage import check_regular, read_footer, read_table
from ..columns import SPLIT, with_split
from ..modalities import holds_files, holds_media
from ..not_read import NotRead
from . import Plan
from .csv_rows import read_csv_rows
from .rows import read_json_lines, read_parquet_schema, row_group_shards
from .sample import sample_row_groups, sample_rows
from .sources import (
    check_fetched,
    common_folder,
    find_files,
    list_ahead,
    match_files,
    match_paths,
    relative,
    sort_paths,
    split_of_path,
    splits_of,
    subfolders,
)

SAVED_NAMES = ("dataset_dict.json", "state.json")  # written by save_to_disk of `datasets`; see saved.py
METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLE_SUFFIXES = (".parquet", *_TEXT_SUFFIXES)
OTHER_FORMS = (
    "DATA may also be folders named by class, a Parquet file or glob, a dataset saved by `datasets`, WebDataset tars, "
    "or a name on the Hugging Face hub"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShard:
    """A shard of rows in memory."""

    index: int
    first: int
    num_rows: int
    rows: pa.Table
    location: None = None

    def read(self, columns: list[str]) -> pa.Table:
        """Return these columns of the rows."""
        return self.rows.select(columns)


def plan_tables(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan a table file, a glob of such, or the metadata files or tables named after splits of a folder."""
    paths = find_tables(data)
    return plan_table_files(paths, shard_rows=shard_rows) if paths else None


def plan_parquet_folder(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan a folder of Parquet files, also in subfolders named after splits, and in the layouts of the hub."""
    folder = source_path(data)
    paths = find_files(folder, [".parquet"]) if folder.is_dir() else []
    return plan_table_files(paths, shard_rows=shard_rows) if paths else None


def plan_table_files(paths: Sequence[AnyPath], *, shard_rows: int) -> Plan:
    """Plan the rows of table files; names of files and folders that state different splits become the column `split`.

    Relative paths start from the common folder of the files, after those of each file were prefixed with its own.
    """
    check_fetched(paths)
    root = common_folder(paths)
    return plan_files(root, paths, shard_rows=shard_rows, splits=splits_of(paths, root=root))


def find_tables(data: str) -> list[AnyPath]:
    """Return the table files that `data` means, sorted; [] if it means none, DatasetError if their formats differ.

    `data` is a table file, a glob or brace pattern of such, or a folder with a metadata file, with subfolders that each
    have one, or with tables named after splits (train.csv and test.csv). A folder of Parquet files is another format.
    """
    path = source_path(data)
    if path.is_dir():
        return [] if any((path / name).is_file() for name in SAVED_NAMES) else _find_tables_in(path)
    if path.is_file():
        return [path] if path.suffix in TABLE_SUFFIXES else []
    return _check_one_format(match_files(data, TABLE_SUFFIXES), source=data)


def _find_tables_in(folder: AnyPath) -> list[AnyPath]:
    """Return the metadata files of a folder or of its subfolders, else the tables named after different splits."""
    if metadata := _find_metadata(folder):
        return [metadata]
    list_ahead(subfolders(folder))
    if tables := [table for inner in subfolders(folder) if (table := _find_metadata(inner))]:
        return tables
    split_of = {path: split_of_path(relative(path, folder)) for path in find_files(folder, _TEXT_SUFFIXES)}
    paths = [path for path, split in split_of.items() if split]
    return _check_one_format(paths, source=str(folder)) if len({split_of[path] for path in paths}) > 1 else []


def _find_metadata(folder: AnyPath) -> AnyPath | None:
    """Return the metadata file of a folder, None if it has none; DatasetError if it has several."""
    paths = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(paths) > 1:
        raise DatasetError(f"{folder} has both {paths[0].name} and {paths[1].name}: pass the path of one of them")
    return paths[0] if paths else None


def _check_one_format(paths: list[AnyPath], *, source: str) -> list[AnyPath]:
    """Return table files of one format; DatasetError if there are several, which may hold the same rows."""
    for path in paths:
        if path.suffix != paths[0].suffix:
            raise DatasetError(f"{source} matches {paths[0].name} and {path.name}: pass a glob of files of one format")
    return paths


def source_error(data: str) -> DatasetError:
    """Return the error of a source that no reader recognises, which states what DATA may be."""
    path = source_path(data)
    if path.is_dir():
        return DatasetError(
            f"{data} has none of {', '.join(METADATA_NAMES)}: "
            "write one with a column file_name (or NAME_file_name for each modality) and a column label; "
            f"{OTHER_FORMS}"
        )
    if path.is_file():
        return DatasetError(f"{data} is neither a folder nor a {', '.join(TABLE_SUFFIXES)} or .tar file")
    if path.exists():
        return DatasetError(f"{data} is neither a folder nor a regular file")
    if not (matches := match_paths(data)):
        return DatasetError(f"no such folder or file: {data}")
    return DatasetError(
        f"{data} matches {matches[0].name}; a glob must match files of one format: "
        f"{', '.join(TABLE_SUFFIXES)} or .tar; {OTHER_FORMS}"
    )


def plan_files(
    root: AnyPath, paths: Sequence[AnyPath], *, shard_rows: int, splits: Sequence[str | None] | None = None
) -> Plan:
    """Plan the rows of these files; Parquet files with media or vectors are read by shard, all others at once.

    `splits` holds one split per file: the value of the column `split`, unless the rows already have that column.
    """
    if all(path.suffix == ".parquet" for path in paths):
        if isinstance(root, RemotePath):  # footers are then at hand
            list(thread_pool().map(lambda path: read_footer(path, error=DatasetError), paths))
        schemas = [read_parquet_schema(path) for path in paths]
        if any(pa.types.is_nested(type_) or holds_media(type_) for type_ in schemas[0].types):
            _check_same_columns(paths, schemas)
            splits = None if SPLIT in schemas[0].names else splits
            shards = row_group_shards(paths, media_rows=shard_rows, splits=splits)
            groups = [(shard.path, shard.row_group, shard.split) for shard in shards if not shard.start]
            schema = with_split(schemas[0].empty_table(), splits[0] if splits else None).schema
            folders = tuple(sort_paths({path.parent for path in paths}))
            return Plan(root=root, sample=sample_row_groups(groups, schema), shards=tuple(shards), folders=folders)
    return plan_rows(root, read_tables(paths, root=root, splits=splits), shard_rows=shard_rows)


def plan_rows(root: AnyPath, rows: pa.Table, *, shard_rows: int, not_read: tuple[NotRead, ...] = ()) -> Plan:
    """Plan rows in memory."""
    rows = dataset_table(rows)
    shards = tuple(memory_shards(rows, shard_rows=shard_rows))
    return Plan(root=root, sample=sample_rows(rows), shards=shards, not_read=not_read)


def read_tables(paths: Sequence[AnyPath], *, root: AnyPath, splits: Sequence[str | None] | None = None) -> pa.Table:
    """Read and concatenate files; a column without values takes its type from another file.

    Files of one folder have the same columns. In files of several folders paths are prefixed, so that they start from
    `root`, and a column that a file does not have is null there.
    """
    parts = [read_rows(path) for path in paths]
    if len({path.parent for path in paths}) == 1:
        _check_same_columns(paths, [part.schema for part in parts])
    else:
        prefixes = [relative(path.parent, root).as_posix() for path in paths]
        parts = [_prefix_paths(part, prefix) for part, prefix in zip(parts, prefixes, strict=True)]
    named = zip(parts, splits or [None] * len(parts), strict=True)
    parts = [with_split(part, None if SPLIT in part.column_names else split) for part, split in named]
    return concat_rows(parts, source=str(root))


def read_rows(path: AnyPath) -> pa.Table:
    """Read a csv, jsonl or Parquet file; DatasetError with file, line (if it has lines) and reason."""
    try:
        check_regular(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix in (".csv", ".tsv"):
        return read_csv_rows(path)
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    return dataset_table(read_table(path, error=DatasetError))


def concat_rows(parts: Sequence[pa.Table], *, source: str) -> pa.Table:
    """Concatenate tables; missing columns become null. DatasetError if the types of a column differ."""
    if len(parts) == 1:
        return parts[0]
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{source}: the parts have columns of different types: {reason}") from error


def memory_shards(rows: pa.Table, *, shard_rows: int) -> list[MemoryShard]:
    """Divide rows in memory into shards of `shard_rows` rows; each is a copy, so that only its rows are pickled."""
    shards = []
    for index, start in enumerate(range(0, rows.num_rows, shard_rows)):
        part = rows.take(pa.array(range(start, min(start + shard_rows, rows.num_rows)), pa.int64()))
        shards.append(MemoryShard(index=index, first=start, num_rows=part.num_rows, rows=part))
    return shards


def _check_same_columns(paths: Sequence[AnyPath], schemas: Sequence[pa.Schema]) -> None:
    """Raise DatasetError if schemas differ, other than in the width of offsets.

    Of jsonl only the names are compared: types are inferred per file.
    """
    first = small_offsets(schemas[0])
    for path, schema in zip(paths, schemas, strict=True):
        same = schema.names == first.names if path.suffix == ".jsonl" else small_offsets(schema).equals(first)
        if not same:
            raise DatasetError(f"{path} has different columns from {paths[0]}")


def _prefix_paths(rows: pa.Table, folder: str) -> pa.Table:
    """Prefix the paths in a folder's table with the folder, so that they are relative to its parent."""
    for index, field in enumerate(rows.schema):
        if holds_files(rows, field):
            prefixed = [_prefix_path(cell, folder) for cell in rows[field.name].to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(prefixed, field.type))
    return rows


def _prefix_path(cell: object, folder: str) -> object:
    if isinstance(cell, list):
        return [_prefix_path(path, folder) for path in cell]
    if not isinstance(cell, str) or cell.startswith("/") or "://" in cell:
        return cell
    return f"{folder}/{cell}"
