"""Encoding of a dataset into the feature cache: one Arrow file per shard and modality.

A row of a file holds the digest of the content that its vector was computed from, and a stamp of the files that hold
the content: their paths, sizes and times. Content is hashed to find its vector; with `trust_unchanged` only where the
stamp has changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.dataset import Dataset
from ..dataset.formats import Shard
from ..dataset.modalities import Modality, is_array
from ..errors import DatasetError, Reason, UnusableError, attach_file_name
from ..hashing import digest
from ..media.files import MediaConfig
from ..media.media_file import MediaFile, Medium
from ..remote.paths import RemotePath
from ..remote.settings import remote_settings
from ..storage import atomic_write, file_stamp
from ..workers import PROCESS_ROWS, Progress, fixed_threads, prefetch_map, run_tasks
from .encoders import encode_cell, is_pretrained, preprocessing
from .pretrained import ModelInputs, encode_inputs, open_model
from .vectors import EncodedCell, EncodedRows, EncodeResult, combine_results, encode_vectors

Stamps = Sequence[str | None]


def read_arrow(path: Path) -> pa.Table:
    """Map an Arrow file into memory; DatasetError if it is damaged."""
    return locate_arrow(path)[0]


def locate_arrow(path: Path) -> tuple[pa.Table, int]:
    """Map an Arrow file into memory; return its table and the address of its first byte."""
    try:
        with pa.memory_map(str(path)) as source:
            address = source.read_buffer(1).address
            source.seek(0)
            return pa.ipc.open_file(source).read_all(), address
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it, and it is created again") from error


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file atomically."""
    write_pieces([table], path)


def write_pieces(pieces: Iterable[pa.Table], path: Path) -> int:
    """Write a table, of which there are one or several pieces, as an Arrow file atomically; return its rows."""
    tables = iter(pieces)
    table, num_rows = next(tables), 0
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as file,
    ):
        for piece in chain([table], tables):
            file.write_table(piece)
            num_rows += piece.num_rows
    return num_rows


@dataclass(frozen=True, kw_only=True)
class CachedVectors:
    """The existing cache file of a shard and modality, if there is one."""

    table: pa.Table | None

    @classmethod
    def of(cls, path: Path) -> CachedVectors:
        """Read the file; a damaged one, for example after a power failure, counts as absent and is written again."""
        try:
            table = read_arrow(path) if path.exists() else None
        except DatasetError:
            table = None
        # Files from before 2026-11-29 have no stamps or no fingerprints.
        is_current = table is not None and {"stamp", "fingerprint"} <= {*table.column_names}
        return cls(table=table if is_current else None)

    @cached_property
    def row(self) -> dict[bytes, int]:
        """The row of each content digest."""
        return {} if self.table is None else {key: row for row, key in enumerate(content_of(self.table).tolist())}

    @cached_property
    def content_of_stamp(self) -> dict[str | None, bytes]:
        """The content digest that each stamp was recorded with."""
        if self.table is None:
            return {}
        pairs = zip(self.table["stamp"].to_pylist(), content_of(self.table).tolist(), strict=True)
        return {stamp: content for stamp, content in pairs if stamp is not None}

    def result(self, content: bytes) -> EncodeResult:
        """Return the vector and fingerprint, or the error, of a content in `row`."""
        assert self.table is not None
        row = self.row[content]
        vector = column_of(self.table, "vector")
        if vector[row].is_valid:
            start, end = vector.offsets[row].as_py(), vector.offsets[row + 1].as_py()
            thumbnail = self.table["fingerprint"][row].as_py() or b""
            return EncodedCell(vector=np.asarray(vector.values[start:end].to_numpy()), fingerprint=thumbnail)
        return UnusableError(Reason(self.table["reason"][row].as_py()), self.table["detail"][row].as_py())

    def matches(self, **columns: Sequence[str | None] | None) -> bool:
        """Return whether the file's columns of these names hold these strings, row by row."""
        return self.table is not None and all(
            values is not None and column_of(self.table, name).equals(pa.array(values, pa.string()))
            for name, values in columns.items()
        )

    def is_current(self, ids: Sequence[str], stamps: Stamps, content: NDArray[np.bytes_]) -> bool:
        """Return whether the file contains exactly these rows, in this order."""
        return self.matches(sample_id=ids, stamp=stamps) and bool((content_of(self.table) == content).all())


def column_of(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array, without a copy if it has one chunk, which combine_chunks would copy."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def content_of(table: pa.Table) -> NDArray[np.bytes_]:
    """Return the content digests of the rows (n,), dtype S32."""
    column = column_of(table, "content")
    return np.frombuffer(column.buffers()[1], dtype="S32", count=len(column), offset=32 * column.offset)


def encoded_table(ids: Sequence[str], stamps: Stamps, encoded: EncodedRows) -> pa.Table:
    """Return the table of a cache file: sample_id, stamp, content, reason, detail, vector and fingerprint.

    The vector is null if the row is unusable; see `fingerprints` for the last column.
    """
    lengths = np.zeros(len(encoded.usable), dtype=np.int64)
    lengths[encoded.usable] = encoded.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    vector = pa.LargeListArray.from_arrays(offsets, pa.array(encoded.values), mask=pa.array(~encoded.usable))
    problems = [encoded.problem.get(row) for row in range(len(encoded.usable))]
    buffers = [None, pa.py_buffer(np.ascontiguousarray(encoded.content))]
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "stamp": pa.array(stamps, pa.string()),
            "content": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(encoded.content), buffers),
            "reason": pa.array([error and error.reason.value for error in problems], pa.string()),
            "detail": pa.array([error and error.detail for error in problems], pa.string()),
            "vector": vector,
            "fingerprint": pa.array(encoded.fingerprint or [None] * len(ids), pa.large_binary()),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """Everything a worker process needs to encode one shard. `dataset` has no shards, to keep the task small."""

    dataset: Dataset
    shard: Shard
    media: MediaConfig
    folder: Path
    trust_unchanged: bool = False

    def file(self, modality: Modality) -> Path:
        """Return the cache file of this shard's vectors of one modality."""
        version = f"{modality.name}-{preprocessing(modality, self.media)}"
        return self.folder / version / f"{self.shard.index:06d}.arrow"

    def row_stamps(self, column: str) -> list[str] | None:
        """Return a stamp of each row of a column that holds media or vectors, by the shard's file; else None."""
        if self.shard.location is None or not self.dataset.holds_data(column):
            return None
        file, *position = self.shard.location
        if (stamp := file_stamp(file)) is None:
            return None
        shard_stamp = digest(repr((stamp, position, column)).encode("utf-8", "surrogatepass"))
        return [f"{shard_stamp} {row}" for row in range(self.shard.num_rows)]

    def media_digest(self, *, with_cache: bool = False) -> str:
        """Return a digest of the sizes and times of the local files that the shard's cells name; "" if they name none.

        No file is opened, and nothing is asked about URLs. with_cache: Return a digest that no later call returns where
        a file has changed since the cache was written.
        """
        modalities = [modality for modality in self.dataset.modalities if self._names_files(modality)]
        if not modalities:
            return ""
        rows = self.dataset.read(self.shard, data=any(self.dataset.holds_data(m.column) for m in modalities))
        stamps, is_current = [], True
        for modality in modalities:
            cells = rows[modality.column].to_pylist()
            stamps.append([self.dataset.local_stamps(cell, modality) for cell in cells])
            if with_cache:
                cached = read_arrow(self.file(modality))["stamp"].to_pylist()
                own: Stamps = self.row_stamps(modality.column) or [None] * len(cells)
                is_current &= all(
                    known is None or known == self.dataset.stamp(cell, modality, stamp)
                    for known, cell, stamp, files in zip(cached, cells, own, stamps[-1], strict=True)
                    if files
                )
        if not any(files for column in stamps for files in column):
            return ""
        return digest(repr(stamps).encode()) if is_current else "changed meanwhile"

    def _names_files(self, modality: Modality) -> bool:
        """Return whether cells of a modality may name files: not if all hold their data, by the stamps of the cache."""
        if is_array(self.dataset.schema.field(modality.column).type):
            return False
        if not self.dataset.holds_data(modality.column):
            return modality.kind != "text" or modality.in_files
        cached = CachedVectors.of(self.file(modality))
        return not cached.matches(stamp=self.row_stamps(modality.column))


@fixed_threads()
def encode_dataset(
    dataset: Dataset,
    folder: Path,
    *,
    media: MediaConfig,
    num_workers: int,
    progress: Progress,
    device: str = "cpu",
    trust_unchanged: bool = False,
) -> list[EncodeTask]:
    """Encode what the cache in `folder` does not contain yet, in `num_workers` processes (0: in this process).

    A pretrained network runs in this process, on `device`, with `num_workers` threads that decode in advance. Every
    byte of the media is hashed, unless `trust_unchanged`: then files whose path, size and times are those of a cached
    vector are not opened; other files are hashed, and the vectors of known content are kept.
    """
    without_shards = replace(dataset, shards=())
    tasks = [
        EncodeTask(dataset=without_shards, shard=shard, media=media, folder=folder, trust_unchanged=trust_unchanged)
        for shard in dataset.shards
    ]
    if not tasks:
        return []
    models = [modality for modality in dataset.modalities if is_pretrained(modality)]
    modalities = [modality for modality in dataset.modalities if not is_pretrained(modality)]
    opens_media = any(
        modality.kind not in ("features", "text") or dataset.in_files(modality) for modality in modalities
    )
    all_cached = all(task.file(modality).exists() for task in tasks for modality in modalities)
    takes_long = opens_media or sum(task.shard.num_rows for task in tasks) >= PROCESS_ROWS
    # Comparing digests is faster than starting processes.
    processes = 0 if all_cached or not takes_long else num_workers
    passes = [run_tasks(_encode_without_model, tasks, num_workers=processes)] if modalities else []
    passes += [_run_model(tasks, modality, num_threads=num_workers, device=device) for modality in models]
    for done, _ in enumerate(chain.from_iterable(passes), start=1):
        progress("encode", done, len(passes) * len(tasks))
    return tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One column of a shard, with the cached vectors of the modalities that are read from it."""

    task: EncodeTask
    modalities: tuple[Modality, ...]
    cached: tuple[CachedVectors, ...]
    row_stamps: list[str] | None

    @classmethod
    def of(cls, task: EncodeTask, modalities: Sequence[Modality]) -> _Column:
        """Open the cache files of modalities that are read from the same column."""
        return cls(
            task=task,
            modalities=tuple(modalities),
            cached=tuple(CachedVectors.of(task.file(modality)) for modality in modalities),
            row_stamps=task.row_stamps(modalities[0].column),
        )

    @property
    def name(self) -> str:
        """Name of the column."""
        return self.modalities[0].column

    def is_unchanged(self, **columns: Sequence[str]) -> bool:
        """Return whether the cells need not be read: the shard's file is that of the cache, by its stamp."""
        return self.task.trust_unchanged and all(
            cache.matches(stamp=self.row_stamps, **columns) for cache in self.cached
        )

    def identify(self, row: int, cell: pa.Scalar) -> tuple[bytes, str | None, Any]:
        """Return content digest and stamp of a row, and the loaded cell, or None if its stamp is known and trusted."""
        row_stamp = None if self.row_stamps is None else self.row_stamps[row]
        value = cell.as_py()
        stamp = self.task.dataset.stamp(value, self.modalities[0], row_stamp)
        known = self.cached[0].content_of_stamp.get(stamp) if self.task.trust_unchanged else None
        if known is not None and all(known in cache.row for cache in self.cached):
            return known, stamp, None
        # The stamp was made before the file is read: a change in between is noticed by the next command.
        loaded, content = load_cell_content(self.task.dataset, self.modalities[0], value)
        return content, None if isinstance(loaded, UnusableError) and stamp != row_stamp else stamp, loaded

    def write(
        self, ids: Sequence[str], stamps: Stamps, content: Sequence[bytes], new: Sequence[dict[int, EncodeResult]]
    ) -> None:
        """Write the files of the modalities, with the new result of each row, else the cached one, unless identical."""
        digests = np.array(content, dtype="S32")
        for modality, cache, results in zip(self.modalities, self.cached, new, strict=True):
            if not cache.is_current(ids, stamps, digests):
                row_results = [results[n] if n in results else cache.result(key) for n, key in enumerate(content)]
                encoded = combine_results(content, row_results, modality=modality)
                write_arrow(encoded_table(ids, stamps, encoded), self.task.file(modality))


def _read_rows(task: EncodeTask, columns: Sequence[_Column]) -> tuple[pa.Table, list[str]]:
    """Read a shard's rows and ids; media and vectors within the rows only if one of these columns needs them."""
    with_data = [column for column in columns if task.dataset.holds_data(column.name)]
    if with_data and all(column.is_unchanged() for column in with_data):
        rows = task.dataset.read(task.shard, data=False)
        ids = task.dataset.sample_ids(rows, task.shard)
        if all(column.is_unchanged(sample_id=ids) for column in with_data):
            return rows, ids
    rows = task.dataset.read(task.shard)
    return rows, task.dataset.sample_ids(rows, task.shard)


def _encode_without_model(task: EncodeTask) -> None:
    """Encode all modalities without a pretrained network; a file that several modalities share is read once."""
    shared: dict[tuple[str, str], list[Modality]] = {}
    for modality in task.dataset.modalities:
        if not is_pretrained(modality):
            shared.setdefault(modality.content_key, []).append(modality)
    columns = [_Column.of(task, modalities) for modalities in shared.values()]
    rows, ids = _read_rows(task, columns)
    for column in columns:
        if not column.is_unchanged(sample_id=ids):
            reads_cells = column.modalities[0].kind != "features" or task.dataset.in_files(column.modalities[0])
            encode_column = _encode_cells if reads_cells else _encode_vectors
            encode_column(column, rows[column.name], ids)


def _encode_vectors(column: _Column, cells: pa.ChunkedArray, ids: Sequence[str]) -> None:
    for modality, cache in zip(column.modalities, column.cached, strict=True):
        encoded = encode_vectors(cells, modality)
        stamps: Stamps = column.row_stamps or [None] * len(ids)
        if not cache.is_current(ids, stamps, encoded.content):
            write_arrow(encoded_table(ids, stamps, encoded), column.task.file(modality))


def _encode_cells(column: _Column, cells: pa.ChunkedArray, ids: Sequence[str]) -> None:
    content: list[bytes] = []
    stamps: list[str | None] = []
    new: list[dict[int, EncodeResult]] = [{} for _ in column.modalities]
    # Of files at URLs the next ones are loaded while one is decoded.
    num_threads = column.task.dataset.read_threads(column.modalities[0], cells)
    identified = prefetch_map(lambda row: column.identify(row, cells[row]), range(len(cells)), num_threads=num_threads)
    for row, (digest_, stamp, loaded) in enumerate(identified):
        content.append(digest_)
        stamps.append(stamp)
        for modality, cache, results in zip(column.modalities, column.cached, new, strict=True):
            if digest_ not in cache.row:
                results[row] = encode_cell(loaded, modality, column.task.media)
    column.write(ids, stamps, content, new)


def load_cell_content(dataset: Dataset, modality: Modality, value: Any) -> tuple[Any, bytes]:
    """Return a cell's loaded value, or the UnusableError raised by loading it, and the digest of its content."""
    try:
        is_name = isinstance(value, str) and (modality.kind != "text" or modality.in_files)
        with attach_file_name(value if is_name else f"column {modality.column}"):
            loaded = dataset.load(value, modality)
            return loaded, _content_digest(loaded).encode()
    except UnusableError as error:
        return error, digest(str(error).encode()).encode()


def _content_digest(loaded: str | Medium | NDArray[np.float32] | Sequence[Sequence[Medium]]) -> str:
    if isinstance(loaded, np.ndarray):
        return digest(loaded.tobytes())  # as of vectors within the rows
    if isinstance(loaded, str):
        return digest(loaded.encode("utf-8", "surrogatepass"))
    if isinstance(loaded, (bytes, MediaFile)):
        return digest(loaded)
    return digest(*(digest(*folder).encode() for folder in loaded))


def _run_model(tasks: Sequence[EncodeTask], modality: Modality, *, num_threads: int, device: str) -> Iterator[None]:
    """Encode a modality by a pretrained network, one shard per step.

    While the network runs, threads read, decode and prepare the next samples, also those of the next shards.
    """
    name = modality.encoder.removeprefix("hf:")
    shards: deque[tuple[_Column, list[str]]] = deque()

    def cells() -> Iterator[tuple[_Column, int, pa.Scalar | None]]:
        for task in tasks:
            column = _Column.of(task, [modality])
            rows, ids = _read_rows(task, [column])
            shards.append((column, ids))
            unchanged = column.is_unchanged(sample_id=ids)
            for row in range(rows.num_rows):
                yield column, row, None if unchanged else rows[column.name][row]

    def prepare(request: tuple[_Column, int, pa.Scalar | None]) -> _Prepared:
        column, row, cell = request
        cache = column.cached[0]
        if cell is None:
            assert cache.table is not None
            return content_of(cache.table)[row], cache.table["stamp"][row].as_py(), None
        content, stamp, loaded = column.identify(row, cell)
        if content in cache.row:
            return content, stamp, None
        if isinstance(loaded, UnusableError):
            return content, stamp, loaded
        try:
            return content, stamp, open_model(name, modality.kind, device).prepare(loaded, column.task.media)
        except UnusableError as error:
            return content, stamp, error

    if isinstance(tasks[0].dataset.root, RemotePath):
        num_threads = max(num_threads, remote_settings().num_threads)
    prepared = prefetch_map(prepare, cells(), num_threads=num_threads)
    for task in tasks:
        content: list[bytes] = []
        stamps: list[str | None] = []
        new: dict[int, EncodeResult] = {}
        inputs = _iter_new_inputs(islice(prepared, task.shard.num_rows), content, stamps, new)
        for row, vector in encode_inputs(name, modality.kind, inputs, media=task.media, device=device):
            new[row] = EncodedCell(vector=vector)
        column, ids = shards.popleft()
        column.write(ids, stamps, content, [new])
        yield


_Prepared = tuple[bytes, str | None, ModelInputs | UnusableError | None]  # content, stamp; None: the vector is cached


def _iter_new_inputs(
    prepared: Iterator[_Prepared], content: list[bytes], stamps: list[str | None], new: dict[int, EncodeResult]
) -> Iterator[tuple[int, ModelInputs]]:
    """Yield (row, inputs) of the uncached rows of a shard; fill `content` and `stamps`, and `new` with errors."""
    for row, (digest_, stamp, outcome) in enumerate(prepared):
        content.append(digest_)
        stamps.append(stamp)
        if isinstance(outcome, UnusableError):
            new[row] = outcome
        elif outcome is not None:
            yield row, outcome
