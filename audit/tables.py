"""Files of rows: how are csv, jsonl and Parquet read as one plan of shards?"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from .errors import DatasetError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_CSV_QUOTING = pyarrow.csv.ParseOptions(newlines_in_values=True)
_BLOCK = 1 << 26  # bytes; a row must fit into a block


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A unit of work: some rows in memory, or one row group of a Parquet file. `first` is its first row's number."""

    index: int
    first: int
    num_rows: int
    rows: pa.Table | None = None
    path: str | None = None
    row_group: int | None = None

    def read(self, columns: list[str]) -> pa.Table:
        """Read these columns of the shard's rows."""
        if self.rows is not None:
            return self.rows.select(columns)
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(self.row_group, columns=columns)


def find_tables(data: str) -> tuple[Path, list[Path]]:
    """Give the folder that relative paths start from, and the files of rows, in a fixed order.

    `data` is a folder with a metadata file, one csv, jsonl or Parquet file, or a glob of Parquet files.
    """
    path = Path(data)
    if path.is_dir():
        return path, [_metadata_of(path)]
    if path.is_file():
        if path.suffix not in (".parquet", ".csv", ".jsonl"):
            raise DatasetError(f"{data} is neither a folder nor a .parquet, .csv or .jsonl file")
        return path.parent, [path]
    matches = [Path(match) for match in sorted(glob.glob(data))] if glob.has_magic(data) else []
    if not matches:
        raise DatasetError(f"no such folder or file: {data}")
    if odd := [match for match in matches if match.suffix != ".parquet"]:
        raise DatasetError(f"{data} matches {odd[0].name}; a glob may name .parquet files only")
    return matches[0].parent, matches


def read_rows(path: Path) -> pa.Table:
    """Read a file of rows as a whole. Everything in a csv stays a string, so that the id 007 does not become 7."""
    try:
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def row_group_shards(paths: list[Path]) -> list[Shard]:
    """Plan one shard for each row group of these Parquet files."""
    shards: list[Shard] = []
    first = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows:  # Spark writes files without any
                    shards.append(Shard(index=len(shards), first=first, num_rows=rows, path=str(path), row_group=group))
                first += rows
    return shards


def memory_shards(rows: pa.Table, *, shard_rows: int) -> list[Shard]:
    """Cut rows that are already in memory into shards of `shard_rows`; each is a copy, so that it travels alone."""
    starts = range(0, rows.num_rows, shard_rows)
    return [
        Shard(index=index, first=start, num_rows=part.num_rows, rows=part)
        for index, start in enumerate(starts)
        for part in [rows.take(pa.array(range(start, min(start + shard_rows, rows.num_rows)), pa.int64()))]
    ]


def _metadata_of(folder: Path) -> Path:
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if not found:
        raise DatasetError(
            f"{folder} holds none of {', '.join(METADATA_NAMES)}: "
            "write one with a column file_name (or NAME_file_name for each modality) and a column label"
        )
    if len(found) > 1:
        raise DatasetError(f"{folder} holds both {found[0].name} and {found[1].name}: name the file you mean")
    return found[0]


def _read_csv(path: Path) -> pa.Table:
    # A reader that stops after the first block gives the header; types are then fixed before anything is parsed.
    reading = pyarrow.csv.ReadOptions(block_size=_BLOCK)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=_CSV_QUOTING) as reader:
        names = list(reader.schema.names)
    options = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
    )
    return pyarrow.csv.read_csv(path, read_options=reading, convert_options=options, parse_options=_CSV_QUOTING)


def _read_jsonl(path: Path) -> pa.Table:
    reading = pyarrow.json.ReadOptions(block_size=_BLOCK)
    rows = pyarrow.json.read_json(path, read_options=reading)
    dates = [pa.field(field.name, pa.string()) for field in rows.schema if pa.types.is_temporal(field.type)]
    if not dates:
        return rows
    # JSON has no dates: Arrow takes strings like 2020-01-01 for some, and the id would no longer be what was written.
    as_written = pyarrow.json.ParseOptions(explicit_schema=pa.schema(dates))
    return pyarrow.json.read_json(path, read_options=reading, parse_options=as_written).select(rows.column_names)
