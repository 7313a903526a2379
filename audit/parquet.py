"""Our Parquet files: flat columns, and under the key `mmaudit` in the schema what they were made from"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import MmauditError, reading
from .storage import atomic_write

KEY = b"mmaudit"


def write_parquet(table: pa.Table, path: Path, *, provenance: dict[str, Any]) -> None:
    """Write a table whole or not at all; the same table gives the same bytes."""
    text = json.dumps(provenance, sort_keys=True)
    with atomic_write(path) as temporary:
        pq.write_table(table.replace_schema_metadata({KEY: text.encode()}), temporary, compression="zstd")


def read_parquet(path: Path, *, error: type[MmauditError]) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its provenance, {} where it has none; what cannot be read raises `error`."""
    if not path.is_file():
        raise error(f"no such file: {path}")
    try:
        with reading(path):
            table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as cause:
        raise error(f"{path} cannot be read as Parquet: {str(cause).splitlines()[0]}") from cause
    return table, parse_provenance(table.schema.metadata or {}, error=error, where=str(path))


def parse_provenance(metadata: Mapping[bytes, bytes], *, error: type[MmauditError], where: str) -> dict[str, Any]:
    """Give what stands under our key in the metadata of a file; {} where there is none."""
    try:
        return dict(json.loads(metadata.get(KEY, b"{}")))
    except (ValueError, TypeError) as cause:
        raise error(f"{where}: its metadata under the key mmaudit are damaged: {cause}") from cause
