"""Encoding of a dataset into the feature cache: one Arrow file per shard and modality."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..dataset.dataset import Dataset
from ..dataset.formats import Shard
from ..dataset.modalities import Modality
from ..errors import DatasetError, Reason, UnusableError, attach_file_name
from ..hashing import digest
from ..media.files import MediaConfig, MediaFile, Medium
from ..storage import atomic_write
from ..workers import Progress, fixed_threads, prefetch_map, run_tasks
from .encoders import EncodedRows, Vector, encode_cell, encode_vectors, is_pretrained, preprocessing
from .pretrained import ModelInputs, encode_inputs, open_model

EncodeResult = Vector | UnusableError


def read_arrow(path: Path) -> pa.Table:
    """Map an Arrow file into memory; DatasetError if it is damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it, and it is created again") from error


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file atomically."""
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as file,
    ):
        file.write_table(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedVectors:
    """The existing cache file of a shard and modality, if there is one; `row` maps a content digest to its row."""

    table: pa.Table | None
    row: dict[bytes, int]

    @classmethod
    def of(cls, path: Path) -> CachedVectors:
        """Read the file; a damaged one, for example after a power failure, counts as absent and is written again."""
        try:
            table = read_arrow(path) if path.exists() else None
        except DatasetError:
            table = None
        return cls(
            table=table,
            row={} if table is None else {digest_: n for n, digest_ in enumerate(content_of(table).tolist())},
        )

    def find(self, content: bytes) -> EncodeResult | None:
        """Return the vector or the error of this content, None if it is not in the file."""
        if self.table is None or content not in self.row:
            return None
        row = self.row[content]
        vector = column_of(self.table, "vector")
        if vector[row].is_valid:
            start, end = vector.offsets[row].as_py(), vector.offsets[row + 1].as_py()
            return np.asarray(vector.values[start:end].to_numpy())
        return UnusableError(Reason(self.table["reason"][row].as_py()), self.table["detail"][row].as_py())

    def is_current(self, ids: Sequence[str], content: NDArray[np.bytes_]) -> bool:
        """Return whether the file contains exactly these rows, in this order."""
        if self.table is None or self.table.num_rows != len(content):
            return False
        same_ids = column_of(self.table, "sample_id").equals(pa.array(ids, pa.string()))
        return bool(same_ids and (content_of(self.table) == content).all())


def column_of(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array, without a copy if it has one chunk, which combine_chunks would copy."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def content_of(table: pa.Table) -> NDArray[np.bytes_]:
    """Return the content digests of the rows (n,), dtype S32."""
    column = column_of(table, "content")
    return np.frombuffer(column.buffers()[1], dtype="S32", count=len(column), offset=32 * column.offset)


def problems_of(table: pa.Table) -> Iterator[tuple[int, Reason, str]]:
    """Yield row, reason and detail of each unusable row."""
    rows = np.flatnonzero(column_of(table, "reason").is_valid().to_numpy(zero_copy_only=False))
    unusable = table.select(["reason", "detail"]).take(pa.array(rows))
    for row, reason, detail in zip(
        rows.tolist(), unusable["reason"].to_pylist(), unusable["detail"].to_pylist(), strict=True
    ):
        yield row, Reason(reason), detail


def lengths_of(table: pa.Table) -> set[int]:
    """Return the distinct lengths of the usable vectors."""
    vector = column_of(table, "vector")
    valid = vector.is_valid().to_numpy(zero_copy_only=False)
    return set(np.unique(np.diff(vector.offsets.to_numpy())[valid]).tolist())


def combine_results(content: Sequence[bytes], results: Sequence[EncodeResult], *, encoder: str) -> EncodedRows:
    """Combine the vector or error of each row; DatasetError if vectors differ in length."""
    vectors = [result for result in results if not isinstance(result, UnusableError)]
    check_lengths({len(vector) for vector in vectors}, encoder)
    return EncodedRows(
        content=np.array(content, dtype="S32"),
        usable=np.array([not isinstance(result, UnusableError) for result in results], dtype=bool),
        vector=np.stack(vectors) if vectors else np.zeros((0, 0), np.float32),
        problem={row: result for row, result in enumerate(results) if isinstance(result, UnusableError)},
    )


def check_lengths(lengths: set[int], encoder: str) -> None:
    """Raise DatasetError if there is more than one length."""
    if len(lengths) > 1:
        raise DatasetError(
            f"{encoder} returns vectors of {min(lengths)} and of {max(lengths)} numbers; vectors of a modality must "
            "have the same length"
        )


def encoded_table(ids: Sequence[str], encoded: EncodedRows) -> pa.Table:
    """Return the table of a cache file: sample_id, content, reason, detail (null if usable) and vector (else null)."""
    lengths = np.where(encoded.usable, encoded.vector.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    vector = pa.LargeListArray.from_arrays(offsets, pa.array(encoded.vector.ravel()), mask=pa.array(~encoded.usable))
    rows = range(len(encoded.usable))
    reason = [encoded.problem[row].reason.value if row in encoded.problem else None for row in rows]
    detail = [encoded.problem[row].detail if row in encoded.problem else None for row in rows]
    content = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(encoded.content), [None, pa.py_buffer(np.ascontiguousarray(encoded.content))]
    )
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "content": content,
            "reason": pa.array(reason, pa.string()),
            "detail": pa.array(detail, pa.string()),
            "vector": vector,
        }
    )


_DATA_CHANGED = "the data changed while they were read: run the command again"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """Everything a worker process needs to encode one shard. `dataset` has no shards, to keep the task small."""

    dataset: Dataset
    shard: Shard
    media: MediaConfig
    folder: Path

    def file(self, modality: Modality) -> Path:
        """Return the cache file of this shard's vectors of one modality."""
        version = f"{modality.name}-{preprocessing(modality, self.media)}"
        return self.folder / version / f"{self.shard.index:06d}.arrow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Encoding status of n samples in one modality.

    usable: bool (n,). content: digests of the input (n,), dtype S32. problem: (row, reason, detail) of each unusable
    sample.
    """

    modality: Modality
    usable: NDArray[np.bool_]
    content: NDArray[np.bytes_]
    problem: tuple[tuple[int, Reason, str], ...]


@fixed_threads()
def encode_dataset(
    dataset: Dataset, folder: Path, *, media: MediaConfig, num_workers: int, progress: Progress, device: str = "cpu"
) -> list[EncodeTask]:
    """Encode what the cache in `folder` does not contain yet, in `num_workers` processes (0: in this process).

    A pretrained network runs in this process, on `device`, with `num_workers` threads that decode in advance.
    """
    without_shards = replace(dataset, shards=())
    tasks = [EncodeTask(dataset=without_shards, shard=shard, media=media, folder=folder) for shard in dataset.shards]
    models = [modality for modality in dataset.modalities if is_pretrained(modality)]
    modalities = [modality for modality in dataset.modalities if not is_pretrained(modality)]
    opens_media = any(modality.kind not in ("features", "text") for modality in modalities)
    all_cached = all(task.file(modality).exists() for task in tasks for modality in modalities)
    # Comparing digests is faster than starting processes.
    processes = 0 if all_cached or not opens_media else num_workers
    passes = [run_tasks(_encode_without_model, tasks, num_workers=processes)] if modalities else []
    passes += [_run_model(tasks, modality, num_threads=num_workers, device=device) for modality in models]
    for done, _ in enumerate(chain.from_iterable(passes), start=1):
        progress("encode", done, len(passes) * len(tasks))
    return tasks


@fixed_threads()
def encode_shard(task: EncodeTask, *, device: str = "cpu") -> int:
    """Encode every modality of a shard into its file; return the number of computed vectors, 0 if all were cached.

    A row whose content is already in the file is not encoded again.
    """
    models = [modality for modality in task.dataset.modalities if is_pretrained(modality)]
    num_by_model = [sum(_run_model([task], modality, num_threads=0, device=device)) for modality in models]
    return _encode_without_model(task) + sum(num_by_model)


def read_status(tasks: Sequence[EncodeTask], modality: Modality, sample_id: NDArray[np.object_]) -> Status:
    """Read the status of all samples of a dataset, in dataset order, in one modality from the cache.

    A million samples take 33 MB. Raises DatasetError if no sample is usable, or vectors differ in length.
    """
    num_rows = len(sample_id)
    usable, content = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype="S32")
    problem: list[tuple[int, Reason, str]] = []
    lengths: set[int] = set()
    start = 0
    for task in tasks:
        table = read_arrow(task.file(modality))
        rows = slice(start, start + table.num_rows)
        if not column_of(table, "sample_id").equals(pa.array(sample_id[rows], pa.string())):
            raise DatasetError(_DATA_CHANGED)
        usable[rows] = column_of(table, "reason").is_null().to_numpy(zero_copy_only=False)
        content[rows] = content_of(table)
        problem += [(start + row, reason, detail) for row, reason, detail in problems_of(table)]
        lengths |= lengths_of(table)
        start = rows.stop
    if start != num_rows:
        raise DatasetError(_DATA_CHANGED)
    if not usable.any():
        first = problem[0]
        raise DatasetError(f"no sample has a usable {modality.name}; the first: {first[1].value}, {first[2]}")
    check_lengths(lengths, f"{modality.name}: {modality.encoder}")
    return Status(modality=modality, usable=usable, content=content, problem=tuple(problem))


def _encode_without_model(task: EncodeTask) -> int:
    """Encode all modalities without a pretrained network; a file that several modalities share is read once."""
    rows = task.dataset.read(task.shard)
    ids = task.dataset.sample_ids(rows, task.shard)
    shared: dict[tuple[str, str], list[Modality]] = {}
    for modality in task.dataset.modalities:
        if not is_pretrained(modality):
            form = "file" if modality.kind in ("audio", "image", "video") else modality.kind
            shared.setdefault((modality.column, form), []).append(modality)
    computed = 0
    for (column, form), modalities in shared.items():
        if form == "features":
            computed += sum(_encode_vectors(task, modality, rows[column], ids) for modality in modalities)
        else:
            computed += _encode_cells(task, modalities, rows[column], ids)
    return computed


def _encode_vectors(task: EncodeTask, modality: Modality, cells: pa.ChunkedArray, ids: Sequence[str]) -> int:
    encoded = encode_vectors(cells, modality)
    path = task.file(modality)
    if CachedVectors.of(path).is_current(ids, encoded.content):
        return 0
    write_arrow(encoded_table(ids, encoded), path)
    return len(ids)


def _encode_cells(task: EncodeTask, modalities: Sequence[Modality], cells: pa.ChunkedArray, ids: Sequence[str]) -> int:
    cached = [CachedVectors.of(task.file(modality)) for modality in modalities]
    content: list[bytes] = []
    results_by_modality: list[list[EncodeResult]] = [[] for _ in modalities]
    computed = 0
    for cell in cells:
        loaded, digest_ = load_cell_content(task.dataset, modalities[0], cell)
        content.append(digest_)
        for modality, cache, results in zip(modalities, cached, results_by_modality, strict=True):
            result = cache.find(digest_)
            if result is None:
                result = encode_cell(loaded, modality, task.media)
                computed += 1
            results.append(result)
    for modality, cache, results in zip(modalities, cached, results_by_modality, strict=True):
        _write_if_changed(task, modality, cache, ids, content, results)
    return computed


def _write_if_changed(
    task: EncodeTask,
    modality: Modality,
    cached: CachedVectors,
    ids: Sequence[str],
    content: Sequence[bytes],
    results: Sequence[EncodeResult],
) -> None:
    """Write a shard's file, unless the existing one is identical."""
    encoded = combine_results(content, results, encoder=f"{modality.name}: {modality.encoder}")
    if not cached.is_current(ids, encoded.content):
        write_arrow(encoded_table(ids, encoded), task.file(modality))


def load_cell_content(dataset: Dataset, modality: Modality, cell: pa.Scalar) -> tuple[Any, bytes]:
    """Return the loaded cell, or the UnusableError raised by loading it, and the digest of its content."""
    try:
        value = cell.as_py()
        is_name = isinstance(value, str) and modality.kind != "text"
        with attach_file_name(value if is_name else f"column {modality.column}"):
            loaded = dataset.load(value, modality)
            return loaded, _content_digest(loaded).encode()
    except UnusableError as error:
        return error, digest(str(error).encode()).encode()


def _content_digest(loaded: str | Medium | Sequence[Sequence[Medium]]) -> str:
    if isinstance(loaded, str):
        return digest(loaded.encode("utf-8", "surrogatepass"))
    if isinstance(loaded, (bytes, MediaFile)):
        return digest(loaded)
    return digest(*(digest(*folder).encode() for folder in loaded))


def _run_model(tasks: Sequence[EncodeTask], modality: Modality, *, num_threads: int, device: str) -> Iterator[int]:
    """Encode a modality by a pretrained network; yields the number of computed vectors of each shard.

    While the network runs, threads read, decode and prepare the next samples, also those of the next shards.
    """
    name = modality.encoder.removeprefix("hf:")
    shards: deque[tuple[EncodeTask, CachedVectors, list[str]]] = deque()

    def cells() -> Iterator[tuple[EncodeTask, CachedVectors, pa.Scalar]]:
        for task in tasks:
            rows = task.dataset.read(task.shard)
            cached = CachedVectors.of(task.file(modality))
            shards.append((task, cached, task.dataset.sample_ids(rows, task.shard)))
            for cell in rows[modality.column]:
                yield task, cached, cell

    def prepare(request: tuple[EncodeTask, CachedVectors, pa.Scalar]) -> tuple[bytes, EncodeResult | ModelInputs]:
        task, cached, cell = request
        loaded, content = load_cell_content(task.dataset, modality, cell)
        outcome: EncodeResult | ModelInputs | None = cached.find(content)
        if outcome is None and isinstance(loaded, UnusableError):
            outcome = loaded
        elif outcome is None:
            try:
                outcome = open_model(name, modality.kind, device).prepare(loaded, task.media)
            except UnusableError as error:
                outcome = error
        return content, outcome

    prepared = prefetch_map(prepare, cells(), num_threads=num_threads)
    for task in tasks:
        content: list[bytes] = []
        results: dict[int, EncodeResult] = {}
        new_inputs = _iter_new_inputs(prepared, task.shard.num_rows, content, results)
        computed = 0
        for row, vector in encode_inputs(name, modality.kind, new_inputs, media=task.media, device=device):
            results[row] = vector
            computed += 1
        _, cached, ids = shards.popleft()
        _write_if_changed(task, modality, cached, ids, content, [results[row] for row in range(len(content))])
        yield computed


def _iter_new_inputs(
    prepared: Iterator[tuple[bytes, EncodeResult | ModelInputs]],
    num_rows: int,
    content: list[bytes],
    results: dict[int, EncodeResult],
) -> Iterator[tuple[int, ModelInputs]]:
    """Yield (row, inputs) of the uncached rows of a shard; append to `content` and write cached `results`."""
    for row, (digest_, result) in enumerate(islice(prepared, num_rows)):
        content.append(digest_)
        if isinstance(result, dict):
            yield row, result
        else:
            results[row] = result
