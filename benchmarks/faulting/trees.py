"""Snapshots of a folder, what differs between two of them, and which of its files are cut short."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open

Snapshot = dict[str, str]  # relative path -> digest; a folder ends in / and has none

# Not compared: seconds are measured anew in every run. Checkpoints (.pt) are compared by what they hold, since torch
# writes tensors that share memory in another form than equal ones after a resume.
NOT_COMPARED = {"run.json": ("seconds",), "metrics.json": ("seconds",)}
CACHES = ("features",)  # folders of a run that may grow without being finished


def snapshot(folder: Path) -> Snapshot:
    """Return every file below a folder with its digest, and every folder, hidden ones too."""
    paths = sorted(folder.rglob("*"))
    folders = {f"{path.relative_to(folder).as_posix()}/": "" for path in paths if path.is_dir()}
    files = {}
    for path in paths:
        with suppress(FileNotFoundError):  # removed meanwhile by a process that is ending
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = _digest(path)
    return folders | files


def is_hidden(path: str) -> bool:
    """Return whether a path is of a temporary: it or a folder above it begins with a dot."""
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def is_cache(path: str) -> bool:
    """Return whether a path lies in a cache of the run."""
    return any(part in CACHES for part in PurePosixPath(path).parts)


def results(tree: Snapshot) -> Snapshot:
    """Return the files that a user sees and that a command answers for: no temporaries, folders or caches."""
    return {path: mark for path, mark in tree.items() if not (path.endswith("/") or is_hidden(path) or is_cache(path))}


def differing(tree: Snapshot, reference: Snapshot) -> list[str]:
    """Return the files that are missing, or whose bytes differ."""
    missing = [f"{path} is missing" for path in reference if path not in tree]
    return missing + [f"{path} differs" for path, mark in tree.items() if reference.get(path, mark) != mark]


def leftovers(tree: Snapshot, reference: Snapshot) -> list[str]:
    """Return the files and folders that the reference lacks."""
    return [f"{path} is left over" for path in tree if path not in reference]


def half_files(folder: Path, *, references: Iterable[Snapshot]) -> list[str]:
    """Return files with final names that cannot be read to the end; files that are in `references` are complete."""
    complete = {mark for tree in references for mark in tree.values()}
    faulty = []
    for path, mark in snapshot(folder).items():
        if path.endswith("/") or is_hidden(path) or mark in complete:
            continue
        try:
            _PARSERS.get(PurePosixPath(path).suffix, _parse_nothing)(folder / path)
        except Exception as error:  # every parser has exceptions of its own
            reason = (str(error).splitlines() or [""])[0]
            faulty.append(f"{path} is cut short or damaged ({type(error).__name__}: {reason[:100]})")
    return faulty


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name in NOT_COMPARED:
        with suppress(ValueError, AttributeError):
            record = json.loads(content)
            compared = {key: value for key, value in record.items() if key not in NOT_COMPARED[path.name]}
            content = json.dumps(compared, sort_keys=True).encode()
    mark = hashlib.sha256(content)
    if path.suffix == ".pt":
        with suppress(Exception):  # a damaged one is left to half_files
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            mark = hashlib.sha256()
            _add_values(state, mark)
    return mark.hexdigest()


def _add_values(value: object, mark: hashlib._Hash) -> None:
    """Add a checkpoint's nested values to a hash."""
    if isinstance(value, dict):
        for key in value:
            mark.update(repr(key).encode())
            _add_values(value[key], mark)
    elif isinstance(value, (list, tuple)):
        mark.update(f"{type(value).__name__} of {len(value)}".encode())
        for item in value:
            _add_values(item, mark)
    elif isinstance(value, torch.Tensor):
        mark.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    else:
        mark.update(repr(value).encode())


def _parse_nothing(path: Path) -> None:
    """Accept a file of a kind that has no end to check."""


def _parse_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError("the last line is cut")
    if path.suffix == ".jsonl":
        for line in text.splitlines():
            json.loads(line)


def _parse_arrow(path: Path) -> None:
    content = path.read_bytes()
    (pa.ipc.open_file if content[:6] == b"ARROW1" else pa.ipc.open_stream)(content).read_all()


def _parse_tensors(path: Path) -> None:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            file.get_tensor(name)


def _parse_state(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        if (damaged := file.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")


def _parse_page(path: Path) -> None:
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("it has no end")


def _parse_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _parse_tar(path: Path) -> None:
    if path.stat().st_size % tarfile.RECORDSIZE:
        raise ValueError("it has no end")
    with tarfile.open(path) as file:
        for member in file:
            content = file.extractfile(member)
            if content is None or len(content.read()) != member.size:
                raise ValueError(f"{member.name} is cut")


_PARSERS: dict[str, Callable[[Path], object]] = {
    ".parquet": pq.read_table,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": _parse_lines,
    ".csv": _parse_lines,
    ".toml": _parse_lines,
    ".arrow": _parse_arrow,
    ".safetensors": _parse_tensors,
    ".pt": _parse_state,
    ".html": _parse_page,
    ".png": _parse_picture,
    ".tar": _parse_tar,
}
