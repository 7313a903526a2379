"""Manifests: the samples of a subset, how they were chosen, and what was left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.errors import ManifestError
from ..audit.hashing import digest, hash_ids
from ..audit.parquet import parse_provenance, read_batches, read_footer, read_parquet, read_schema
from ..audit.parsing import Shape
from ..audit.scores.table import PROVENANCE as SCORES

SCHEMA_VERSION = 3
ROWS_KEY = "mmaudit.rows"  # in the file's own metadata, which are written last: how many rows, and both digests
_NOT_DIGESTED = (ROWS_KEY.encode(), b"ARROW:schema")  # the digests themselves, and Arrow's copy of the columns' types
GROUP_ROWS = 131_072  # rows of a row group, and of a step of the digest

RANGES = {
    "bin": ("[0, bins)", "bin of the discrepancy over [-1, 1]; null where the subset was not made by bins"),
    "rank": ("[0, n)", "kept samples that are more balanced, by the balance score; equals share a rank"),
    "weight": ("> 0", "weight in the loss; 1 unless the subset was made by weights"),
    "discrepancy": ("[-1, 1]", "that of provenance.between: +1 its first modality alone, -1 the other side"),
    "gap": ("[0, 1]", "largest minus least confidence; 0 = balanced"),
    "balance": ("[-1, 1]", "as in the score table, high = balanced; null where that has none"),
    "p_balanced": ("[0, 1]", "as in the score table; null where that has none"),
}

COLUMNS: dict[str, pa.DataType] = {
    "sample_id": pa.string(),
    "label": pa.int32(),
    "label_name": pa.string(),
    "split": pa.string(),
    "subset": pa.string(),
    "bin": pa.int16(),
    "rank": pa.int32(),
    "weight": pa.float32(),
    "discrepancy": pa.float32(),
    "gap": pa.float32(),
    "balance": pa.float32(),
    "p_balanced": pa.float32(),
    "group": pa.string(),
    "content": pa.string(),
}
DROPPED_COLUMNS = {
    **{name: type_ for name, type_ in COLUMNS.items() if name not in ("rank", "weight")},
    "reason": pa.string(),
    "score": pa.float64(),
    "threshold": pa.float64(),
}

_TYPES = {**COLUMNS, **DROPPED_COLUMNS}
_MAYBE_TEXT = (str, type(None))
_RECIPE: Shape = {  # what `recipe_of` reads is checked there, against the types of a Recipe
    "seed": int,
    "resplit": _MAYBE_TEXT,
    "scores": _MAYBE_TEXT,
    "intersect": [str],
    "exclude": [str],
    "like": _MAYBE_TEXT,
    "balanced": {"bins": int, "grid": bool},
    "inputs": {},
}
PROVENANCE: Shape = {"schema": str, "subset": str, "between": str, "rule": _RECIPE, "ranges": {}, "scores": SCORES}
ROWS: Shape = {"rows": int, "digest": str, "metadata": str, "dropped_from": str}

REPEATING = ("label_name", "split", "subset", "group", "reason")  # few different values each: stored as codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """Fingerprints of a manifest's rows and of its metadata, 32 hexadecimal digits each."""

    rows: str
    metadata: str


@dataclass(frozen=True, kw_only=True)  # without slots: its digests are computed once
class Manifest:
    """The rows of a manifest as an Arrow table with the columns of COLUMNS, plus the source's path columns."""

    table: pa.Table
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        check_columns(self.table.schema, where="the table")
        nulls = [name for name in ("sample_id", "label", "rank") if self.table[name].null_count]
        if nulls:
            raise ManifestError(f"column {nulls[0]} of the manifest holds nulls: make it anew with mmaudit split")
        _check_unique(self.table["sample_id"])

    def __len__(self) -> int:
        return len(self.table)

    def digest(self) -> str:
        """Fingerprint the rows: every column, in their order."""
        return self.digests.rows

    @cached_property
    def digests(self) -> Digests:
        """Fingerprints of the rows and of the metadata."""
        return Digests(rows=digest_of(self.table), metadata=metadata_digest(self.table.schema.metadata or {}))

    def strings(self, name: str) -> NDArray[np.object_]:
        """Give a column of strings, (n,), null as None."""
        return np.array(self.table[name].to_pylist(), dtype=object)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Give a column of numbers, (n,), null as NaN."""
        return np.array(self.table[name].to_pandas(), dtype=np.float64)


def _check_unique(ids: pa.ChunkedArray) -> None:
    """Raise ManifestError for ids that stand twice; only those whose hashes do are compared."""
    keys = hash_ids(ids.combine_chunks(), seed=0, purpose="unique")
    found, number = np.unique(keys, return_counts=True)
    if (number == 1).all():
        return
    same = ids.filter(pa.array(np.isin(keys, found[number > 1]))).to_pylist()
    if repeated := len(same) - len(set(same)):
        raise ManifestError(f"{repeated} ids stand more than once in the manifest: make it anew with mmaudit split")


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest; ManifestError where it is not one."""
    table, provenance = read_parquet(Path(path), error=ManifestError, shape=PROVENANCE)
    _check_version(provenance, where=str(path))
    check_types(table.schema, where=str(path))
    return Manifest(table=cast_columns(table, where=str(path)), provenance=provenance)


def _check_version(provenance: Mapping[str, Any], *, where: str) -> None:
    """Raise ManifestError for a manifest of another version; metadata that another tool removed state none."""
    stated, right = provenance.get("schema", ""), f"mmaudit.manifest/{SCHEMA_VERSION}"
    if str(stated).startswith("mmaudit.manifest/") and stated != right:
        raise ManifestError(f"{where} is {str(stated)[:40]}, and this mmaudit reads {right}: run mmaudit split again")


def read_dropped(path: Path, manifest: Manifest) -> pa.Table | None:
    """Read the rows that the manifest in `path` left out; None where the file does not lie beside it.

    Raises ManifestError for the rows of another manifest, as a split that was killed half-way leaves them.
    """
    beside = dropped_path(path)
    if not beside.exists():
        return None
    table, _ = read_parquet(beside, error=ManifestError, shape=PROVENANCE)
    if rows_of(beside).get("dropped_from") != manifest.digest():
        raise ManifestError(f"{beside} holds the rows dropped from another manifest: run mmaudit split again")
    check_types(table.schema, where=str(beside), columns=DROPPED_COLUMNS)
    return cast_columns(table, where=str(beside))


def dropped_path(path: Path) -> Path:
    """Name the file of dropped rows that belongs to a manifest."""
    return path.with_name(f"{path.stem}.dropped.parquet")


def provenance_of(path: Path) -> dict[str, Any]:
    """Read what a manifest was made from, without its rows."""
    metadata = read_manifest_schema(path).metadata or {}
    return parse_provenance(metadata, error=ManifestError, where=str(path), shape=PROVENANCE)


def read_manifest_schema(path: Path) -> pa.Schema:
    """Read the columns of a manifest, or of its dropped rows."""
    return read_schema(path, error=ManifestError)


def num_rows_of(path: Path) -> int:
    """Read how many rows a manifest, or its dropped rows, has."""
    return int(read_footer(path, error=ManifestError).num_rows)


def rows_of(path: Path) -> dict[str, Any]:
    """Read what a file states of itself: rows, digest, metadata; dropped rows also dropped_from. {} if nothing."""
    metadata = read_footer(path, error=ManifestError).metadata or {}
    return parse_provenance(metadata, error=ManifestError, where=str(path), key=ROWS_KEY.encode(), shape=ROWS)


def batches_of(path: Path, *, columns: list[str] | None = None, as_stored: bool = False) -> Iterator[pa.Table]:
    """Read a manifest, or its dropped rows, a batch at a time; ManifestError where that cannot be done.

    Columns of a manifest come in the types that it is written with; `as_stored`: in those that the file has.
    """
    if not as_stored:
        schema = read_manifest_schema(path)
        names = schema.names if columns is None else columns
        check_types(schema, where=str(path), columns={name: _TYPES[name] for name in names if name in _TYPES})
    for table in read_batches(path, error=ManifestError, rows=GROUP_ROWS, columns=columns):
        yield table if as_stored else cast_columns(table, where=str(path))


def check_columns(schema: pa.Schema, *, where: str, columns: Mapping[str, pa.DataType] = COLUMNS) -> None:
    """Raise ManifestError for a table that lacks any column of a manifest."""
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise ManifestError(
            f"{where} is not a manifest: it lacks {', '.join(missing)}; make one with: mmaudit split --balanced"
        )


def check_types(schema: pa.Schema, *, where: str, columns: Mapping[str, pa.DataType] = COLUMNS) -> None:
    """Raise ManifestError for a table that lacks columns, or has others than texts and numbers under their names."""
    check_columns(schema, where=where, columns=columns)
    for name, right in columns.items():
        type_ = schema.field(name).type
        value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
        texts = pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
        numbers = pa.types.is_integer(value_type) or pa.types.is_floating(value_type)
        if not (texts if right == pa.string() else numbers) and not pa.types.is_null(type_):
            raise ManifestError(f"{where} is not a manifest: its {name} is {type_}, not {right}")


def cast_columns(table: pa.Table, *, where: str) -> pa.Table:
    """Return the columns of a manifest in the types that it is written with, whatever rewrote the file since."""
    try:
        for place, field in enumerate(table.schema):
            if field.type != _TYPES.get(field.name, field.type):
                table = table.set_column(place, field.name, table.column(place).cast(_TYPES[field.name]))
    except pa.ArrowException as cause:
        raise ManifestError(f"{where}: column {field.name} cannot be read: {str(cause).splitlines()[0]}") from cause
    return table


class RowDigest:
    """A fingerprint of rows in their order, of each column's name and values, whatever batches they come in."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()  # processors have instructions for it: twice as quick as blake2b

    def add(self, table: pa.Table) -> None:
        """Add the next GROUP_ROWS rows, or the last ones."""
        for name in sorted(table.column_names):
            column = table[name].combine_chunks()
            if name in REPEATING and not pa.types.is_dictionary(column.type):
                column = column.dictionary_encode()
            self._whole.update(f"{name}\0{len(column)}\0{column.null_count}\0".encode())
            if column.null_count == len(column):
                continue
            if column.null_count:
                self._whole.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
            for block in _value_bytes(column):
                self._whole.update(block)

    def hexdigest(self) -> str:
        """Give it in 32 hexadecimal digits."""
        return self._whole.hexdigest()[:32]


def digest_of(table: pa.Table) -> str:
    """Fingerprint the rows of a table."""
    found = RowDigest()
    for group in regroup([table]):
        found.add(group)
    return found.hexdigest()


def digests_of(path: Path) -> Digests:
    """Compute the digests of a file, a batch at a time."""
    rows = RowDigest()
    for group in regroup(batches_of(path)):
        rows.add(group)
    return Digests(rows=rows.hexdigest(), metadata=metadata_digest(read_manifest_schema(path).metadata or {}))


def metadata_digest(metadata: Mapping[bytes, bytes]) -> str:
    """Fingerprint all metadata of a file, other tools' too, but for those that state the digests themselves."""
    pairs = sorted((name, value) for name, value in metadata.items() if name not in _NOT_DIGESTED)
    return digest(*(part for pair in pairs for part in pair))


def regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Cut tables anew, into ones of GROUP_ROWS rows and a last one."""
    held: list[pa.Table] = []
    number = 0
    for table in tables:
        held.append(table)
        number += len(table)
        while number >= GROUP_ROWS:
            whole = pa.concat_tables(held)
            yield whole.slice(0, GROUP_ROWS)
            held = [whole.slice(GROUP_ROWS)]
            number -= GROUP_ROWS
    if number:
        yield pa.concat_tables(held)


def _value_bytes(column: pa.Array) -> Iterator[bytes | memoryview]:
    """Give the values of a column as bytes that depend on nothing else; a null as 0, or as an empty text."""
    if pa.types.is_dictionary(column.type):
        yield from _dictionary_bytes(column)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        filled = column.fill_null(0) if column.null_count else column
        yield np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)).data.cast("B")
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
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
    """Give the values that occur, sorted, and the place of each row's among them; a null has the first."""
    names = column.dictionary.to_pylist()
    codes = column.indices.to_numpy(zero_copy_only=False) if not column.null_count else None
    if codes is None:
        codes = column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    used = np.flatnonzero(np.bincount(codes, minlength=len(names))[: len(names)]).tolist()
    among = sorted({names[code] for code in used})
    number = {name: place for place, name in enumerate(among)}
    place = np.zeros(len(names) + 1, dtype=np.min_scalar_type(len(among)))
    place[used] = [number[names[code]] for code in used]
    yield json.dumps(among, default=str).encode()
    yield place[codes].data.cast("B")
