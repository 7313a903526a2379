"""A job of exporting: what is to be written, and what are its rows as plain values?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..audit.errors import ConfigError
from .manifest import batches_of
from .score_columns import NO_SPLIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be written. `root` is None where the source of the media cannot be told."""

    manifest: Path
    schema: pa.Schema  # without metadata
    paths: tuple[str, ...]
    provenance: dict[str, Any]
    root: Path | None
    allow_outside: bool
    samples_per_shard: int
    skip_missing: bool
    clip: str | None
    escape_formulas: bool = True


def plain_rows(job: Job, *columns: str) -> Iterator[dict[str, Any]]:
    """Yield the rows as plain values; a float32 by its shortest digits, what is no finite number as None."""
    names = list(dict.fromkeys(columns or job.schema.names))
    for table in batches_of(job.manifest, columns=names):
        yield from pa.table({name: _shortest(table[name]) for name in names}).to_pylist()


def _shortest(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return finite if column.type == pa.float64() else finite.cast(pa.string()).cast(pa.float64())


def split_name(split: str | None) -> str:
    """Give what a split's files are called."""
    if split is None:
        return NO_SPLIT
    if not re.fullmatch(r"\w+", split):
        raise ConfigError(f"split {split!r} can name no file: a split is letters, digits and _; rename it, or use csv")
    return split
