"""The feature cache: every sample's vectors, encoded once, by shard, and known by the content they were made from"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .dataset import Dataset
from .encode import Encoded, Vector, encode_cell, encode_vectors, preprocessing
from .errors import DatasetError
from .files import whole
from .hashing import digest
from .media import MediaConfig
from .modality import Modality
from .quality import Reason, UnusableError
from .tables import Shard
from .workers import Progress, run_tasks

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("content", pa.string()),  # digest of the input
        ("reason", pa.string()),  # null where usable
        ("detail", pa.string()),
        ("vector", pa.large_list(pa.float32())),  # null where not
    ]
)


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

    `problem` is (row, reason, detail) of each unusable sample.
    """

    modality: Modality
    usable: NDArray[np.bool_]
    content: NDArray[np.object_]
    problem: tuple[tuple[int, Reason, str], ...]


def encode_dataset(
    dataset: Dataset, folder: Path, *, media: MediaConfig, num_workers: int, progress: Progress
) -> list[EncodeTask]:
    """Encode by shard what the cache in `folder` does not hold yet, in `num_workers` processes (0: in this one)."""
    bare = replace(dataset, shards=())
    tasks = [EncodeTask(dataset=bare, shard=shard, media=media, folder=folder) for shard in dataset.shards]
    opens_media = any(modality.kind not in ("features", "text") for modality in dataset.modalities)
    all_cached = all(task.file(modality).exists() for task in tasks for modality in dataset.modalities)
    if all_cached or not opens_media:
        num_workers = 0  # only contents are compared, which is quicker than starting processes
    for done, _ in enumerate(run_tasks(encode_shard, tasks, num_workers=num_workers), start=1):
        progress("encode", done, len(tasks))
    return tasks


def encode_shard(task: EncodeTask) -> int:
    """Encode every modality of a shard into its file and give the number of vectors computed: 0 if all were there.

    A row whose content the file holds already is not encoded again.
    """
    rows = task.dataset.read(task.shard)
    ids = task.dataset.sample_ids(rows, task.shard)
    return sum(_encode_modality(task, modality, rows[modality.column], ids) for modality in task.dataset.modalities)


def read_status(tasks: Sequence[EncodeTask], modality: Modality, sample_id: NDArray[np.object_]) -> Status:
    """Read from the cache how these samples, the whole dataset in its own order, fared in one modality."""
    tables = [read_arrow(task.file(modality)).drop_columns("vector") for task in tasks]
    table = pa.concat_tables(tables)
    if table["sample_id"].to_pylist() != sample_id.tolist():
        raise DatasetError("the data changed while they were read: run the command again")
    reason, detail = table["reason"].to_pylist(), table["detail"].to_pylist()
    usable = np.array([entry is None for entry in reason])
    if not usable.any():
        raise DatasetError(f"no sample has a usable {modality.name}; the first: {reason[0]}, {detail[0]}")
    return Status(
        modality=modality,
        usable=usable,
        content=np.array(table["content"].to_pylist(), dtype=object),
        problem=tuple((int(row), Reason(reason[row]), detail[row]) for row in np.flatnonzero(~usable)),
    )


def read_arrow(path: Path) -> pa.Table:
    """Map an Arrow file into memory; DatasetError where it is damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it, and it is made anew") from error


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write an Arrow file whole or not at all."""
    with whole(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)


def _encode_modality(task: EncodeTask, modality: Modality, cells: pa.ChunkedArray, ids: list[str]) -> int:
    path = task.file(modality)
    known = _read_known(path)
    if modality.kind == "features":
        encoded, computed = encode_vectors(cells, modality), len(ids)
    else:
        encoded, computed = _encode_cells(task, modality, cells, reuse=_reusable(known))
    if known is not None and known["sample_id"].to_pylist() == ids and known["content"].to_pylist() == encoded.content:
        return 0
    write_arrow(_to_table(ids, encoded), path)
    return computed


def _read_known(path: Path) -> pa.Table | None:
    """Read what a shard's file holds already; a damaged one, as a power cut leaves it, is made anew."""
    try:
        return read_arrow(path) if path.exists() else None
    except DatasetError:
        return None


def _encode_cells(
    task: EncodeTask, modality: Modality, cells: pa.ChunkedArray, *, reuse: dict[str, Vector | UnusableError]
) -> tuple[Encoded, int]:
    content: list[str] = []
    results: list[Vector | UnusableError] = []
    computed = 0
    for loaded, digest_ in _load(task, modality, cells):
        content.append(digest_)
        if digest_ in reuse:
            results.append(reuse[digest_])
        else:
            results.append(encode_cell(loaded, modality, task.media))
            computed += 1
    vector = [None if isinstance(result, UnusableError) else result for result in results]
    problem = [result if isinstance(result, UnusableError) else None for result in results]
    return Encoded(content=content, vector=vector, problem=problem), computed


def _load(task: EncodeTask, modality: Modality, cells: pa.ChunkedArray) -> Iterator[tuple[Any, str]]:
    """Yield what each cell stands for, or the UnusableError in its place, and the digest of its content."""
    for cell in cells:
        try:
            loaded = task.dataset.load(cell.as_py(), modality)
        except UnusableError as error:
            yield error, digest(str(error).encode())
        else:
            yield loaded, digest(loaded.encode() if isinstance(loaded, str) else loaded)


def _reusable(known: pa.Table | None) -> dict[str, Vector | UnusableError]:
    """Give what a shard's file knows, by content."""
    if known is None:
        return {}
    rows = zip(known["content"], known["reason"], known["detail"], known["vector"], strict=True)
    return {
        content.as_py(): (
            vector.values.to_numpy() if vector.is_valid else UnusableError(Reason(reason.as_py()), detail.as_py())
        )
        for content, reason, detail, vector in rows
    }


def _to_table(ids: list[str], encoded: Encoded) -> pa.Table:
    lengths = [0 if vector is None else len(vector) for vector in encoded.vector]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    usable = [vector for vector in encoded.vector if vector is not None]
    values = np.concatenate(usable) if usable else np.zeros(0, np.float32)
    vector = pa.LargeListArray.from_arrays(
        offsets, pa.array(values, pa.float32()), mask=pa.array([vector is None for vector in encoded.vector])
    )
    reason = [problem.reason.value if problem else None for problem in encoded.problem]
    detail = [problem.detail if problem else None for problem in encoded.problem]
    return pa.table([ids, encoded.content, reason, detail, vector], schema=_SCHEMA)
