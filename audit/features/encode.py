"""Encoding of a dataset by shard into the feature cache."""

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
from ..dataset.formats.tables import Shard
from ..dataset.modalities import Modality
from ..errors import DatasetError, reading
from ..hashing import digest
from ..media.files import MediaConfig, MediaFile, Medium
from ..quarantine import Reason, UnusableError
from ..threads import fixed_threads
from ..workers import Progress, prefetch_map, run_tasks
from .cache import (
    Found,
    Known,
    check_lengths,
    column_of,
    content_of,
    encoded_table,
    gather,
    lengths_of,
    problems_of,
    read_arrow,
    write_arrow,
)
from .encoders import encode_cell, encode_vectors, is_pretrained, preprocessing
from .pretrained import Inputs, encode_inputs, open_model

_CHANGED = "the data changed while they were read: run the command again"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """All that a worker anywhere needs in order to encode one shard. `dataset` comes without its plan of shards."""

    dataset: Dataset
    shard: Shard
    media: MediaConfig
    folder: Path

    def file(self, modality: Modality) -> Path:
        """Name the file that holds this shard's vectors of one modality."""
        version = f"{modality.name}-{preprocessing(modality, self.media)}"
        return self.folder / version / f"{self.shard.index:06d}.arrow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How n samples fared in one modality: usable (n,), content (n,) digests of the input, and what was wrong.

    `content` are bytes (dtype S32), `problem` is (row, reason, detail) of each unusable sample.
    """

    modality: Modality
    usable: NDArray[np.bool_]
    content: NDArray[np.bytes_]
    problem: tuple[tuple[int, Reason, str], ...]


@fixed_threads()
def encode_dataset(
    dataset: Dataset, folder: Path, *, media: MediaConfig, num_workers: int, progress: Progress, device: str = "cpu"
) -> list[EncodeTask]:
    """Encode by shard what the cache in `folder` does not hold yet, in `num_workers` processes (0: in this one).

    A pretrained network runs in this process, on `device`; as many threads decode for it ahead.
    """
    bare = replace(dataset, shards=())
    tasks = [EncodeTask(dataset=bare, shard=shard, media=media, folder=folder) for shard in dataset.shards]
    models = [modality for modality in dataset.modalities if is_pretrained(modality)]
    rest = [modality for modality in dataset.modalities if not is_pretrained(modality)]
    opens_media = any(modality.kind not in ("features", "text") for modality in rest)
    all_cached = all(task.file(modality).exists() for task in tasks for modality in rest)
    processes = 0 if all_cached or not opens_media else num_workers  # comparing contents is quicker than starting them
    steps = [run_tasks(_encode_rest, tasks, num_workers=processes)] if rest else []
    steps += [_run_model(tasks, modality, num_threads=num_workers, device=device) for modality in models]
    for done, _ in enumerate(chain.from_iterable(steps), start=1):
        progress("encode", done, len(steps) * len(tasks))
    return tasks


@fixed_threads()
def encode_shard(task: EncodeTask, *, device: str = "cpu") -> int:
    """Encode every modality of a shard into its file and give the number of vectors computed: 0 if all were there.

    A row whose content the file holds already is not encoded again.
    """
    models = [modality for modality in task.dataset.modalities if is_pretrained(modality)]
    by_model = [sum(_run_model([task], modality, num_threads=0, device=device)) for modality in models]
    return _encode_rest(task) + sum(by_model)


def read_status(tasks: Sequence[EncodeTask], modality: Modality, sample_id: NDArray[np.object_]) -> Status:
    """Read from the cache how these samples, the whole dataset in its own order, fared in one modality.

    A million samples take 33 MB. Raises DatasetError where none is usable, or the vectors are not of one length.
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
            raise DatasetError(_CHANGED)
        usable[rows] = column_of(table, "reason").is_null().to_numpy(zero_copy_only=False)
        content[rows] = content_of(table)
        problem += [(start + row, reason, detail) for row, reason, detail in problems_of(table)]
        lengths |= lengths_of(table)
        start = rows.stop
    if start != num_rows:
        raise DatasetError(_CHANGED)
    if not usable.any():
        first = problem[0]
        raise DatasetError(f"no sample has a usable {modality.name}; the first: {first[1].value}, {first[2]}")
    check_lengths(lengths, f"{modality.name}: {modality.encoder}")
    return Status(modality=modality, usable=usable, content=content, problem=tuple(problem))


def _encode_rest(task: EncodeTask) -> int:
    """Encode all but what a pretrained network reads; a file that several modalities share is read once."""
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
    if Known.of(path).is_current(ids, encoded.content):
        return 0
    write_arrow(encoded_table(ids, encoded), path)
    return len(ids)


def _encode_cells(task: EncodeTask, modalities: Sequence[Modality], cells: pa.ChunkedArray, ids: Sequence[str]) -> int:
    known = [Known.of(task.file(modality)) for modality in modalities]
    content: list[bytes] = []
    found: list[list[Found]] = [[] for _ in modalities]
    computed = 0
    for cell in cells:
        loaded, digest_ = load_cell_content(task.dataset, modalities[0], cell)
        content.append(digest_)
        for modality, there, results in zip(modalities, known, found, strict=True):
            result = there.find(digest_)
            if result is None:
                result = encode_cell(loaded, modality, task.media)
                computed += 1
            results.append(result)
    for modality, there, results in zip(modalities, known, found, strict=True):
        _keep(task, modality, there, ids, content, results)
    return computed


def _keep(
    task: EncodeTask,
    modality: Modality,
    known: Known,
    ids: Sequence[str],
    content: Sequence[bytes],
    found: Sequence[Found],
) -> None:
    """Write a shard's file, unless the one that is there holds just this."""
    encoded = gather(content, found, encoder=f"{modality.name}: {modality.encoder}")
    if not known.is_current(ids, encoded.content):
        write_arrow(encoded_table(ids, encoded), task.file(modality))


def load_cell_content(dataset: Dataset, modality: Modality, cell: pa.Scalar) -> tuple[Any, bytes]:
    """Give what a cell stands for, or the UnusableError in its place, and the digest of its content."""
    try:
        value = cell.as_py()
        is_name = isinstance(value, str) and modality.kind != "text"
        with reading(value if is_name else f"column {modality.column}"):
            loaded = dataset.load(value, modality)
            return loaded, _content(loaded).encode()
    except UnusableError as error:
        return error, digest(str(error).encode()).encode()


def _content(loaded: str | Medium | Sequence[Sequence[Medium]]) -> str:
    if isinstance(loaded, str):
        return digest(loaded.encode("utf-8", "surrogatepass"))
    if isinstance(loaded, (bytes, MediaFile)):
        return digest(loaded)
    return digest(*(digest(*folder).encode() for folder in loaded))


def _run_model(tasks: Sequence[EncodeTask], modality: Modality, *, num_threads: int, device: str) -> Iterator[int]:
    """Encode a modality by a pretrained network, shard by shard; yields how many vectors of each were computed.

    Threads read, decode and prepare the next samples, those of the shards to come as well, while the network runs.
    """
    shards: deque[tuple[EncodeTask, Known, list[str]]] = deque()

    def cells() -> Iterator[tuple[EncodeTask, Known, pa.Scalar]]:
        for task in tasks:
            rows = task.dataset.read(task.shard)
            known = Known.of(task.file(modality))
            shards.append((task, known, task.dataset.sample_ids(rows, task.shard)))
            for cell in rows[modality.column]:
                yield task, known, cell

    def prepare(item: tuple[EncodeTask, Known, pa.Scalar]) -> tuple[bytes, Found | Inputs]:
        task, known, cell = item
        loaded, content = load_cell_content(task.dataset, modality, cell)
        found: Found | Inputs | None = known.find(content)
        if found is None and isinstance(loaded, UnusableError):
            found = loaded
        elif found is None:
            try:
                found = open_model(modality.encoder[3:], modality.kind, device).prepare(loaded, task.media)
            except UnusableError as error:
                found = error
        return content, found

    prepared = prefetch_map(prepare, cells(), num_threads=num_threads)
    for task in tasks:
        content: list[bytes] = []
        found: dict[int, Found] = {}
        new = _new_inputs(prepared, task.shard.num_rows, content, found)
        computed = 0
        for row, vector in encode_inputs(modality.encoder[3:], modality.kind, new, media=task.media, device=device):
            found[row] = vector
            computed += 1
        _, known, ids = shards.popleft()
        _keep(task, modality, known, ids, content, [found[row] for row in range(len(content))])
        yield computed


def _new_inputs(
    prepared: Iterator[tuple[bytes, Found | Inputs]], num_rows: int, content: list[bytes], found: dict[int, Found]
) -> Iterator[tuple[int, Inputs]]:
    """Yield what the network has to encode of a shard, by row; note the content of every row, and what is known."""
    for row, (digest_, result) in enumerate(islice(prepared, num_rows)):
        content.append(digest_)
        if isinstance(result, dict):
            yield row, result
        else:
            found[row] = result
