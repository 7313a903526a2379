"""Checks of the rows of one manifest file: ranges, types, and the digests stated in its metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..audit.errors import ManifestError
from .manifest import (
    SCHEMA_VERSION,
    Digests,
    RowDigest,
    manifest_schema,
    metadata_digest,
    read_batches_of_manifest,
    read_num_rows,
    read_provenance,
    read_stated_digests,
    regroup,
)
from .score_files import prefetch
from .score_tables import hash_keys
from .selection import ExternalSort

# Inclusive bounds of each column; the largest bin and rank depend on the manifest.
BOUNDS: dict[str, tuple[float, float]] = {
    "bin": (0.0, np.inf),
    "rank": (0.0, np.inf),
    "weight": (5e-324, float(np.finfo(np.float32).max)),
    "discrepancy": (-1.0, 1.0),
    "gap": (0.0, 1.0),
    "balance": (-1.0, 1.0),
    "p_balanced": (0.0, 1.0),
}
REQUIRED = ("sample_id", "label", "subset", "rank", "weight", "gap", "reason")  # columns without nulls, if present
_SLACK = 2e-6  # a confidence may be 1e-6 outside [0, 1], and a discrepancy is a difference of two


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Result of one check. held: True if passed, False if failed, None if skipped; `detail` has the reason."""

    name: str
    held: bool | None
    detail: str


class CheckedFile:
    """Statistics of one manifest file, and what its metadata state; `read_all` collects them in one pass."""

    def __init__(self, path: Path, columns: dict[str, pa.DataType], provenance: dict[str, Any]) -> None:
        self.path = path
        self.stated, self.provenance = read_stated_digests(path), read_provenance(path)
        self.schema = manifest_schema(path)
        _check_ids(self.schema, path)
        self.num_rows = read_num_rows(path)
        self.missing = [name for name in columns if name not in self.schema.names]
        self.columns = columns
        self.bounds: dict[str, tuple[float, float]] = {
            **BOUNDS,
            "bin": (0.0, _recipe_num_bins(provenance) - 1.0),
            "rank": (0.0, max(self.num_rows - 1.0, 0.0)),
        }
        self.digest = RowDigest()
        self.metadata = metadata_digest(self.schema.metadata or {})
        self.nulls: Counter[str] = Counter()
        self.out_of_range: Counter[str] = Counter()
        self.first_out_of_range: dict[str, str] = {}
        self.names_of_label: dict[Any, set[Any]] = {}
        self.subsets: set[Any] = set()

    @property
    def digests(self) -> Digests:
        """Digests of the rows and metadata read; call read_all first."""
        return Digests(rows=self.digest.hexdigest(), metadata=self.metadata)

    def read_all(self, ids: ExternalSort, file_index: int) -> None:
        """Read every row once and add its id's hash to `ids`, with `file_index` as cell."""
        for table in prefetch(regroup(read_batches_of_manifest(self.path, as_stored=True))):
            self.digest.add(table)
            self._note_nulls(table)
            self._note_ranges(table)
            self.subsets |= set(pc.unique(table["subset"]).to_pylist())
            pairs = table.select(["label", "label_name"]).group_by(["label", "label_name"]).aggregate([])
            for pair in pairs.to_pylist():
                self.names_of_label.setdefault(pair["label"], set()).add(pair["label_name"])
            keys = hash_keys(non_null_ids(table["sample_id"]), seed=0)
            ids.add(keys, np.full(len(keys), file_index, np.int32), np.zeros(len(keys), np.uint32))

    def _note_nulls(self, table: pa.Table) -> None:
        for name in REQUIRED:
            if name in table.column_names and table[name].null_count:
                self.nulls[name] += table[name].null_count

    def _note_ranges(self, table: pa.Table) -> None:
        for name, (low, high) in self.bounds.items():
            if name not in table.column_names or not _is_number(table[name].type):
                continue
            valid = table[name].is_valid().to_numpy()
            values = table[name].cast(pa.float64(), safe=False).fill_null(0).to_numpy()
            slack = _SLACK if low == -1 or high == 1 else 0.0
            out_of_range = valid & ~((values >= low - slack) & (values <= high + slack))
            if out_of_range.any():
                first_row = int(np.argmax(out_of_range))
                self.out_of_range[name] += int(out_of_range.sum())
                self.first_out_of_range.setdefault(
                    name, f"{values[first_row]:g} of sample {table['sample_id'][first_row]}"
                )

    def checks(self, prefix: str) -> list[Check]:
        """Return the checks of this file alone; `prefix` marks those of the dropped rows."""
        schema = self._schema()
        if self.missing:
            return [Check(name=f"{prefix}schema", held=False, detail=schema)]
        expected = f"{self.path.name} is mmaudit.manifest/{SCHEMA_VERSION}, {len(self.columns)} columns"
        nulls = ", ".join(f"{count:,} of {name}" for name, count in self.nulls.items())
        ranges = "; ".join(
            f"{count:,} of {name} outside {_format_range(*self.bounds[name])} "
            f"(the first: {self.first_out_of_range[name]})"
            for name, count in self.out_of_range.items()
        )
        return [
            Check(name=f"{prefix}schema", held=not schema, detail=schema or expected),
            _compare_stated(f"{prefix}rows", self.stated.get("rows"), self.num_rows),
            _compare_stated(f"{prefix}digest", self.stated.get("digest"), self.digests.rows, changed_part="rows"),
            _compare_stated(
                f"{prefix}metadata", self.stated.get("metadata"), self.digests.metadata, changed_part="metadata"
            ),
            Check(name=f"{prefix}nulls", held=not nulls, detail=nulls or "no nulls in required columns"),
            Check(name=f"{prefix}ranges", held=not ranges, detail=ranges or "all values are in range"),
        ]

    def _schema(self) -> str:
        """Return a description of what is wrong with the schema, or ""."""
        if self.missing:
            return f"{self.path.name} lacks {', '.join(self.missing)}: run mmaudit split again"
        stated, expected = self.provenance.get("schema"), f"mmaudit.manifest/{SCHEMA_VERSION}"
        if stated is None:
            return f"{self.path.name} has no metadata under the key mmaudit: it was rewritten by another tool"
        if stated != expected:
            return f"{self.path.name} is {stated}, but this mmaudit reads {expected}: run mmaudit split again"
        types = {name: (self.schema.field(name).type, type_) for name, type_ in self.columns.items()}
        return ", ".join(
            f"{name} is {stored}, not {type_}" for name, (stored, type_) in types.items() if stored != type_
        )


def _compare_stated(name: str, stated: object, actual: object, *, changed_part: str = "") -> Check:
    """Compare a stated value with the actual one; `changed_part` names what changed if they differ."""
    if stated is None:
        detail = f"not stated in the metadata; found {actual}: the file was rewritten by another tool"
        return Check(name=name, held=False, detail=detail)
    same = stated == actual
    changed = f"{changed_part} changed: " if changed_part else ""
    return Check(name=name, held=same, detail=str(actual) if same else f"{changed}{stated} when written, {actual} now")


def _recipe_num_bins(provenance: dict[str, Any]) -> float:
    """Return the number of bins of the recorded recipe (of a grid, over both axes); infinity if not recorded."""
    recipe = provenance_section(provenance_section(provenance, "recipe"), "balanced")
    bins = recipe.get("bins")
    if not isinstance(bins, int) or bins < 1:
        return np.inf
    return float(bins**2 if recipe.get("grid") else bins)


def _check_ids(schema: pa.Schema, path: Path) -> None:
    """Raise ManifestError if the ids are not strings or a column is nested."""
    type_ = schema.field("sample_id").type if "sample_id" in schema.names else pa.string()
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
        raise ManifestError(f"{path} is not a manifest: its sample_id is {type_}, not string")
    nested = [name for name in schema.names if pa.types.is_nested(schema.field(name).type)]
    if nested:
        raise ManifestError(f"{path} is not a manifest: its {nested[0]} is {schema.field(nested[0]).type}")


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def non_null_ids(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the non-null ids as large strings, whose column size is not limited."""
    return ids.drop_null().cast(pa.large_string())


def _format_range(low: float, high: float) -> str:
    if low > 0:
        return "(0, inf)"
    return f"[{low:g}, inf)" if np.isinf(high) else f"[{low:g}, {high:g}]"


def provenance_section(provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a manifest's provenance, or {} if there is none of that name."""
    value = provenance.get(name)
    return value if isinstance(value, dict) else {}
