"""Indexes of WebDataset tars: samples with their labels and texts, and the positions of their media.

An index is kept in the cache of this machine under the path or URL of its tar, with size and times or tag, so that
later stages and commands read no headers again.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import Any, BinaryIO

from ...errors import DatasetError
from ...media.files import is_hidden
from ...parsing import decode_text, parse_data_json
from ...remote.cache import read_entry, write_entry
from ...remote.paths import AnyPath, RemotePath
from ...storage import file_stamp, open_regular

log = logging.getLogger("mmaudit")

_JSON_NAMES = ("json", "jsn")
_NUMBER_NAMES = ("cls", "index", "inx", "id")
_TEXT_NAMES = ("txt", "text", "transcript")
_HEADER_BYTES = 512  # bytes of a tar's header
_INDEX_VERSION = 1  # raised when an index of the same tar changes
_MIN_KEPT = 1_000  # samples of a tar on this machine, whose index is kept: fewer are read within 0.1 s


@dataclass(slots=True)
class TarSample:
    """The members of one key: `values` by column, and (offset, size) in bytes of the unread members by column.

    `nested` are the names of fields of .json members that are not read.
    """

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    nested: list[str] = field(default_factory=list)
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)


def index_tar(path: AnyPath) -> list[TarSample]:
    """Return the samples of one tar, in file order.

    Raises DatasetError for a tar without samples, one that is truncated or damaged, and a repeated member.
    """
    samples, skipped = _read_index(path) or _read_headers(path)
    if skipped:
        log.info("%s: skipped %d members without a key and an extension, such as %s", path, len(skipped), skipped[0])
    if not samples:
        raise DatasetError(f"{path} has no samples: its members must be named KEY.EXTENSION, such as 0001.wav")
    return samples


def _read_headers(path: AnyPath) -> tuple[list[TarSample], list[str]]:
    """Return the samples of a tar and the names of members that belong to none; keep them in the cache."""
    stamp = file_stamp(path)
    samples: list[TarSample] = []
    skipped: list[str] = []
    with open_tar(path) as file:
        for member in _iter_members(path, file):
            decoded = member.name.encode("utf-8", "replace").decode()  # replaces surrogates of other encodings
            folder, slash, base = decoded.removeprefix("./").rpartition("/")
            stem, dot, extension = base.partition(".")
            if is_hidden(decoded) or not (stem and dot and extension):
                skipped.append(member.name)
                continue
            key, name = f"{folder}{slash}{stem}", extension.lower()
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key=key))
            _add_member(samples[-1], name, member, file, where=f"{path}, {member.name}")
    is_many = isinstance(path, RemotePath) or len(samples) >= _MIN_KEPT
    if is_many and stamp is not None and stamp[2] and stamp == file_stamp(path):
        content = [[astuple(sample) for sample in samples], skipped]
        write_entry(_key(stamp), zlib.compress(json.dumps(content).encode(), 1))
    return samples, skipped


def _key(stamp: object) -> tuple[object, ...]:
    return "tar index", _INDEX_VERSION, stamp


def _read_index(path: AnyPath) -> tuple[list[TarSample], list[str]] | None:
    """Return what the cache holds of a tar; None if there is nothing, or it is damaged."""
    stamp = file_stamp(path)
    if stamp is None or not stamp[2] or (data := read_entry(_key(stamp))) is None:
        return None
    with suppress(zlib.error, ValueError, TypeError):
        rows, skipped = json.loads(zlib.decompress(data))
        return [
            TarSample(
                key=key,
                values=values,
                nested=nested,
                positions={name: (offset, size) for name, (offset, size) in positions.items()},
            )
            for key, values, nested, positions in rows
        ], skipped
    return None


def open_tar(path: AnyPath) -> BinaryIO:
    """Open a tar; raise DatasetError if it cannot be read."""
    try:
        return open_regular(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def _iter_members(path: AnyPath, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar; DatasetError at an invalid header, where `tarfile` stops without an error."""
    file_size, offset = file.seek(0, os.SEEK_END), 0
    file.seek(0)
    try:
        archive = tarfile.TarFile(fileobj=file)
        while True:
            offset = archive.offset
            member = archive.next()
            if member is None:
                break
            if member.issym() or member.islnk() or member.issparse():
                raise DatasetError(f"{path}, {member.name} is a link or sparse: pack the files themselves")
            if member.offset_data + member.size > file_size:
                raise DatasetError(
                    f"{path} ends at byte {file_size}, within {member.name}: it is truncated; fetch it again"
                )
            if member.isreg():
                yield member
    except (tarfile.TarError, ValueError) as error:
        raise DatasetError(f"{path}: the header at byte {offset} cannot be read ({error}); fetch it again") from error
    file.seek(offset)
    if any(file.read(_HEADER_BYTES)):
        raise DatasetError(f"{path}: the header at byte {offset} cannot be read; fetch it again")


def _add_member(sample: TarSample, name: str, member: tarfile.TarInfo, file: BinaryIO, *, where: str) -> None:
    if name in sample.positions or name in sample.values:
        raise DatasetError(f"{where} is repeated, or .json has a field of this name: rename one")
    if name not in (*_JSON_NAMES, *_NUMBER_NAMES, *_TEXT_NAMES) and not name.endswith(".txt"):
        sample.positions[name] = (member.offset_data, member.size)
        return
    file.seek(member.offset_data)
    try:
        text = decode_text(file.read(member.size))
        if name in _JSON_NAMES:
            values, nested = _json_fields(text)
            sample.nested += nested
        else:
            values = {name: _parse_number(text.strip()) if name in _NUMBER_NAMES else text}
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{where} cannot be read: {error}") from error
    if repeated := next((key for key in values if key in sample.positions or key in sample.values), None):
        raise DatasetError(f"{where} has a field {repeated!r} and a member of this name: rename one")
    sample.values |= values


def _parse_number(text: str) -> int | str:
    """Return the integer if this is its canonical form, else the text: 007 stays a string."""
    return int(text) if text.removeprefix("-").isdecimal() and str(int(text)) == text else text


def _json_fields(text: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a .json member that hold a scalar or a list of scalars, and the names of nested ones.

    The fields of webdataset, such as `__key__`, are left out.
    """
    content = parse_data_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    fields = {name: value for name, value in content.items() if not name.startswith("__")}
    flat = {name: value for name, value in fields.items() if _is_flat(value)}
    return flat, [name for name in fields if name not in flat]


def _is_flat(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(element, (list, dict)) for element in value)
    return not isinstance(value, dict)
