"""Files: whole or not at all"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import MmauditError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write; it takes the name at the end, and is removed if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all."""
    write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", path)


def read_json(path: Path, *, error: type[MmauditError]) -> dict[str, Any]:
    """Read a JSON file; what cannot be read raises `error`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as cause:
        raise error(f"{path} cannot be read: {cause}; it was not written by mmaudit, or is damaged") from cause
