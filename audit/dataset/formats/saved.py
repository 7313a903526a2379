"""Datasets saved by `datasets`, and datasets of the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ...arrow import dataset_schema, dataset_table, small_offsets
from ...errors import DatasetError
from ...parsing import check_shape, parse_data_json
from ...remote.paths import RemotePath, source_path
from ...storage import check_regular
from ..columns import SPLIT, with_split
from ..labels import declared_classes
from . import Plan
from .rows import max_shard_rows
from .sample import sample_positions, take_rows
from .sources import check_fetched, divide
from .tables import SAVED_NAMES, TABLE_SUFFIXES, concat_rows, plan_rows

log = logging.getLogger("mmaudit")

_ARROW_MAGIC = b"ARROW1\0\0"  # an Arrow file is these bytes, a stream, and a footer
_PARQUET = "download it, or write it with to_parquet"
_SAVE_AGAIN = "save the dataset again with save_to_disk"
_READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, TypeError, MemoryError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowShard:
    """`num_rows` rows of an Arrow file, from row `start`.

    split: value of the column `split` that the rows get; None: the file's own columns are returned unchanged.
    """

    index: int
    first: int
    num_rows: int
    path: str
    start: int
    split: str | None = None

    @property
    def location(self) -> tuple[str, int, int]:
        """The file, and the first row in it."""
        return self.path, 0, self.start

    def read(self, columns: list[str]) -> pa.Table:
        """Map these columns of the rows into memory."""
        try:
            rows = _map_rows(Path(self.path)).slice(self.start, self.num_rows)
            if rows.num_rows < self.num_rows:
                raise ValueError("it has fewer rows than when it was opened")
            rows = with_split(rows, self.split).select(columns)
            rows.validate(full=True)
            return dataset_table(rows)
        except _READ_ERRORS as error:
            raise _read_error(Path(self.path), error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFiles:
    """The Arrow files of one split, in order; `split` is None for a dataset without splits."""

    split: str | None
    paths: tuple[Path, ...]


def plan_saved(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan a folder written by Dataset.save_to_disk or DatasetDict.save_to_disk; names of the latter are the splits."""
    folder = source_path(data)
    if isinstance(folder, RemotePath):
        if any((folder / name).is_file() for name in SAVED_NAMES):
            raise DatasetError(f"{data} was saved by save_to_disk, which is read on this machine only: {_PARQUET}")
        return None
    dict_path, state_path = (folder / name for name in SAVED_NAMES)
    if dict_path.is_file():
        names = _read_state(dict_path).get("splits", [])
        parts = [SplitFiles(split=str(name), paths=_data_files(folder / str(name))) for name in names]
    elif state_path.is_file():
        parts = [SplitFiles(split=None, paths=_data_files(folder))]
    else:
        return None
    return plan_parts(folder, parts, shard_rows=shard_rows)


def plan_parts(root: Path, parts: Sequence[SplitFiles], *, shard_rows: int) -> Plan:
    """Plan the rows of Arrow files; DatasetError unless all have the same columns and class names."""
    files = [(path, part.split) for part in parts for path in part.paths]
    if not files:
        raise DatasetError(f"{root} names no Arrow file: {_SAVE_AGAIN}")
    check_fetched([path for path, _ in files])
    tables = [_open_rows(path) for path, _ in files]
    schema = dataset_schema(tables[0].schema)
    for (path, _), rows in zip(files, tables, strict=True):
        _check_same_columns(path, dataset_schema(rows.schema), files[0][0], schema)
    if SPLIT in schema.names and files[0][1] is not None:
        log.info("%s: splits are read from the column split, not from the names of the parts", root)
        files = [(path, None) for path, _ in files]
    elif files[0][1] is not None:
        splits = divide([split for _, split in files], source=str(root))
        files = [(path, split) for (path, _), split in zip(files, splits, strict=True)]
    max_rows = max_shard_rows(schema, media_rows=shard_rows)
    shards: list[ArrowShard] = []
    first = 0
    for (path, split), rows in zip(files, tables, strict=True):
        for start in range(0, rows.num_rows, max_rows):
            shard = ArrowShard(
                index=len(shards),
                first=first + start,
                num_rows=min(max_rows, rows.num_rows - start),
                path=str(path),
                start=start,
                split=split,
            )
            shards.append(shard)
        first += rows.num_rows
    return Plan(root=root, sample=_sample(files, tables), shards=tuple(shards))


def _sample(files: Sequence[tuple[Path, str | None]], tables: Sequence[pa.Table]) -> pa.Table:
    """Return rows spread over all files."""
    parts = []
    for (path, split), rows, positions in zip(files, tables, sample_positions(tables), strict=True):
        try:
            part = with_split(take_rows(rows, positions), split)
            part.validate(full=True)
            parts.append(dataset_table(part))
        except _READ_ERRORS as error:
            raise _read_error(path, error) from error
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks()


def _map_rows(path: Path) -> pa.Table:
    """Map the rows of an Arrow file into memory; only the headers of its record batches are read.

    `datasets` maps files by the same call. `load_from_disk` is not used, since each worker process would import
    `datasets`: 0.6 s and 50 MB more in each. It also waits for a FIFO, follows names out of the folder, and ignores the
    indices that old versions store separately.
    """
    check_regular(path)
    with pa.memory_map(str(path)) as source:
        source.seek(len(_ARROW_MAGIC) if source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC else 0)
        return pa.ipc.open_stream(source).read_all()


def _open_rows(path: Path) -> pa.Table:
    """Map the rows of an Arrow file, whose buffers are checked against the number of its rows."""
    try:
        rows = _map_rows(path)
        rows.validate()
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing: {_SAVE_AGAIN}") from error
    except _READ_ERRORS as error:
        raise _read_error(path, error) from error
    return rows


def _check_same_columns(path: Path, schema: pa.Schema, reference_path: Path, reference: pa.Schema) -> None:
    if not small_offsets(schema).equals(small_offsets(reference)):
        raise DatasetError(f"{path} has different columns from {reference_path}")
    for name in schema.names:
        if declared_classes(schema, name) != declared_classes(reference, name):
            raise DatasetError(f"{path} has different classes in {name!r} from {reference_path}")


def _read_error(path: Path, error: BaseException) -> DatasetError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DatasetError(f"{path} cannot be read: {reason}; {_SAVE_AGAIN}")


def _data_files(folder: Path) -> tuple[Path, ...]:
    state = _read_state(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DatasetError(f"{folder} stores a selection separately from its rows, as old versions did: {_SAVE_AGAIN}")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{folder / 'state.json'} names no data files: {_SAVE_AGAIN}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise DatasetError(f"{folder / 'state.json'} names {outside[0]!r}, which leads outside {folder}: {_SAVE_AGAIN}")
    return tuple(folder / name for name in names)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = parse_data_json(path.read_bytes())
        check_shape(content, {"splits": [str], "_data_files": [{"filename": str}]})
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; {_SAVE_AGAIN}") from error
    return dict(content)


_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.+-]+))?")
_NO_CHECK_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_CONNECT_SECONDS = 3.0  # without a network `datasets` retries for 24 s


def looks_like_hub_name(data: str) -> bool:
    """Return whether this has the form `user/name` or `name`, with an optional `:config`."""
    return _HUB_NAME.fullmatch(data) is not None and not data.endswith((*TABLE_SUFFIXES, ".tar"))


def plan_hub(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Load a dataset from the hub or its cache and plan its rows; its splits become the column `split`.

    Raises DatasetError if the dataset does not exist, or the hub cannot be reached.
    """
    match = _HUB_NAME.fullmatch(data) if looks_like_hub_name(data) and not Path(data).exists() else None
    if match is None:
        return None
    loaded = _load_from_hub(data, match["name"], match["config"])
    # The order of a select or shuffle is applied to the rows themselves.
    rows_of = {str(name): rows if rows._indices is None else rows.flatten_indices() for name, rows in loaded.items()}
    files = [SplitFiles(split=split, paths=_cache_files(rows)) for split, rows in rows_of.items() if len(rows)]
    if all(split_files.paths for split_files in files):
        return plan_parts(_cache_root(), files, shard_rows=shard_rows)
    splits = divide(list(rows_of), source=data)
    tables = [_read_split(rows, split) for rows, split in zip(rows_of.values(), splits, strict=True)]
    return plan_rows(_cache_root(), concat_rows(tables, source=data), shard_rows=shard_rows)


def _load_from_hub(data: str, name: str, config: str | None) -> dict[str, Any]:
    not_found = f"no such folder or file: {data}"
    if problem := _connection_problem():
        raise DatasetError(f"{not_found}; on the hub: {problem}; HF_HUB_OFFLINE=1 reads cached datasets")
    import datasets  # takes a second, and is needed only here

    log.info("%s; loading a dataset of this name from the hub", not_found)
    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # a foreign dataset, the network and the cache may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise DatasetError(
            f"{not_found}; loading the dataset from the hub failed ({type(error).__name__}: {reason}): "
            "check the name (user/name, or user/name:config), or download it and pass the folder"
        ) from error


def _connection_problem() -> str | None:
    """Return why the hub cannot be reached, within seconds; None if it can, or in offline mode or behind a proxy."""
    if any(map(os.environ.get, _NO_CHECK_VARIABLES)):
        return None
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error.strerror or error})"
    return None


def _cache_files(split_dataset: Any) -> tuple[Path, ...]:
    """Return the Arrow files with exactly these rows and columns; () if rows are in memory or part of a file."""
    paths = tuple(Path(entry["filename"]) for entry in split_dataset.cache_files)
    tables = [_map_rows(path) for path in paths]
    has_all_columns = all(rows.column_names == split_dataset.column_names for rows in tables)
    return paths if has_all_columns and sum(map(len, tables)) == len(split_dataset) else ()


def _read_split(split_dataset: Any, split: str | None) -> pa.Table:
    # The metadata of the schema declares the features; no value is decoded in the format `arrow`.
    metadata = split_dataset.features.arrow_schema.metadata
    rows: pa.Table = split_dataset.with_format("arrow")[:].replace_schema_metadata(metadata)
    return with_split(rows, None if SPLIT in rows.column_names else split)


def _cache_root() -> Path:
    """Return the folder that paths of cached files must not leave: the cache itself."""
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)
