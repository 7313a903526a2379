"""Manifest files: the selected samples, the dropped ones, provenance and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..audit.errors import ManifestError
from ..audit.hashing import digest, hash_ids
from ..audit.parsing import Shape
from ..audit.scores.table import PROVENANCE as SCORES
from ..audit.storage import parse_provenance, read_batches, read_footer, read_parquet, read_schema
from .curriculum import split_rows

if TYPE_CHECKING:
    from .manifest_dataset import ManifestDataset

SCHEMA_VERSION = 3
ROWS_KEY = "mmaudit.rows"  # key in the file metadata, written last: number of rows and both digests
_NOT_DIGESTED = (ROWS_KEY.encode(), b"ARROW:schema")  # the digests themselves, and Arrow's copy of the schema
GROUP_ROWS = 131_072  # rows per row group, and per update of the digest
_SMALL_BATCH, _BUFFER_BYTES = 1 << 15, 1 << 20  # ours: rows of a batch, and of a column read at a time


class ColumnRange(NamedTuple):
    """Values of a column: as text and meaning in the metadata, and as inclusive bounds."""

    text: str
    meaning: str
    low: float
    high: float


RANGES = {  # the largest bin and rank depend on the manifest
    "bin": ColumnRange(
        "[0, bins)", "bin of the discrepancy over [-1, 1]; null where the subset was not made by bins", 0, np.inf
    ),
    "rank": ColumnRange(
        "[0, n)", "kept samples that are more balanced, by the balance score; equals share a rank", 0, np.inf
    ),
    "weight": ColumnRange(
        "> 0",
        "weight in the loss; 1 unless the subset was made by weights",
        float(np.finfo(np.float64).smallest_subnormal),
        float(np.finfo(np.float32).max),
    ),
    "discrepancy": ColumnRange(
        "[-1, 1]", "that of provenance.between: +1 its first modality alone, -1 the other side", -1, 1
    ),
    "gap": ColumnRange("[0, 1]", "largest minus least confidence; 0 = balanced", 0, 1),
    "balance": ColumnRange("[-1, 1]", "as in the score table, high = balanced; null where that has none", -1, 1),
    "p_balanced": ColumnRange("[0, 1]", "as in the score table; null where that has none", 0, 1),
}

_SAMPLE = {
    "sample_id": pa.string(),
    "label": pa.int32(),
    "label_name": pa.string(),
    "split": pa.string(),
    "subset": pa.string(),
    "bin": pa.int16(),
}
_SCORES = {
    "discrepancy": pa.float32(),
    "gap": pa.float32(),
    "balance": pa.float32(),
    "p_balanced": pa.float32(),
    "group": pa.string(),
    "content": pa.string(),
}
COLUMNS: dict[str, pa.DataType] = {**_SAMPLE, "rank": pa.int32(), "weight": pa.float32(), **_SCORES}
DROPPED_COLUMNS = {
    **_SAMPLE,
    **_SCORES,
    "reason": pa.string(),
    "score": pa.float64(),
    "threshold": pa.float64(),
}

_TYPES = {**COLUMNS, **DROPPED_COLUMNS}
_MAYBE_TEXT = (str, type(None))
_RECIPE: Shape = {  # the fields that recipe_of reads are checked there, against the types of a Recipe
    "seed": int,
    "resplit": _MAYBE_TEXT,
    "scores": _MAYBE_TEXT,
    "intersect": [str],
    "exclude": [str],
    "like": _MAYBE_TEXT,
    "balanced": {"bins": int, "grid": bool},
    "inputs": {},
}
PROVENANCE: Shape = {"schema": str, "subset": str, "between": str, "recipe": _RECIPE, "ranges": {}, "scores": SCORES}
ROWS: Shape = {"rows": int, "digest": str, "metadata": str, "dropped_from": str}

# Columns of few distinct values, stored as dictionary codes.
REPEATING = ("label_name", "split", "subset", "group", "reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Digests of a manifest's rows and of its metadata, 32 hexadecimal digits each."""

    rows: str
    metadata: str


@dataclass(frozen=True, kw_only=True)  # no slots, so that digests can be cached
class Manifest:
    """A manifest in memory: the n samples of a subset, with how it was made.

    Args:
        table: One row per sample, with the columns of COLUMNS, and the source's columns of file names.
        provenance: Metadata: schema, subset, between (the modalities of the discrepancy), recipe (all settings of the
            split), ranges (of the columns) and scores (the metadata of the score table).

    Raises:
        ManifestError: A column is missing, sample_id, label or rank holds nulls, or ids are not unique.

    Example:
        >>> manifest = mmaudit.read_manifest("mmaudit-run/manifests/balanced.parquet")
        >>> len(manifest), manifest.provenance["between"], manifest.numbers("discrepancy").mean()
    """

    table: pa.Table
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        check_columns(self.table.schema, where="the table")
        nulls = [name for name in ("sample_id", "label", "rank") if self.table[name].null_count]
        if nulls:
            raise ManifestError(f"column {nulls[0]} of the manifest holds nulls: recreate it with mmaudit split")
        _check_unique(self.table["sample_id"])

    def __len__(self) -> int:
        return len(self.table)

    def digest(self) -> str:
        """Return the digest of the rows: all columns, in row order."""
        return self.digests.rows

    @cached_property
    def digests(self) -> Digests:
        """Digests of the rows and of the metadata."""
        return Digests(rows=table_digest(self.table), metadata=metadata_digest(self.table.schema.metadata or {}))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows in batches, with these columns."""
        table = self.table.select(list(columns))
        for start in range(0, len(table), GROUP_ROWS):
            yield table.slice(start, GROUP_ROWS)

    def strings(self, name: str) -> NDArray[np.object_]:
        """Return a column of strings, (n,), null as None."""
        return np.array(self.table[name].to_pylist(), dtype=object)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a column of numbers, (n,), null as NaN."""
        return np.array(self.table[name].to_pandas(), dtype=np.float64)

    def to_torch(
        self,
        *,
        data: str | Path | None = None,
        features: str | Path | None = None,
        split: str | Sequence[str] = "train",
        transform: Callable[[dict[str, Any]], Any] | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        allow_outside: bool = False,
    ) -> ManifestDataset:
        """Return a map-style dataset of PyTorch of the samples of a split, in the order of the manifest.

        Nothing that the manifest names is opened or imported: media are read from `data`, vectors from `features`.

        Args:
            data: The data that were scored; media are decoded as `score` does, at the sizes of its settings.
            features: In place of `data`: folder `features` of the run; cached vectors are read and nothing is decoded.
            split: train, validation or test, or several.
            transform: Function of a sample, a dictionary, whose result is returned in its place.
            validation_fraction: Share of the training rows that is the validation split where the manifest has none, as
                in `finetune`; 0 cuts none.
            seed: Seed of that cut.
            allow_outside: Allow paths outside the data folder.

        Returns:
            The dataset: sample_id, label, weight, and each modality by name.

        Raises:
            ManifestError: The split is empty, samples are not in the data or the cache, or have changed in the cache.
            DatasetError: The data cannot be opened.
            ConfigError: Neither `data` nor `features` is passed, or both.

        Example:
            >>> manifest = mmaudit.read_manifest("mmaudit-run/manifests/balanced.parquet")
            >>> manifest.to_torch(data="clips")[0]["audio"].shape
            torch.Size([16000])
        """
        from .manifest_dataset import open_rows

        rows = split_rows(self.table, split, validation_fraction=validation_fraction, seed=seed)
        return open_rows(
            self.table.take(pa.array(rows)),
            self.provenance.get("scores", {}),
            data=data,
            features=features,
            transform=transform,
            allow_outside=allow_outside,
        )


@dataclass(frozen=True, kw_only=True)  # no slots, so that digests can be cached
class ManifestFile:
    """A manifest file whose rows are read in batches: what a Manifest has, without holding its rows.

    Args:
        path: The file.
        provenance: See Manifest.

    Example:
        >>> manifest = ManifestFile.open(Path("mmaudit-run/manifests/balanced.parquet"))
        >>> sum(len(batch) for batch in manifest.batches(["sample_id"]))
        4012
    """

    path: Path
    provenance: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> ManifestFile:
        """Open a file. Raises ManifestError where it is not a manifest, or one of another version."""
        provenance = read_provenance(path)
        _check_version(provenance, where=str(path))
        check_types(manifest_schema(path), where=str(path))
        return cls(path=path, provenance=provenance)

    def digest(self) -> str:
        """Return the digest of the rows: all columns, in row order."""
        return self.digests.rows

    @cached_property
    def digests(self) -> Digests:
        """Digests of the rows and of the metadata."""
        return compute_digests(self.path)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows in small batches, with these columns."""
        return read_batches_of_manifest(self.path, columns=list(columns), rows=_SMALL_BATCH)


def states_split(manifest: Manifest | ManifestFile, split: str) -> bool:
    """Return whether a row of a manifest states this split."""
    return any(bool(pc.any(pc.equal(batch["split"], split)).as_py()) for batch in manifest.batches(["split"]))


def _check_unique(ids: pa.ChunkedArray) -> None:
    """Raise ManifestError for repeated ids; only ids whose hashes are repeated are compared."""
    keys = hash_ids(ids.combine_chunks(), seed=0, purpose="unique")
    unique_keys, num_rows = np.unique(keys, return_counts=True)
    if (num_rows == 1).all():
        return
    colliding_ids = ids.filter(pa.array(np.isin(keys, unique_keys[num_rows > 1]))).to_pylist()
    if repeated := len(colliding_ids) - len(set(colliding_ids)):
        raise ManifestError(f"{repeated} ids occur more than once in the manifest: recreate it with mmaudit split")


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest.

    Args:
        path: File that `mmaudit split` wrote, also if another tool rewrote it.

    Returns:
        Rows and provenance; columns have the types of COLUMNS.

    Raises:
        ManifestError: The file is not a manifest, or of another version.

    Example:
        >>> mmaudit.read_manifest("mmaudit-run/manifests/balanced.parquet").table.to_pandas().head()
    """
    table, provenance = read_parquet(Path(path), error=ManifestError, shape=PROVENANCE)
    _check_version(provenance, where=str(path))
    check_types(table.schema, where=str(path))
    return Manifest(table=cast_columns(table, where=str(path)), provenance=provenance)


def _check_version(provenance: Mapping[str, Any], *, where: str) -> None:
    """Raise ManifestError for another version; if another tool removed the metadata, no version is stated."""
    stated, expected = provenance.get("schema", ""), f"mmaudit.manifest/{SCHEMA_VERSION}"
    if str(stated).startswith("mmaudit.manifest/") and stated != expected:
        raise ManifestError(
            f"{where} is {str(stated)[:40]}, but this mmaudit reads {expected}: run mmaudit split again"
        )


def read_dropped(path: Path, manifest: Manifest | ManifestFile) -> pa.Table | None:
    """Read the rows that were dropped from the manifest in `path`; None if there is no such file in its folder.

    Raises ManifestError for rows of another manifest, as an interrupted split leaves them.
    """
    batches = read_dropped_batches(path, manifest)
    return None if batches is None else pa.concat_tables(batches)


def read_dropped_batches(
    path: Path, manifest: Manifest | ManifestFile, *, columns: Sequence[str] | None = None
) -> Iterator[pa.Table] | None:
    """Read what `read_dropped` reads in small batches, with these columns; an empty file has one batch of no rows."""
    file = dropped_path(path)
    if not file.exists():
        return None
    check_dropped_from(file, manifest.digest())
    schema = manifest_schema(file)
    check_types(schema, where=str(file), columns=DROPPED_COLUMNS)
    names = list(schema.names if columns is None else columns)
    empty = cast_columns(schema.empty_table().select(names), where=str(file))
    return chain([empty], read_batches_of_manifest(file, columns=names, rows=_SMALL_BATCH))


def check_dropped_from(dropped_file: Path, digest: object) -> None:
    """Raise ManifestError for rows dropped from a manifest of another digest, as an interrupted split leaves them."""
    if read_stated_digests(dropped_file).get("dropped_from") != digest:
        raise ManifestError(f"{dropped_file} holds the rows dropped from another manifest: run mmaudit split again")


def dropped_path(path: Path) -> Path:
    """Return the path of a manifest's file of dropped rows."""
    return path.with_name(f"{path.stem}.dropped.parquet")


def balance_path(path: Path) -> Path:
    """Return the path of a manifest's file of numbers."""
    return path.with_name(f"{path.stem}.balance.json")


def read_provenance(path: Path) -> dict[str, Any]:
    """Read the provenance of a manifest, without its rows."""
    metadata = manifest_schema(path).metadata or {}
    return parse_provenance(metadata, error=ManifestError, where=str(path), shape=PROVENANCE)


def manifest_schema(path: Path) -> pa.Schema:
    """Read the schema of a manifest, or of its dropped rows."""
    return read_schema(path, error=ManifestError)


def read_num_rows(path: Path) -> int:
    """Read the number of rows of a manifest, or of its dropped rows."""
    return int(read_footer(path, error=ManifestError).num_rows)


def read_stated_digests(path: Path) -> dict[str, Any]:
    """Read the stated row count and digests: rows, digest, metadata, for dropped rows also dropped_from; {} if none."""
    metadata = read_footer(path, error=ManifestError).metadata or {}
    return parse_provenance(metadata, error=ManifestError, where=str(path), key=ROWS_KEY.encode(), shape=ROWS)


def read_batches_of_manifest(
    path: Path, *, columns: list[str] | None = None, as_stored: bool = False, rows: int = GROUP_ROWS
) -> Iterator[pa.Table]:
    """Read a manifest, or its dropped rows, in batches of `rows`; raises ManifestError if that fails.

    Columns are cast to the types of COLUMNS; with `as_stored` they keep the types of the file. In batches of fewer than
    GROUP_ROWS, a row group is not read whole: less memory, 1.1 times the time.
    """
    if not as_stored:
        schema = manifest_schema(path)
        names = schema.names if columns is None else columns
        check_types(schema, where=str(path), columns={name: _TYPES[name] for name in names if name in _TYPES})
    buffer_bytes = _BUFFER_BYTES if rows < GROUP_ROWS else 0
    for table in read_batches(path, error=ManifestError, rows=rows, columns=columns, buffer_bytes=buffer_bytes):
        yield table if as_stored else cast_columns(table, where=str(path))


def check_columns(schema: pa.Schema, *, where: str, columns: Mapping[str, pa.DataType] = COLUMNS) -> None:
    """Raise ManifestError if a column of a manifest is missing."""
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise ManifestError(
            f"{where} is not a manifest: it lacks {', '.join(missing)}; create one with: mmaudit split --balanced"
        )


def check_types(schema: pa.Schema, *, where: str, columns: Mapping[str, pa.DataType] = COLUMNS) -> None:
    """Raise ManifestError if a column is missing, or neither text nor number as its type demands."""
    check_columns(schema, where=where, columns=columns)
    for name, expected in columns.items():
        type_ = schema.field(name).type
        value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
        matches = is_text(value_type) if expected == pa.string() else is_number(value_type)
        if not matches and not pa.types.is_null(type_):
            raise ManifestError(f"{where} is not a manifest: its {name} is {type_}, not {expected}")


def is_text(type_: pa.DataType) -> bool:
    """Return whether a column holds strings."""
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def is_number(type_: pa.DataType) -> bool:
    """Return whether a column holds numbers."""
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def cast_columns(table: pa.Table, *, where: str) -> pa.Table:
    """Cast the columns of a manifest to the types of COLUMNS, in case another tool rewrote the file."""
    try:
        for index, field in enumerate(table.schema):
            if field.type != _TYPES.get(field.name, field.type):
                table = table.set_column(index, field.name, table.column(index).cast(_TYPES[field.name]))
    except pa.ArrowException as cause:
        raise ManifestError(f"{where}: column {field.name} cannot be read: {str(cause).splitlines()[0]}") from cause
    return table


class RowDigest:
    """Digest of the names and values of columns, in row order, independent of the batches."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()  # hardware support: twice as fast as blake2b

    def add(self, table: pa.Table) -> None:
        """Add the next GROUP_ROWS rows, or the last ones."""
        for name in sorted(table.column_names):
            column = table[name].combine_chunks()
            if name in REPEATING and not pa.types.is_dictionary(column.type):
                column = column.dictionary_encode()
            self._hash.update(f"{name}\0{len(column)}\0{column.null_count}\0".encode())
            if column.null_count == len(column):
                continue
            if column.null_count:
                self._hash.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
            for block in _value_bytes(column):
                self._hash.update(block)

    def hexdigest(self) -> str:
        """Return the digest as 32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]


def table_digest(table: pa.Table) -> str:
    """Compute the digest of the rows of a table."""
    row_digest = RowDigest()
    for group in regroup([table]):
        row_digest.add(group)
    return row_digest.hexdigest()


def compute_digests(path: Path) -> Digests:
    """Compute the digests of a file, batch by batch."""
    rows = RowDigest()
    for group in regroup(read_batches_of_manifest(path)):
        rows.add(group)
    return Digests(rows=rows.hexdigest(), metadata=metadata_digest(manifest_schema(path).metadata or {}))


def metadata_digest(metadata: Mapping[bytes, bytes]) -> str:
    """Compute the digest of all metadata of a file, other tools' included, except the stated digests."""
    pairs = sorted((name, value) for name, value in metadata.items() if name not in _NOT_DIGESTED)
    return digest(*(part for pair in pairs for part in pair))


def regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Regroup tables into ones of GROUP_ROWS rows and a last one with the rest."""
    pending: list[pa.Table] = []
    num_pending = 0
    for table in tables:
        pending.append(table)
        num_pending += len(table)
        while num_pending >= GROUP_ROWS:
            together = pa.concat_tables(pending)
            yield together.slice(0, GROUP_ROWS)
            pending = [together.slice(GROUP_ROWS)]
            num_pending -= GROUP_ROWS
    if num_pending:
        yield pa.concat_tables(pending)


def _value_bytes(column: pa.Array) -> Iterator[bytes | memoryview]:
    """Yield the values of a column as bytes that depend on the values only; null as 0, or as an empty string."""
    if pa.types.is_dictionary(column.type):
        yield from _dictionary_bytes(column)
    elif is_number(column.type):
        filled = column.fill_null(0) if column.null_count else column
        yield np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)).data.cast("B")
    elif is_text(column.type):
        filled = column.fill_null("") if column.null_count else column
        _, offsets, data = filled.buffers()
        wide = pa.types.is_large_string(filled.type)
        ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[filled.offset :][: len(filled) + 1]
        yield np.diff(ends).astype(np.int32).data.cast("B")
        if data is not None:
            yield memoryview(data)[ends[0] : ends[-1]]
    else:
        yield json.dumps(column.to_pylist(), default=str).encode()


def _dictionary_bytes(column: pa.DictionaryArray) -> Iterator[bytes | memoryview]:
    """Yield the sorted occurring values as JSON, then the index of each row's value among them; null has index 0."""
    names = column.dictionary.to_pylist()
    codes = column.indices.to_numpy(zero_copy_only=False) if not column.null_count else None
    if codes is None:
        codes = column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    used = np.flatnonzero(np.bincount(codes, minlength=len(names))[: len(names)]).tolist()
    occurring = sorted({names[code] for code in used})
    rank_of_name = {name: rank for rank, name in enumerate(occurring)}
    rank_of_code = np.zeros(len(names) + 1, dtype=np.min_scalar_type(len(occurring)))
    rank_of_code[used] = [rank_of_name[names[code]] for code in used]
    yield json.dumps(occurring, default=str).encode()
    yield rank_of_code[codes].data.cast("B")
