"""What passes between stages: tables in memory, or files of a folder, each complete with its record or absent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from ..errors import RunError
from ..features.encode import read_arrow, write_pieces
from ..hashing import file_digest
from ..parsing import RequiredKeys, Shape
from ..storage import read_json, write_json

_RECORD: Shape = RequiredKeys(config=str, rows=int, size=int, sha256=str, counts={})


class Store(Protocol):
    """Tables by name and part, and JSON values by name; what is read was written by an earlier stage."""

    def has(self, name: str, part: int = 0) -> bool:
        """Return whether a table is there, complete."""

    def write(self, name: str, table: pa.Table, *, part: int = 0, counts: Mapping[str, Any] | None = None) -> None:
        """Write a table with its record."""

    def write_pieces(self, name: str, pieces: Iterable[pa.Table], *, counts: Mapping[str, Any] | None = None) -> None:
        """Write a table of which a piece at a time is in memory, with its record; there must be one."""

    def read(self, name: str, part: int = 0) -> pa.Table:
        """Read a table; raise RunError if it is not there."""

    def counts(self, name: str, part: int = 0) -> dict[str, Any]:
        """Read the counts of a table's record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStore:
    """Tables in memory."""

    tables: dict[tuple[str, int], tuple[pa.Table, dict[str, Any]]] = field(default_factory=dict)

    def has(self, name: str, part: int = 0) -> bool:
        """Return whether a table is there."""
        return (name, part) in self.tables

    def write(self, name: str, table: pa.Table, *, part: int = 0, counts: Mapping[str, Any] | None = None) -> None:
        """Keep a table."""
        self.tables[name, part] = table, dict(counts or {})

    def write_pieces(self, name: str, pieces: Iterable[pa.Table], *, counts: Mapping[str, Any] | None = None) -> None:
        """Keep a table, which is put together."""
        self.write(name, pa.concat_tables(pieces).combine_chunks(), counts=counts)

    def read(self, name: str, part: int = 0) -> pa.Table:
        """Return a table."""
        return self.tables[name, part][0]

    def counts(self, name: str, part: int = 0) -> dict[str, Any]:
        """Return the counts of a table."""
        return self.tables[name, part][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderStore:
    """Tables as Arrow files NAME/part-00000.arrow of a folder, each with a record, part-00000.json.

    The record is written last: a file without one is not there. config: digest of what all tables depend on.
    """

    folder: Path
    config: str
    verified: dict[Path, int] = field(default_factory=dict)  # files whose digest this process has checked

    def file(self, name: str, part: int = 0) -> Path:
        """Return the path of a table."""
        return self.folder / name / f"part-{part:05d}.arrow"

    def has(self, name: str, part: int = 0) -> bool:
        """Return whether a table is there: its record, with this config, and a file of its size and digest."""
        file = self.file(name, part)
        record_file = file.with_suffix(".json")
        if not record_file.exists():
            return False
        try:
            record = read_json(record_file, error=RunError, shape=_RECORD)
        except RunError:
            return False  # damaged
        if record["config"] != self.config:
            raise RunError(
                f"{record_file} is a part of other data or of another config: pass another folder with --run, or "
                "--overwrite"
            )
        if not file.exists() or file.stat().st_size != record["size"]:
            return False
        if self.verified.get(file) != file.stat().st_mtime_ns:
            if file_digest(file) != record["sha256"]:
                return False
            self.verified[file] = file.stat().st_mtime_ns
        return True

    def write(self, name: str, table: pa.Table, *, part: int = 0, counts: Mapping[str, Any] | None = None) -> None:
        """Write a table and then its record, each whole or not at all."""
        self._write(name, [table], part, counts)

    def write_pieces(self, name: str, pieces: Iterable[pa.Table], *, counts: Mapping[str, Any] | None = None) -> None:
        """Write a table of which a piece at a time is in memory, and then its record, each whole or not at all."""
        self._write(name, pieces, 0, counts)

    def _write(self, name: str, pieces: Iterable[pa.Table], part: int, counts: Mapping[str, Any] | None) -> None:
        file = self.file(name, part)
        file.with_suffix(".json").unlink(missing_ok=True)
        num_rows = write_pieces(pieces, file)
        record = {"config": self.config, "rows": num_rows, "size": file.stat().st_size}
        write_json({**record, "sha256": file_digest(file), "counts": dict(counts or {})}, file.with_suffix(".json"))
        self.verified[file] = file.stat().st_mtime_ns

    def read(self, name: str, part: int = 0) -> pa.Table:
        """Map a table into memory."""
        return read_arrow(self._existing(name, part))

    def counts(self, name: str, part: int = 0) -> dict[str, Any]:
        """Read the counts of a table's record."""
        record_file = self._existing(name, part).with_suffix(".json")
        return dict(read_json(record_file, error=RunError, shape=_RECORD)["counts"])

    def _existing(self, name: str, part: int) -> Path:
        """Return the path of a table; raise RunError if it is not there."""
        file = self.file(name, part)
        if not self.has(name, part):
            stage = STAGE_OF[name]
            raise RunError(f"{file} is missing or damaged: run the stage that writes it again, --stage {stage}")
        return file


# The stage of the command that writes each table.
STAGE_OF = {
    "rows": "encode",
    "status": "encode",
    "selection": "fit",
    "keys": "fit",
    "contents": "fit",
    "quarantined": "fit",
    "usable": "fit",
    "halves": "fit",
    "old rows": "fit",
    "scores": "score",
    "measured": "score",
    "finished": "merge",
}
