"""Vectors computed elsewhere, joined by id to the labels of a source, as one Parquet file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..arrow import dataset_table, flat_vectors
from ..errors import DatasetError, choices
from ..hashing import digest
from ..parsing import BROKEN
from ..storage import read_table, write_parquet
from .columns import Columns, compose_ids, find_columns, text_roles, usual_column
from .dataset import DataConfig
from .formats import plan_source
from .modalities import is_vector

log = logging.getLogger("mmaudit")

_CHUNK_ROWS = 16_384  # of a written column: 131 million numbers at 8,192 a row, below the 2^31 of a list's offsets
FORMS = (
    ".parquet (an id column and columns of vectors), .npz (an array `id` and matrices of as many rows) or .npy (a "
    "matrix, whose ids stand in NAME.ids.txt beside it, one a line)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFile:
    """Ids (n,) and the vectors of one or more modalities, each (n, d) float32; roles: label, group and split if any."""

    path: Path
    ids: list[str]
    vectors: dict[str, NDArray[np.float32]]
    roles: pa.Table | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedModality:
    """Result of one join: of `num_rows` vectors `num_unused` have no sample; `num_missing` samples have no vector."""

    modality: str
    file: str
    num_rows: int
    num_missing: int
    num_unused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The joined file, a source like any other, and how its modalities were joined."""

    path: Path
    data: str
    modalities: tuple[JoinedModality, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the join as JSON values."""
        return {"data": self.data, "modalities": [asdict(modality) for modality in self.modalities]}


def join_vectors(data: str | Path | None, files: Sequence[str], config: DataConfig, *, folder: Path) -> Joined:
    """Join vectors by id to the rows of `data` and write them as one Parquet file in a folder.

    Args:
        data: A source with ids and labels, of any format; None: one of the files has the labels.
        files: Files of vectors, FILE or MODALITY=FILE; see FORMS. A file without a modality's name holds modalities by
            the names of its columns or arrays.
        config: Columns of id, label, group and split of the source.
        folder: Folder of the file, whose name is the digest of its content.

    Returns:
        The file, whose rows and their order are those of `data`; a sample without a vector has null in its place. Such
        samples, and vectors without a sample, are counted, named and logged.

    Raises:
        DatasetError: A file cannot be read, repeats an id, or has no id of the source; or two modalities have one name.
    """
    sources = [_read_file(text, config) for text in files]
    rows, columns, name = _read_roles(data, sources, config)
    ids = compose_ids(rows, columns.id)
    joined: list[JoinedModality] = []
    table, parts = rows, [repr(rows.to_pydict()).encode()]
    for source in sources:
        positions = _positions(ids, source, data=name)
        for modality, vectors in source.vectors.items():
            if modality in table.column_names:
                raise DatasetError(
                    f"{source.path}: the name {modality!r} is taken by another column or file; name the modality "
                    f"with --features NAME={source.path}"
                )
            table = table.append_column(modality, _column(vectors, positions))
            parts += [modality.encode(), positions.tobytes(), np.ascontiguousarray(vectors).tobytes()]
            joined.append(_summary(modality, source, ids, positions))
    path = folder / digest(*parts) / "metadata.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(table, path, provenance={"data": name, "files": [str(source.path) for source in sources]})
    return Joined(path=path, data=name, modalities=tuple(joined))


def _read_file(text: str, config: DataConfig) -> VectorFile:
    modality, equals, file = text.rpartition("=")
    path = Path(file)
    if equals and not path.exists() and Path(text).exists():
        modality, path = "", Path(text)  # the equals sign is part of the name
    if not path.is_file():
        raise DatasetError(f"--features {text}: there is no file {path}")
    readers = {".parquet": _read_parquet, ".npz": _read_npz, ".npy": _read_npy}
    if path.suffix not in readers:
        raise DatasetError(f"--features {text}: vectors are read from {FORMS}")
    source = readers[path.suffix](path, modality, config)
    repeated = [name for name, count in Counter(source.ids).items() if count > 1]
    if repeated:
        raise DatasetError(f"{path}: {len(repeated)} ids are repeated (the first: {repeated[0]}): ids must be unique")
    return source


def _read_parquet(path: Path, modality: str, config: DataConfig) -> VectorFile:
    table = dataset_table(read_table(path, error=DatasetError))
    names = [field.name for field in table.schema if is_vector(field.type)]
    vectors = {}
    for name in _selected(names, modality, path):
        flat, offsets, valid = flat_vectors(table[name])
        lengths = np.unique(np.diff(offsets)[valid])
        if len(lengths) != 1 or not valid.all():
            raise DatasetError(f"{path}: the vectors of {name!r} must have one length and no nulls")
        start = int(offsets[0])
        vectors[modality or name] = flat[start : start + len(valid) * int(lengths[0])].reshape(len(valid), -1)
    others = table.drop_columns(names)
    return _vector_file(path, others, vectors, config)


def _read_npz(path: Path, modality: str, config: DataConfig) -> VectorFile:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (*BROKEN, OSError) as error:
        raise DatasetError(f"{path} is not an npz file of arrays: {str(error).splitlines()[0]}") from error
    matrices = [name for name, array in arrays.items() if array.ndim == 2 and array.dtype.kind in "fiu"]
    vectors = {modality or name: arrays[name].astype(np.float32) for name in _selected(matrices, modality, path)}
    lists = {name: array.tolist() for name, array in arrays.items() if array.ndim == 1}
    sizes = {name: len(array) for name, array in arrays.items() if name in lists or name in matrices}
    if len(set(sizes.values())) > 1:
        raise DatasetError(f"{path}: its arrays have different numbers of rows: {sizes}")
    return _vector_file(path, pa.table(lists), vectors, config)


def _read_npy(path: Path, modality: str, config: DataConfig) -> VectorFile:
    ids_file = path.with_suffix(".ids.txt")
    try:
        matrix = np.load(path, allow_pickle=False)
        ids = ids_file.read_text(encoding="utf-8-sig").splitlines()
    except (*BROKEN, OSError) as error:
        raise DatasetError(f"{path} with {ids_file.name} cannot be read: {str(error).splitlines()[0]}") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise DatasetError(f"{path} has shape {matrix.shape}; it must be a matrix of numbers, one row per id")
    if len(ids) != len(matrix):
        raise DatasetError(f"{path} has {len(matrix)} rows and {ids_file.name} {len(ids)} ids")
    return VectorFile(path=path, ids=ids, vectors={modality or path.stem: matrix.astype(np.float32)})


def _selected(names: Sequence[str], modality: str, path: Path) -> Sequence[str]:
    """Return the columns of vectors to read: all, or with a modality's name the one of this name, or the only one."""
    if not names:
        raise DatasetError(f"{path} holds no vectors: they are read from {FORMS}")
    if not modality:
        return names
    if modality not in names and len(names) > 1:
        raise DatasetError(f"--features {modality}={path}: it holds {len(names)}; {choices(modality, names)}")
    return [modality if modality in names else names[0]]


def _vector_file(
    path: Path, others: pa.Table, vectors: Mapping[str, NDArray[np.float32]], config: DataConfig
) -> VectorFile:
    """Build from the columns that are no vectors: the id, and where there is a label all of them."""
    names = others.column_names
    id_name = usual_column(names, "id", config.id)
    if id_name is None:
        raise DatasetError(f"{path} has no id column or array among {', '.join(names) or 'none'}: call it id")
    ids = ["" if value is None else _text(value) for value in others[id_name].to_pylist()]
    has_label = usual_column(names, "label", config.label) is not None
    return VectorFile(path=path, ids=ids, vectors=dict(vectors), roles=others if has_label else None)


def _text(value: object) -> str:
    """Return an id as text, also if it is stored as bytes."""
    return value.rstrip(b"\0").decode(errors="replace") if isinstance(value, bytes) else str(value)


def _read_roles(
    data: str | Path | None, sources: Sequence[VectorFile], config: DataConfig
) -> tuple[pa.Table, Columns, str]:
    """Return ids, labels, groups and splits of the samples, their columns, and the name of their source."""
    requested = {"id": config.id, "label": config.label, "group": config.group, "split": config.split}
    if data is not None:
        options: dict[str, Any] = {"shard_rows": config.shard_rows, "allow_outside": config.allow_outside}
        plan = plan_source(str(data), reader=config.reader, **options)
        columns = find_columns(plan.sample.column_names, requested)
        names = [name for name in plan.sample.column_names if name in columns.names]
        rows = pa.concat_tables([dataset_table(shard.read(names)) for shard in plan.shards])
        name = str(data)
    else:
        labelled = [source for source in sources if source.roles is not None]
        if len(labelled) != 1:
            files = ", ".join(str(source.path) for source in labelled) or "none of the files"
            raise DatasetError(f"{files} hold labels: pass the data that hold them, or one file of vectors with labels")
        rows, name = labelled[0].roles, str(labelled[0].path)
        assert rows is not None
        columns = find_columns(rows.column_names, requested)
        rows = rows.select([name for name in rows.column_names if name in columns.names])
    if not columns.id:
        raise DatasetError(f"{name} has no id column to join vectors by: name it with --id COLUMN, or call it id")
    return text_roles(rows, columns), columns, name


def _positions(ids: Sequence[str], source: VectorFile, *, data: str) -> NDArray[np.int64]:
    """Return the row of each sample (n,) in a file of vectors, -1 where it has none."""
    row_of_id = {name: row for row, name in enumerate(source.ids)}
    positions = np.array([row_of_id.get(name, -1) for name in ids], dtype=np.int64)
    if not (positions >= 0).any():
        raise DatasetError(
            f"no id of {source.path} is one of {data}: they are such as {source.ids[:1]}, those of {data} such as "
            f"{ids[:1]}; the id column is named with --id"
        )
    return positions


def _column(vectors: NDArray[np.float32], positions: NDArray[np.int64]) -> pa.ChunkedArray:
    """Return the vectors of the samples as lists, null where a sample has none."""
    size = vectors.shape[1]
    chunks = []
    for start in range(0, len(positions), _CHUNK_ROWS):
        rows = positions[start : start + _CHUNK_ROWS]
        is_missing = rows < 0
        ends = np.concatenate([[0], np.cumsum(~is_missing)]).astype(np.int32) * size
        values = pa.array(vectors[rows[~is_missing]].ravel(), pa.float32())
        mask = pa.array(is_missing) if is_missing.any() else None
        chunks.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=mask))
    return pa.chunked_array(chunks, pa.list_(pa.float32()))


def _summary(modality: str, source: VectorFile, ids: Sequence[str], positions: NDArray[np.int64]) -> JoinedModality:
    """Count, name and log the samples without a vector, and the vectors without a sample."""
    is_missing = positions < 0
    unused = np.setdiff1d(np.arange(len(source.ids)), positions[~is_missing])
    if is_missing.any():
        first = ids[int(np.flatnonzero(is_missing)[0])]
        log.warning(
            "%s: %d of %d samples have no vector in %s (the first: %s); each lacks this modality",
            *(modality, is_missing.sum(), len(ids), source.path, first),
        )
    if len(unused):
        first = source.ids[int(unused[0])]
        log.warning(
            "%s: %d of %d vectors of %s belong to no sample (the first: %s) and are not used",
            *(modality, len(unused), len(source.ids), source.path, first),
        )
    return JoinedModality(
        modality=modality,
        file=str(source.path.absolute()),
        num_rows=len(source.ids),
        num_missing=int(is_missing.sum()),
        num_unused=len(unused),
    )
