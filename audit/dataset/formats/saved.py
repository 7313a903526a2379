"""Datasets saved by `datasets`, and datasets of the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ...errors import DatasetError
from ...parsing import check_shape, parse_data_json
from ...storage import check_regular
from ..columns import SPLIT, with_split
from ..labels import declared_classes
from ..modalities import holds_bytes
from .tables import HEAD_ROWS, TABLE_SUFFIXES, Plan, concat_rows, plan_rows

log = logging.getLogger("mmaudit")

_MAX_VECTOR_ROWS = 8_192  # in a shard without media
_ARROW_MAGIC = b"ARROW1\0\0"  # an Arrow file is these bytes, a stream, and a footer
_SAVE_AGAIN = "save the dataset again with save_to_disk"
_READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, TypeError, MemoryError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowShard:
    """`num_rows` rows of an Arrow file, from row `skip` of the record batch at byte `offset`.

    split: value of the column `split` that the rows get; None: the file's own columns are returned unchanged.
    """

    index: int
    first: int
    num_rows: int
    path: str
    offset: int
    skip: int
    split: str | None = None

    @property
    def location(self) -> tuple[str, int, int]:
        """The file, the offset of a record batch, and the first row after it."""
        return self.path, self.offset, self.skip

    def read(self, columns: list[str]) -> pa.Table:
        """Map these columns of the rows into memory."""
        try:
            with pa.memory_map(self.path) as source:
                rows = _read_batches(source, self.offset, self.skip + self.num_rows).slice(self.skip, self.num_rows)
        except _READ_ERRORS as error:
            raise DatasetError(f"{self.path} cannot be read: {_first_line(error)}; {_SAVE_AGAIN}") from error
        return with_split(rows, self.split).select(columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFiles:
    """The Arrow files of one split, in order; `split` is None for a dataset without splits."""

    split: str | None
    paths: tuple[Path, ...]


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def plan_saved(folder: Path, *, shard_rows: int) -> Plan:
    """Plan a folder written by Dataset.save_to_disk or DatasetDict.save_to_disk; names of the latter are the splits."""
    if not (folder / "dataset_dict.json").is_file():
        parts = [SplitFiles(split=None, paths=_data_files(folder))]
    else:
        names = _read_state(folder / "dataset_dict.json").get("splits", [])
        parts = [SplitFiles(split=str(name), paths=_data_files(folder / str(name))) for name in names]
    return plan_parts(folder, parts, shard_rows=shard_rows)


def plan_parts(root: Path, parts: Sequence[SplitFiles], *, shard_rows: int) -> Plan:
    """Plan the rows of Arrow files; DatasetError unless all have the same columns and class names."""
    files = [(path, part.split) for part in parts for path in part.paths]
    if not files:
        raise DatasetError(f"{root} names no Arrow file: {_SAVE_AGAIN}")
    schemas = [_read_schema(path) for path, _ in files]
    for (path, _), schema in zip(files, schemas, strict=True):
        _check_same_columns(path, schema, files[0][0], schemas[0])
    if SPLIT in schemas[0].names and files[0][1] is not None:
        log.info("%s: splits are read from the column split, not from the names of the parts", root)
        files = [(path, None) for path, _ in files]
    rows = shard_rows if any(map(holds_bytes, schemas[0].types)) else _MAX_VECTOR_ROWS
    shards: list[ArrowShard] = []
    for path, split in files:
        shards += _iter_shards(path, split, index=len(shards), first=_num_planned(shards), rows=rows)
    first_shard = shards[0] if shards else None
    schema = with_split(schemas[0].empty_table(), files[0][1]).schema
    head = first_shard.read(schema.names).slice(0, HEAD_ROWS) if first_shard else schema.empty_table()
    return Plan(root=root, head=head, shards=tuple(shards))


def _iter_shards(path: Path, split: str | None, *, index: int, first: int, rows: int) -> Iterator[ArrowShard]:
    """Yield the shards of one file, each with the byte offset of its first batch, so that reading starts there."""
    positions = _batch_positions(path)
    total = positions[-1][1] + positions[-1][2] if positions else 0
    batch = 0
    for number, start in enumerate(range(0, total, rows)):
        while positions[batch][1] + positions[batch][2] <= start:
            batch += 1
        offset, batch_first, _ = positions[batch]
        yield ArrowShard(
            index=index + number,
            first=first + start,
            num_rows=min(rows, total - start),
            path=str(path),
            offset=offset,
            skip=start - batch_first,
            split=split,
        )


def _batch_positions(path: Path) -> list[tuple[int, int, int]]:
    """Return (offset in bytes, index of the first row, number of rows) of each record batch of a file."""
    positions: list[tuple[int, int, int]] = []
    first = 0
    try:
        with pa.memory_map(str(path)) as source:
            schema = _skip_to_schema(source)
            while (message := _next_message(source)) is not None:
                offset, content = message
                rows = pa.ipc.read_record_batch(content, schema).num_rows
                if rows:
                    positions.append((offset, first, rows))
                first += rows
    except _READ_ERRORS as error:
        raise DatasetError(f"{path} cannot be read: {_first_line(error)}; {_SAVE_AGAIN}") from error
    return positions


def _read_batches(source: Any, offset: int, num_rows: int) -> pa.Table:
    schema = _skip_to_schema(source)
    source.seek(offset)
    batches: list[pa.RecordBatch] = []
    while sum(batch.num_rows for batch in batches) < num_rows:
        batches.append(pa.ipc.read_record_batch(pa.ipc.read_message(source), schema))
    rows = pa.Table.from_batches(batches, schema=schema)
    rows.validate(full=True)
    return rows


def _next_message(source: Any) -> tuple[int, Any] | None:
    offset = source.tell()
    if offset == source.size():  # the stream has no end marker if its writer was not closed
        return None
    try:
        return offset, pa.ipc.read_message(source)
    except EOFError:
        return None


def _skip_to_schema(source: Any) -> pa.Schema:
    source.seek(len(_ARROW_MAGIC) if source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC else 0)
    schema = pa.ipc.read_schema(source)
    if any(pa.types.is_dictionary(type_) for type_ in schema.types):
        raise pa.ArrowInvalid("it has columns of dictionaries, which `datasets` does not write")
    return schema


def _read_schema(path: Path) -> pa.Schema:
    try:
        check_regular(path)
        with pa.memory_map(str(path)) as source:
            return _skip_to_schema(source)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing: {_SAVE_AGAIN}") from error
    except _READ_ERRORS as error:
        raise DatasetError(f"{path} cannot be read: {_first_line(error)}; {_SAVE_AGAIN}") from error


def _check_same_columns(path: Path, schema: pa.Schema, reference_path: Path, reference: pa.Schema) -> None:
    if not schema.equals(reference):
        raise DatasetError(f"{path} has different columns from {reference_path}")
    for name in schema.names:
        if declared_classes(schema, name) != declared_classes(reference, name):
            raise DatasetError(f"{path} has different classes in {name!r} from {reference_path}")


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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _num_planned(shards: Sequence[ArrowShard]) -> int:
    return shards[-1].first + shards[-1].num_rows if shards else 0


_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.+-]+))?")
_NO_CHECK_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_CONNECT_SECONDS = 3.0  # without a network `datasets` retries for 24 s


def looks_like_hub_name(data: str) -> bool:
    """Return whether this has the form `user/name` or `name`, with an optional `:config`."""
    return _HUB_NAME.fullmatch(data) is not None and not data.endswith((*TABLE_SUFFIXES, ".tar"))


def plan_hub(data: str, *, shard_rows: int) -> Plan:
    """Load a dataset from the hub or its cache and plan its rows; its splits become the column `split`.

    Raises DatasetError if the dataset does not exist, or the hub cannot be reached.
    """
    match = _HUB_NAME.fullmatch(data)
    assert match is not None, "the caller checks looks_like_hub_name"
    loaded = _load_from_hub(data, match["name"], match["config"])
    rows_of = {str(split): _apply_indices(rows) for split, rows in loaded.items()}
    files = [SplitFiles(split=split, paths=_cache_files(rows)) for split, rows in rows_of.items() if len(rows)]
    if all(split_files.paths for split_files in files):
        return plan_parts(_cache_root(), files, shard_rows=shard_rows)
    tables = [_read_split(rows, split) for split, rows in rows_of.items()]
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


def _apply_indices(split_dataset: Any) -> Any:
    """Return the dataset with the order of a select or shuffle applied to the rows themselves."""
    return split_dataset if split_dataset._indices is None else split_dataset.flatten_indices()


def _cache_files(split_dataset: Any) -> tuple[Path, ...]:
    """Return the Arrow files with exactly these rows and columns; () if rows are in memory or part of a file."""
    paths = tuple(Path(entry["filename"]) for entry in split_dataset.cache_files)
    num_rows = 0
    for path in paths:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            if reader.schema.names != split_dataset.column_names:
                return ()
            num_rows += sum(batch.num_rows for batch in reader)
    return paths if num_rows == len(split_dataset) else ()


def _read_split(split_dataset: Any, split: str) -> pa.Table:
    # The metadata of the schema declares the features; no value is decoded in the format `arrow`.
    metadata = split_dataset.features.arrow_schema.metadata
    rows: pa.Table = split_dataset.with_format("arrow")[:].replace_schema_metadata(metadata)
    return with_split(rows, None if SPLIT in rows.column_names else split)


def _cache_root() -> Path:
    """Return the folder that paths of cached files must not leave: the cache itself."""
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)
