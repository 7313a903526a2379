"""WebDataset tar files.

A sample is a sequence of consecutive members with the same key, the path up to the first dot of the base name. The part
after the dot is the column. Keys, labels and texts are read once, when the tars are indexed; media are read by shard.
"""

from __future__ import annotations

import io
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...errors import DatasetError
from ...media.files import kind_of_path
from ...parsing import BROKEN, check_header, read_array
from ...remote.paths import AnyPath, RemotePath, source_path
from ...remote.ranged_file import RangedFile
from ...remote.requests import thread_pool
from ..columns import SPLIT
from ..modalities import KINDS
from ..not_read import NotRead
from . import Plan
from .sample import sample_size, spread_positions
from .sources import check_fetched, common_folder, find_files, match_files, splits_of
from .tables import concat_rows
from .tar_index import TarSample, index_tar, open_tar

log = logging.getLogger("mmaudit")

KEY = "__key__"  # the column of keys, as in webdataset and `datasets`
_SHARD_BYTES = 1 << 26  # of media per shard, unless a single sample has more


@dataclass(frozen=True, slots=True, kw_only=True)
class TarShard:
    """Some samples of a tar: `rows` holds the columns read while indexing, `positions` locates the other members.

    `positions` has int64 columns `offset:NAME` and `size:NAME` in bytes, null where a sample has no such member.
    `start` is the number of samples before them in the tar.
    """

    index: int
    first: int
    num_rows: int
    path: str
    rows: pa.Table
    positions: pa.Table
    schema: pa.Schema
    start: int

    @property
    def location(self) -> tuple[str, int, int]:
        """The file, and the first sample in it."""
        return self.path, 0, self.start

    @property
    def num_bytes(self) -> int:
        """Bytes of the members that are read by shard."""
        sizes = [name for name in self.positions.column_names if name.startswith("size:")]
        return sum(pc.sum(self.positions[name]).as_py() or 0 for name in sizes)

    def slice(self, position: int) -> TarShard:
        """Return the shard of one sample, given its number in the source."""
        row = position - self.first
        one = {"rows": self.rows.slice(row, 1), "positions": self.positions.slice(row, 1)}
        return replace(self, first=position, start=self.start + row, num_rows=1, **one)

    def values(self, name: str) -> pa.ChunkedArray | None:
        """Return a column, or the offsets of its members; None if no sample of the shard has one."""
        table, key = (self.rows, name) if name in self.rows.column_names else (self.positions, f"offset:{name}")
        return table[key] if key in table.column_names else None

    def read(self, columns: list[str]) -> pa.Table:
        """Read only the members of these columns, in file order."""
        member_names = [name for name in columns if name not in self.rows.column_names]
        contents: dict[str, list[Any]] = {name: [] for name in member_names}
        if member_names:
            with open_tar(source_path(self.path)) as file:
                if isinstance(file, RangedFile):
                    file.preload(self._ranges(member_names))
                for row in range(self.num_rows):
                    for name in member_names:
                        contents[name].append(self._read_member(file, row, name))
        rows = self.rows
        for name, cells in contents.items():
            field_ = self.schema.field(name)
            rows = rows.append_column(field_, pa.array(cells, field_.type))
        return rows.select(columns)

    def _ranges(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Return the bytes (start, end) of all members of these columns."""
        ranges = []
        for name in names:
            if f"offset:{name}" in self.positions.column_names:
                offsets, sizes = (self.positions[f"{key}:{name}"].to_pylist() for key in ("offset", "size"))
                pairs = zip(offsets, sizes, strict=True)
                ranges += [(offset, offset + size) for offset, size in pairs if offset is not None]
        return ranges

    def _read_member(self, file: BinaryIO, row: int, name: str) -> Any:
        if f"offset:{name}" not in self.positions.column_names:
            return None
        offset, size = (self.positions[f"{quantity}:{name}"][row].as_py() for quantity in ("offset", "size"))
        if offset is None:
            return None
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise DatasetError(f"{self.path} was truncated after it was opened: run the command again")
        return _parse_vector(data, f"{self.path}, {self.rows[KEY][row].as_py()}.{name}") if _is_vector(name) else data


def find_tars(data: str) -> list[AnyPath]:
    """Return the tars of a file, a glob or brace pattern, or a folder and its subfolders; [] if there are none."""
    path = source_path(data)
    if path.is_dir():
        return find_files(path, [".tar"])
    if path.is_file():
        if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DatasetError(f"{data} is compressed and has no random access to its members: unpack it to a .tar")
        return [path] if path.suffix == ".tar" else []
    return match_files(data, [".tar"])


def plan_tars(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    """Plan the samples of a tar, a glob of tars, or a folder of tars with subfolders named after splits."""
    paths = find_tars(data)
    return plan_tar_files(paths, shard_rows=shard_rows) if paths else None


def plan_tar_files(paths: Sequence[AnyPath], *, shard_rows: int) -> Plan:
    """Index tars and plan their samples; a column that a sample does not have is null there.

    Raises DatasetError for a tar without samples, a truncated or damaged tar, and a repeated key.
    """
    check_fetched(paths)
    concurrently = thread_pool().map if isinstance(paths[0], RemotePath) else map
    samples_of_tar = list(concurrently(index_tar, paths))
    _check_keys(paths, samples_of_tar)
    _warn_of_dots(paths, samples_of_tar)
    root = common_folder(paths)
    splits = splits_of(paths, root=root)
    tables = [_value_table(samples, split) for samples, split in zip(samples_of_tar, splits, strict=True)]
    schema = concat_rows([table.slice(0, 0) for table in tables], source=str(root)).schema
    member_names = sorted(
        {name for samples in samples_of_tar for sample in samples for name in sample.positions}, key=_kind_order
    )
    for name in member_names:
        if name in schema.names:
            raise DatasetError(f"{root}: {name!r} is both an extension and a field of .json members")
        schema = schema.append(pa.field(name, pa.list_(pa.float32()) if _is_vector(name) else pa.binary()))
    shards: list[TarShard] = []
    first = 0
    for path, samples, table in zip(paths, samples_of_tar, tables, strict=True):
        for start, end in _shard_bounds(samples, shard_rows=shard_rows):
            shard = TarShard(
                index=len(shards),
                first=first + start,
                num_rows=end - start,
                path=str(path),
                rows=_align_columns(table, schema, member_names).take(pa.array(range(start, end), pa.int64())),
                positions=_position_table(samples[start:end]),
                schema=schema,
                start=start,
            )
            shards.append(shard)
        first += len(samples)
    return Plan(
        root=root, sample=_sample(shards, schema), shards=tuple(shards), not_read=_nested_fields(samples_of_tar)
    )


def _nested_fields(samples_of_tar: Sequence[Sequence[TarSample]]) -> tuple[NotRead, ...]:
    """Return the fields of .json members that hold lists of lists or objects."""
    counts = Counter(name for samples in samples_of_tar for sample in samples for name in sample.nested)
    return tuple(
        NotRead(
            name=name,
            form=f"nested field of {count} .json members",
            remedy="write its parts as fields of their own, and vectors as .npy members",
        )
        for name, count in sorted(counts.items())
    )


def _sample(shards: Sequence[TarShard], schema: pa.Schema) -> pa.Table:
    """Return samples spread over all tars, of at most 64 MiB together, and for each column the first with a value."""
    num_rows = shards[-1].first + shards[-1].num_rows
    with_values = (_first_with(shards, name) for name in schema.names)
    positions = [*(row for row in with_values if row is not None), *spread_positions(num_rows, sample_size(schema))]
    firsts = [shard.first for shard in shards]
    sample: dict[int, pa.Table] = {}
    num_bytes = 0
    for position in dict.fromkeys(positions):
        shard = shards[bisect_right(firsts, position) - 1].slice(position)
        if not sample or num_bytes + shard.num_bytes <= _SHARD_BYTES:
            sample[position] = shard.read(schema.names)
            num_bytes += shard.num_bytes
    return pa.concat_tables([sample[position] for position in sorted(sample)]).combine_chunks()


def _first_with(shards: Sequence[TarShard], name: str) -> int | None:
    """Return the number of the first sample that has a value in a column; None if there is none."""
    for shard in shards:
        column = shard.values(name)
        if column is not None and column.null_count < len(column):
            return shard.first + int(np.flatnonzero(column.is_valid().to_numpy())[0])
    return None


def _check_keys(paths: Sequence[AnyPath], samples_of_tar: Sequence[Sequence[TarSample]]) -> None:
    tar_of_key: dict[str, AnyPath] = {}
    for path, samples in zip(paths, samples_of_tar, strict=True):
        for sample in samples:
            if sample.key in tar_of_key:
                raise DatasetError(
                    f"the key {sample.key} is repeated in {path}, after {tar_of_key[sample.key]}: "
                    "the members of a sample must be consecutive, and keys must be unique"
                )
            tar_of_key[sample.key] = path


def _warn_of_dots(paths: Sequence[AnyPath], samples_of_tar: Sequence[Sequence[TarSample]]) -> None:
    """Log a warning of columns that begin with a number: probably parts of keys with dots, as in 22.05.png."""
    for path, samples in zip(paths, samples_of_tar, strict=True):
        for sample in samples:
            for name in (*sample.positions, *sample.values):
                if name.partition(".")[0].isdigit():
                    log.warning(
                        "%s: the member %s.%s is the column %s of the sample %s, since a key ends at the first dot of "
                        "a name: if the key holds dots, replace them when the tar is written",
                        path,
                        sample.key,
                        name,
                        name,
                        sample.key,
                    )
                    return


def _value_table(samples: Sequence[TarSample], split: str | None) -> pa.Table:
    """Return keys, labels, texts and .json fields as columns, and `split` unless there is such a field."""
    names = sorted({name for sample in samples for name in sample.values})
    columns = {KEY: pa.array([sample.key for sample in samples], pa.string())}
    columns |= {name: _to_column([sample.values.get(name) for sample in samples]) for name in names}
    if split is not None:
        columns.setdefault(SPLIT, pa.array([split] * len(samples), pa.string()))
    return pa.table(columns)


def _to_column(values: Sequence[Any]) -> pa.Array:
    """Convert values to an array of their common type, or of strings if they have none."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _align_columns(rows: pa.Table, schema: pa.Schema, member_names: Sequence[str]) -> pa.Table:
    """Return rows of one tar with the columns and types of all tars."""
    fields = [field_ for field_ in schema if field_.name not in member_names]
    for field_ in fields:
        if field_.name not in rows.column_names:
            rows = rows.append_column(field_, pa.nulls(rows.num_rows, field_.type))
    return rows.select([field_.name for field_ in fields]).cast(pa.schema(fields))


def _shard_bounds(samples: Sequence[TarSample], *, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of shards of at most `shard_rows` samples and 64 MiB of media, at least one sample."""
    start, num_bytes = 0, 0
    for row, sample in enumerate(samples):
        size = sum(size for _, size in sample.positions.values())
        if row > start and (row - start >= shard_rows or num_bytes + size > _SHARD_BYTES):
            yield start, row
            start, num_bytes = row, 0
        num_bytes += size
    yield start, len(samples)


def _kind_order(name: str) -> tuple[int, str]:
    """Sort key of member columns, the same order as in other sources: audio, then image and video, then the rest."""
    kind = kind_of_path(f"x.{name}")
    return (KINDS.index(kind) if kind else len(KINDS), name)


def _position_table(samples: Sequence[TarSample]) -> pa.Table:
    names = sorted({name for sample in samples for name in sample.positions})
    columns = {}
    for name in names:
        positions = [sample.positions.get(name, (None, None)) for sample in samples]
        columns[f"offset:{name}"] = pa.array([offset for offset, _ in positions], pa.int64())
        columns[f"size:{name}"] = pa.array([size for _, size in positions], pa.int64())
    return pa.table(columns)


def _is_vector(name: str) -> bool:
    return name == "npy" or name.endswith(".npy")


def _parse_vector(data: bytes, where: str) -> NDArray[np.float32]:
    try:
        check_header(io.BytesIO(data), num_bytes=len(data))
        array = read_array(io.BytesIO(data))
    except BROKEN as error:
        raise DatasetError(f"{where} cannot be read: {str(error)[:200]}") from error
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise DatasetError(
            f"{where} is of shape {array.shape} and type {array.dtype}; features must be a vector of numbers"
        )
    return np.asarray(array, dtype=np.float32)
