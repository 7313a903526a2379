"""Datasets of the hub: how is `user/name` loaded through `datasets`, and its cached Arrow read like a saved dataset?"""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from ..errors import DatasetError
from .saved import Part, plan_parts
from .split_names import SPLIT, with_split
from .tables import TABLE_SUFFIXES, Plan, concat_rows, plan_rows

log = logging.getLogger("mmaudit")

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
