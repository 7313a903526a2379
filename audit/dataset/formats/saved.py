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

_VECTOR_ROWS = 8_192  # of a shard without media
_MAGIC = b"ARROW1\0\0"  # an Arrow file is this, a stream, and a footer
_AGAIN = "save the dataset again with save_to_disk"
_FAULTS = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, TypeError, MemoryError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowShard:
    """`num_rows` rows of an Arrow file: `skip` rows into the record batch that stands `offset` bytes into the file.

    `split` is None where the rows have none of their own.
    """

    index: int
    first: int
    num_rows: int
    path: str
    offset: int
    skip: int
    split: str | None = None

    def read(self, columns: list[str]) -> pa.Table:
        """Map these columns of the rows into memory."""
        try:
            with pa.memory_map(self.path) as source:
                rows = _read_batches(source, self.offset, self.skip + self.num_rows).slice(self.skip, self.num_rows)
        except _FAULTS as error:
            raise DatasetError(f"{self.path} cannot be read: {_first_line(error)}; {_AGAIN}") from error
        return with_split(rows, self.split).select(columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The Arrow files of one split, in order; `split` is None for a dataset that is not divided."""

    split: str | None
    paths: tuple[Path, ...]


def is_saved(folder: Path) -> bool:
    """Tell whether a folder was written by save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def plan_saved(folder: Path, *, shard_rows: int) -> Plan:
    """Plan a folder written by Dataset.save_to_disk or DatasetDict.save_to_disk; the latter's names are the splits."""
    if not (folder / "dataset_dict.json").is_file():
        parts = [Part(split=None, paths=_data_files(folder))]
    else:
        names = _read_state(folder / "dataset_dict.json").get("splits", [])
        parts = [Part(split=str(name), paths=_data_files(folder / str(name))) for name in names]
    return plan_parts(folder, parts, shard_rows=shard_rows)


def plan_parts(root: Path, parts: Sequence[Part], *, shard_rows: int) -> Plan:
    """Plan the rows of Arrow files; all must have the same columns, and number the same classes."""
    files = [(path, part.split) for part in parts for path in part.paths]
    if not files:
        raise DatasetError(f"{root} names no Arrow file: {_AGAIN}")
    schemas = [_read_schema(path) for path, _ in files]
    for (path, _), schema in zip(files, schemas, strict=True):
        _check_same(path, schema, files[0][0], schemas[0])
    if SPLIT in schemas[0].names and files[0][1] is not None:
        log.info("%s: the column split is taken, not the names of its parts", root)
        files = [(path, None) for path, _ in files]
    rows = shard_rows if any(map(holds_bytes, schemas[0].types)) else _VECTOR_ROWS
    shards: list[ArrowShard] = []
    for path, split in files:
        shards += _shards_of(path, split, index=len(shards), first=_end(shards), rows=rows)
    head = shards[0] if shards else None
    schema = with_split(schemas[0].empty_table(), files[0][1]).schema
    first = head.read(schema.names).slice(0, HEAD_ROWS) if head else schema.empty_table()
    return Plan(root=root, head=first, shards=tuple(shards))


def _shards_of(path: Path, split: str | None, *, index: int, first: int, rows: int) -> Iterator[ArrowShard]:
    """Cut one file. The place of each batch is noted, so that no shard looks for its own from the start."""
    places = _batch_places(path)
    total = places[-1][1] + places[-1][2] if places else 0
    at = 0
    for number, start in enumerate(range(0, total, rows)):
        while places[at][1] + places[at][2] <= start:
            at += 1
        offset, batch_first, _ = places[at]
        yield ArrowShard(
            index=index + number,
            first=first + start,
            num_rows=min(rows, total - start),
            path=str(path),
            offset=offset,
            skip=start - batch_first,
            split=split,
        )


def _batch_places(path: Path) -> list[tuple[int, int, int]]:
    """Give (offset in bytes, number of the first row, rows) of each record batch of a file."""
    places: list[tuple[int, int, int]] = []
    first = 0
    try:
        with pa.memory_map(str(path)) as source:
            schema = _skip_to_schema(source)
            while (message := _next_message(source)) is not None:
                offset, content = message
                rows = pa.ipc.read_record_batch(content, schema).num_rows
                if rows:
                    places.append((offset, first, rows))
                first += rows
    except _FAULTS as error:
        raise DatasetError(f"{path} cannot be read: {_first_line(error)}; {_AGAIN}") from error
    return places


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
    if offset == source.size():  # as a writer that was not closed leaves it
        return None
    try:
        return offset, pa.ipc.read_message(source)
    except EOFError:
        return None


def _skip_to_schema(source: Any) -> pa.Schema:
    source.seek(len(_MAGIC) if source.read(len(_MAGIC)) == _MAGIC else 0)
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
        raise DatasetError(f"{path} is missing: {_AGAIN}") from error
    except _FAULTS as error:
        raise DatasetError(f"{path} cannot be read: {_first_line(error)}; {_AGAIN}") from error


def _check_same(path: Path, schema: pa.Schema, other_path: Path, other: pa.Schema) -> None:
    if not schema.equals(other):
        raise DatasetError(f"{path} has other columns than {other_path}")
    for name in schema.names:
        if declared_classes(schema, name) != declared_classes(other, name):
            raise DatasetError(f"{path} numbers other classes in {name!r} than {other_path}")


def _data_files(folder: Path) -> tuple[Path, ...]:
    state = _read_state(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DatasetError(f"{folder} keeps a selection apart from its rows, as old versions did: {_AGAIN}")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{folder / 'state.json'} names no data files: {_AGAIN}") from error
    if odd := [name for name in names if Path(name).name != name]:
        raise DatasetError(f"{folder / 'state.json'} names {odd[0]!r}, which leads outside {folder}: {_AGAIN}")
    return tuple(folder / name for name in names)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = parse_data_json(path.read_bytes())
        check_shape(content, {"splits": [str], "_data_files": [{"filename": str}]})
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    return dict(content)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _end(shards: Sequence[ArrowShard]) -> int:
    return shards[-1].first + shards[-1].num_rows if shards else 0


_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.+-]+))?")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_REACH_SECONDS = 3.0  # without a network `datasets` itself tries for 24 s


def looks_like_hub_name(data: str) -> bool:
    """Tell whether this could be `user/name` or `name`, with `:config` or without."""
    return _NAME.fullmatch(data) is not None and not data.endswith((*TABLE_SUFFIXES, ".tar"))


def plan_hub(data: str, *, shard_rows: int) -> Plan:
    """Load a dataset, from the cache where it is there, and plan its rows; its splits become the column `split`.

    Raises DatasetError where there is no such dataset, or the hub cannot be reached.
    """
    found = _NAME.fullmatch(data)
    assert found is not None, "asked for with looks_like_hub_name"
    loaded = _load(data, found["name"], found["config"])
    parts = {str(name): _in_order(part) for name, part in loaded.items()}
    files = [Part(split=name, paths=_cache_files(part)) for name, part in parts.items() if len(part)]
    if all(part.paths for part in files):
        return plan_parts(_home(), files, shard_rows=shard_rows)
    tables = [_rows_of(part, name) for name, part in parts.items()]
    return plan_rows(_home(), concat_rows(tables, whence=data), shard_rows=shard_rows)


def _load(data: str, name: str, config: str | None) -> dict[str, Any]:
    missing = f"no such folder or file: {data}"
    if why := _unreachable():
        raise DatasetError(f"{missing}; nor can the hub be asked: {why}; what is cached is read with HF_HUB_OFFLINE=1")
    import datasets  # takes a second, and is needed here alone

    log.info("%s; asking the hub for a dataset of this name", missing)
    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # whatever a stranger's dataset, the network or the cache makes it raise
        words = (str(error).splitlines() or [""])[0]
        raise DatasetError(
            f"{missing}; nor can the dataset be loaded from the hub ({type(error).__name__}: {words}): "
            "check the name (user/name, or user/name:config), or download it and name the folder"
        ) from error


def _unreachable() -> str | None:
    """Tell within seconds that there is no way to the hub. Behind a proxy, or without asking, it is not tried."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE") or any(map(os.environ.get, _PROXIES)):
        return None
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error.strerror or error})"
    return None


def _in_order(part: Any) -> Any:
    """Give a dataset whose rows themselves stand in the order that a select or a shuffle gave them."""
    return part if part._indices is None else part.flatten_indices()


def _cache_files(part: Any) -> tuple[Path, ...]:
    """Name the Arrow files that hold just these rows and columns; none where the rows are in memory, or a part."""
    paths = tuple(Path(entry["filename"]) for entry in part.cache_files)
    held = 0
    for path in paths:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            if reader.schema.names != part.column_names:
                return ()
            held += sum(batch.num_rows for batch in reader)
    return paths if held == len(part) else ()


def _rows_of(part: Any, split: str) -> pa.Table:
    # The features go with the schema; no value is decoded in this format.
    rows: pa.Table = part.with_format("arrow")[:].replace_schema_metadata(part.features.arrow_schema.metadata)
    return with_split(rows, None if SPLIT in rows.column_names else split)


def _home() -> Path:
    """Give the folder that paths of cached files may not leave: the cache itself."""
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)
