"""Our Parquet files: flat columns, and under the key `mmaudit` in the schema what they were made from"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import MmauditError

KEY = b"mmaudit"


def write_parquet(table: pa.Table, path: Path, *, provenance: dict[str, Any]) -> None:
    """Write a table whole or not at all; the same table gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(provenance, sort_keys=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table.replace_schema_metadata({KEY: text.encode()}), temporary, compression="zstd")
    temporary.replace(path)


def read_parquet(path: Path, *, error: type[MmauditError]) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its provenance, {} where it has none; what cannot be read raises `error`."""
    if not path.is_file():
        raise error(f"no such file: {path}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as cause:
        raise error(f"{path} cannot be read as Parquet: {str(cause).splitlines()[0]}") from cause
    text = (table.schema.metadata or {}).get(KEY, b"{}")
    return table, dict(json.loads(text))


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all."""
    write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", path)


def read_json(path: Path, *, error: type[MmauditError]) -> dict[str, Any]:
    """Read a JSON file; what cannot be read raises `error`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as cause:
        raise error(f"{path} cannot be read: {cause}; it was not written by mmaudit, or is damaged") from cause
