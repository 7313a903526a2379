"""Plans of csv, jsonl and Parquet files: a sample of the rows and their shards."""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ...arrow import dataset_table
from ...errors import DatasetError
from ...storage import check_regular, read_table
from ..columns import SPLIT, split_of_file, split_of_folder, with_split
from ..modalities import holds_files, holds_media
from ..not_read import NotRead
from . import Plan
from .rows import read_csv_rows, read_json_lines, read_parquet_schema, row_group_shards
from .sample import sample_row_groups, sample_rows

log = logging.getLogger("mmaudit")

SAVED_NAMES = ("dataset_dict.json", "state.json")  # written by save_to_disk of `datasets`; see saved.py
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl")
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
    """Plan a csv, jsonl or Parquet file, a glob of such, or the metadata of a folder or of its subfolders."""
    folder = Path(data)
    if not folder.is_dir():
        paths = [folder] if folder.is_file() else [Path(match) for match in _matches(data)]
        if not any(path.suffix in TABLE_SUFFIXES for path in paths):
            return None
    elif any((folder / name).is_file() for name in SAVED_NAMES):
        return None
    elif not any((folder / name).is_file() for name in METADATA_NAMES):
        tables = find_split_tables(folder)
        return plan_split_tables(folder, tables, shard_rows=shard_rows) if tables else None
    root, paths = find_tables(data)
    return plan_files(root, paths, shard_rows=shard_rows)


def plan_parquet_folder(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan a folder of Parquet files, or of a subfolder `data`; names that begin with a split give the splits."""
    paths = find_parquets(Path(data))
    return plan_files(Path(data), paths, shard_rows=shard_rows, splits=splits_of(paths)) if paths else None


def find_tables(data: str) -> tuple[Path, list[Path]]:
    """Return the folder that relative paths start from, and the files of rows, sorted.

    `data` is a folder with a metadata file, one csv, jsonl or Parquet file, or a glob of such files of one format.
    Raises DatasetError if it is none of these.
    """
    path = Path(data)
    if path.is_dir():
        return path, [_find_metadata(path)]
    if path.is_file():
        if path.suffix not in TABLE_SUFFIXES:
            raise DatasetError(f"{data} is neither a folder nor a .parquet, .csv, .jsonl or .tar file")
        return path.parent, [path]
    matches = _matches(data)
    if path.exists():
        raise DatasetError(f"{data} is neither a folder nor a regular file")
    if not matches:
        raise DatasetError(f"no such folder or file: {data}")
    suffixes = {matches[0].suffix} & set(TABLE_SUFFIXES)
    if unsupported := [match for match in matches if match.suffix not in suffixes]:
        raise DatasetError(
            f"{data} matches {unsupported[0].name}; a glob must match files of one format only: "
            ".parquet, .csv, .jsonl or .tar"
        )
    return matches[0].parent, matches


def _matches(data: str) -> list[Path]:
    """Return the sorted files that a glob matches, [] for a path that is not a glob."""
    return [Path(match) for match in sorted(glob.glob(data))] if glob.has_magic(data) else []


def find_parquets(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder, or of its subfolder `data` (the layout of hub downloads), sorted."""
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def splits_of(paths: Sequence[Path]) -> list[str | None]:
    """Return the split that each file name begins with, None for every file unless all have one."""
    return common_splits([split_of_file(path.name) for path in paths], source="files")


def common_splits(splits: list[str | None], *, source: str) -> list[str | None]:
    """Return the splits that names of files stand for, None for every file unless all have one; log their numbers."""
    if not all(splits):
        return [None] * len(splits)
    counts = ", ".join(f"{number} {name}" for name, number in Counter(splits).items())
    log.info("split by the names of the %s: %s", source, counts)
    return splits


def plan_files(
    root: Path, paths: Sequence[Path], *, shard_rows: int, splits: Sequence[str | None] | None = None
) -> Plan:
    """Plan the rows of these files; Parquet files with media or vectors are read by shard, all others at once.

    `splits` holds one split per file: the value of the column `split`, unless the rows already have that column.
    """
    folders = tuple(sorted({path.parent for path in paths}))
    if all(path.suffix == ".parquet" for path in paths):
        schemas = [read_parquet_schema(path) for path in paths]
        _check_same_columns(paths, schemas)
        splits = None if SPLIT in schemas[0].names else splits
        if any(pa.types.is_nested(type_) or holds_media(type_) for type_ in schemas[0].types):
            shards = row_group_shards(paths, media_rows=shard_rows, splits=splits)
            groups = [(shard.path, shard.row_group, shard.split) for shard in shards if not shard.start]
            schema = with_split(schemas[0].empty_table(), splits[0] if splits else None).schema
            return Plan(root=root, sample=sample_row_groups(groups, schema), shards=tuple(shards), folders=folders)
    return plan_rows(root, read_tables(paths, splits=splits), shard_rows=shard_rows, folders=folders)


def find_split_tables(folder: Path) -> list[Path]:
    """Return the metadata files in the direct subfolders of a folder, such as train/metadata.csv, sorted."""
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    with_metadata = [path for path in subfolders if any((path / name).is_file() for name in METADATA_NAMES)]
    return [table for path in with_metadata for table in find_tables(str(path))[1]]


def plan_split_tables(root: Path, tables: Sequence[Path], *, shard_rows: int) -> Plan:
    """Plan the rows of one metadata file per folder; folders that are named after splits become the column `split`.

    Paths become relative to `root`. A column that a file does not have is null there.
    """
    are_splits = all(split_of_folder(table.parent.name) for table in tables)
    parts = []
    for table in tables:
        rows = _prefix_paths(read_rows(table), table.parent.name)
        parts.append(with_split(rows, table.parent.name if are_splits and SPLIT not in rows.column_names else None))
    return plan_rows(root, concat_rows(parts, source=str(root)), shard_rows=shard_rows)


def plan_rows(
    root: Path,
    rows: pa.Table,
    *,
    shard_rows: int,
    folders: tuple[Path, ...] = (),
    not_read: tuple[NotRead, ...] = (),
) -> Plan:
    """Plan rows in memory."""
    rows = dataset_table(rows)
    shards = tuple(memory_shards(rows, shard_rows=shard_rows))
    return Plan(root=root, sample=sample_rows(rows), shards=shards, folders=folders, not_read=not_read)


def read_tables(paths: Sequence[Path], *, splits: Sequence[str | None] | None = None) -> pa.Table:
    """Read and concatenate files with the same columns; a column without values takes its type from another file."""
    parts = [read_rows(path) for path in paths]
    _check_same_columns(paths, [part.schema for part in parts])
    parts = [with_split(part, split) for part, split in zip(parts, splits or [None] * len(parts), strict=True)]
    return concat_rows(parts, source=str(paths[0].parent))


def read_rows(path: Path) -> pa.Table:
    """Read a csv, jsonl or Parquet file; DatasetError with file, line (if it has lines) and reason."""
    try:
        check_regular(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".csv":
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


def _check_same_columns(paths: Sequence[Path], schemas: Sequence[pa.Schema]) -> None:
    """Raise DatasetError if schemas differ; for jsonl only the names are compared: types are inferred per file."""
    for path, schema in zip(paths, schemas, strict=True):
        same = schema.names == schemas[0].names if path.suffix == ".jsonl" else schema.equals(schemas[0])
        if not same:
            raise DatasetError(f"{path} has different columns from {paths[0]}")


def _find_metadata(folder: Path) -> Path:
    paths = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if not paths:
        raise DatasetError(
            f"{folder} has none of {', '.join(METADATA_NAMES)}: "
            "write one with a column file_name (or NAME_file_name for each modality) and a column label; "
            f"{OTHER_FORMS}"
        )
    if len(paths) > 1:
        raise DatasetError(f"{folder} has both {paths[0].name} and {paths[1].name}: pass the path of one of them")
    return paths[0]


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
