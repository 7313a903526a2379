"""WebDataset tar files.

A sample is the members of one key, the path up to the first dot of its base name, one after another. What follows the
dot names the column. Names, labels and texts are read once, when the tars are indexed; media stay where they are.
"""

from __future__ import annotations

import glob
import io
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ... import numpy_files as npy
from ...errors import DatasetError
from ...parsing import parse_data_json
from ...storage import open_regular
from ..columns import SPLIT, split_of_file, split_of_folder
from ..modalities import KINDS, kind_of_path
from .tables import HEAD_ROWS, Plan, concat_rows

log = logging.getLogger("mmaudit")

KEY = "__key__"  # the column of keys, as webdataset and `datasets` call it
_JSON = ("json", "jsn")
_NUMBERS = ("cls", "index", "inx", "id")
_TEXTS = ("txt", "text", "transcript")
_SHARD_BYTES = 1 << 26  # media of a shard, unless one sample alone has more
_BLOCK = 512  # bytes of a tar's header


@dataclass(frozen=True, slots=True, kw_only=True)
class TarShard:
    """Some samples of a tar: `rows` has what was read from it already, `places` where each other member stands.

    `places` has int64 columns `offset:NAME` and `size:NAME` in bytes, null where a sample has no such member.
    """

    index: int
    first: int
    num_rows: int
    path: str
    rows: pa.Table
    places: pa.Table
    schema: pa.Schema

    def read(self, columns: list[str]) -> pa.Table:
        """Read the members of these columns, and no others, in the order they stand in."""
        kept = [name for name in columns if name not in self.rows.column_names]
        found: dict[str, list[Any]] = {name: [] for name in kept}
        if kept:
            with open(self.path, "rb") as file:
                for row in range(self.num_rows):
                    for name in kept:
                        found[name].append(self._read_member(file, row, name))
        arrays = [
            pa.chunked_array([pa.array(found[name], self.schema.field(name).type)])
            if name in found
            else self.rows[name]
            for name in columns
        ]
        return pa.table(arrays, schema=pa.schema([self.schema.field(name) for name in columns]))

    def _read_member(self, file: BinaryIO, row: int, name: str) -> Any:
        if f"offset:{name}" not in self.places.column_names:
            return None
        offset, size = (self.places[f"{what}:{name}"][row].as_py() for what in ("offset", "size"))
        if offset is None:
            return None
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise DatasetError(f"{self.path} has become shorter since it was opened: run the command again")
        return _vector(data, f"{self.path}, {self.rows[KEY][row].as_py()}.{name}") if _is_vector(name) else data


@dataclass(slots=True)
class Sample:
    """The members of one key: what was read of them, and (offset, size) in bytes of the others by column."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def find_tars(data: str) -> list[Path]:
    """Give the tars of a file, a glob, or a folder and its folders that name splits; none where it is none of these."""
    path = Path(data)
    if path.is_dir():
        inside = sorted(each for each in path.iterdir() if each.is_dir() and split_of_folder(each.name))
        return [tar for folder in (path, *inside) for tar in sorted(folder.glob("*.tar"))]
    if path.is_file():
        if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DatasetError(f"{data} is compressed, and its members cannot be read singly: unpack it to a .tar")
        return [path] if path.suffix == ".tar" else []
    matches = [Path(match) for match in sorted(glob.glob(data))] if glob.has_magic(data) else []
    return matches if matches and all(match.suffix == ".tar" for match in matches) else []


def plan_tars(paths: Sequence[Path], *, shard_rows: int) -> Plan:
    """Index tars and plan their samples. A column that some samples lack is null there.

    Raises DatasetError for a tar without samples, one that cannot be read to its end, and a key that comes twice.
    """
    indexed = [_index(path) for path in paths]
    _check_keys(paths, indexed)
    splits = _splits_of(paths)
    rows = [_values(samples, split) for samples, split in zip(indexed, splits, strict=True)]
    schema = concat_rows([table.slice(0, 0) for table in rows], whence=str(paths[0].parent)).schema
    members = sorted({name for samples in indexed for sample in samples for name in sample.places}, key=_by_kind)
    for name in members:
        if name in schema.names:
            raise DatasetError(f"{paths[0].parent}: {name!r} is both a kind of member and a field of .json members")
        schema = schema.append(pa.field(name, pa.list_(pa.float32()) if _is_vector(name) else pa.binary()))
    shards: list[TarShard] = []
    first = 0
    for path, samples, table in zip(paths, indexed, rows, strict=True):
        for start, end in _cut(samples, shard_rows=shard_rows):
            shard = TarShard(
                index=len(shards),
                first=first + start,
                num_rows=end - start,
                path=str(path),
                rows=_conform(table, schema, members).take(pa.array(range(start, end), pa.int64())),
                places=_places(samples[start:end]),
                schema=schema,
            )
            shards.append(shard)
        first += len(samples)
    head = shards[0].read(schema.names).slice(0, HEAD_ROWS)
    return Plan(root=paths[0].parent, head=head, shards=tuple(shards))


def _index(path: Path) -> list[Sample]:
    """List the samples of one tar, in their order."""
    samples: list[Sample] = []
    skipped: list[str] = []
    with _open(path) as file:
        for member in _members(path, file):
            written = member.name.encode("utf-8", "replace").decode()  # a name in another encoding is no string
            folder, slash, base = written.removeprefix("./").rpartition("/")
            stem, dot, extension = base.partition(".")
            if not (stem and dot and extension):  # hidden files, and notes without an extension
                skipped.append(member.name)
                continue
            key, name = f"{folder}{slash}{stem}", extension.lower()
            if not samples or samples[-1].key != key:
                samples.append(Sample(key=key))
            _add(samples[-1], name, member, file, where=f"{path}, {member.name}")
    if skipped:
        log.info(
            "%s: %d members without a key and an extension are left out, such as %s", path, len(skipped), skipped[0]
        )
    if not samples:
        raise DatasetError(f"{path} holds no sample: its members should be called KEY.EXTENSION, such as 0001.wav")
    return samples


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar. `tarfile` ends quietly at a header that is none; here that is an error."""
    end, at = path.stat().st_size, 0
    try:
        archive = tarfile.TarFile(fileobj=file)
        while True:
            at = archive.offset
            member = archive.next()
            if member is None:
                break
            if member.issym() or member.islnk() or member.issparse():
                raise DatasetError(f"{path}, {member.name} is a link or has holes: pack the files themselves")
            if member.offset_data + member.size > end:
                raise DatasetError(f"{path} ends at byte {end}, within {member.name}: it is truncated; fetch it again")
            if member.isreg():
                yield member
    except (tarfile.TarError, ValueError) as error:
        raise DatasetError(f"{path}: the header at byte {at} cannot be read ({error}); fetch it again") from error
    file.seek(at)
    if any(file.read(_BLOCK)):
        raise DatasetError(f"{path}: the header at byte {at} cannot be read; fetch it again")


def _add(sample: Sample, name: str, member: tarfile.TarInfo, file: BinaryIO, *, where: str) -> None:
    if name in sample.places or name in sample.values:
        raise DatasetError(f"{where} stands twice, or .json has a field of this name: rename one")
    if name not in (*_JSON, *_NUMBERS, *_TEXTS) and not name.endswith(".txt"):
        sample.places[name] = (member.offset_data, member.size)
        return
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode("utf-8-sig")
        found = _fields(text) if name in _JSON else {name: _number(text.strip()) if name in _NUMBERS else text}
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{where} cannot be read: {error}") from error
    if twice := next((key for key in found if key in sample.places or key in sample.values), None):
        raise DatasetError(f"{where} has a field {twice!r} beside a member of this name: rename one")
    sample.values |= found


def _number(text: str) -> int | str:
    """Give the integer that is written so and in no other way: 007 stays a name."""
    return int(text) if text.removeprefix("-").isdecimal() and str(int(text)) == text else text


def _fields(text: str) -> dict[str, Any]:
    """Give the fields of a .json member that hold a value, or a list of values; not those of webdataset's own."""
    content = parse_data_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is no object of fields")
    return {name: value for name, value in content.items() if _is_flat(value) and not name.startswith("__")}


def _is_flat(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(each, (list, dict)) for each in value)
    return not isinstance(value, dict)


def _check_keys(paths: Sequence[Path], indexed: Sequence[Sequence[Sample]]) -> None:
    seen: dict[str, Path] = {}
    for path, samples in zip(paths, indexed, strict=True):
        for sample in samples:
            if sample.key in seen:
                raise DatasetError(
                    f"the key {sample.key} comes again in {path}, after {seen[sample.key]}: "
                    "the members of a sample must follow one another, and keys be unique"
                )
            seen[sample.key] = path


def _splits_of(paths: Sequence[Path]) -> list[str | None]:
    """Read the split off each tar's name or its folder's, where all of them have one."""
    found = [split_of_file(path.name) or split_of_folder(path.absolute().parent.name) for path in paths]
    if not all(found):
        return [None] * len(paths)
    log.info("split by the names of the tars: %s", ", ".join(f"{n} {name}" for name, n in Counter(found).items()))
    return found


def _values(samples: Sequence[Sample], split: str | None) -> pa.Table:
    """Give keys, labels, texts and the fields of .json members as columns, and `split` unless there is such a field."""
    names = sorted({name for sample in samples for name in sample.values})
    columns = {KEY: pa.array([sample.key for sample in samples], pa.string())}
    columns |= {name: _column([sample.values.get(name) for sample in samples]) for name in names}
    if split is not None:
        columns.setdefault(SPLIT, pa.array([split] * len(samples), pa.string()))
    return pa.table(columns)


def _column(values: Sequence[Any]) -> pa.Array:
    """Give values the type they have in common: strings where they have none."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _conform(rows: pa.Table, schema: pa.Schema, members: Sequence[str]) -> pa.Table:
    """Give rows of one tar the columns of all."""
    fields = [field_ for field_ in schema if field_.name not in members]
    columns = [
        rows[each.name].cast(each.type) if each.name in rows.column_names else pa.nulls(rows.num_rows, each.type)
        for each in fields
    ]
    return pa.table(columns, schema=pa.schema(fields))


def _cut(samples: Sequence[Sample], *, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of runs of at most `shard_rows` samples and 64 MiB of media, one sample at least."""
    start, held = 0, 0
    for row, sample in enumerate(samples):
        size = sum(size for _, size in sample.places.values())
        if row > start and (row - start >= shard_rows or held + size > _SHARD_BYTES):
            yield start, row
            start, held = row, 0
        held += size
    yield start, len(samples)


def _by_kind(name: str) -> tuple[int, str]:
    """Sort columns of members as other sources have them: sound first, then sight, then what is no medium."""
    kind = kind_of_path(f"x.{name}")
    return (KINDS.index(kind) if kind else len(KINDS), name)


def _places(samples: Sequence[Sample]) -> pa.Table:
    names = sorted({name for sample in samples for name in sample.places})
    columns = {}
    for name in names:
        found = [sample.places.get(name, (None, None)) for sample in samples]
        columns[f"offset:{name}"] = pa.array([offset for offset, _ in found], pa.int64())
        columns[f"size:{name}"] = pa.array([size for _, size in found], pa.int64())
    return pa.table(columns)


def _is_vector(name: str) -> bool:
    return name == "npy" or name.endswith(".npy")


def _vector(data: bytes, where: str) -> NDArray[np.float32]:
    try:
        npy.check_header(io.BytesIO(data), num_bytes=len(data))
        array = npy.read_array(io.BytesIO(data))
    except npy.BROKEN as error:
        raise DatasetError(f"{where} cannot be read: {str(error)[:200]}") from error
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise DatasetError(f"{where} is of shape {array.shape} and type {array.dtype}; features are one row of numbers")
    return np.asarray(array, dtype=np.float32)
