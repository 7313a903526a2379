"""Checks of the rows of one file: ranges, types, and what the file says of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..audit.errors import ManifestError
from .external_sort import ExternalSort
from .manifest import (
    SCHEMA_VERSION,
    Digests,
    RowDigest,
    batches_of,
    metadata_digest,
    num_rows_of,
    provenance_of,
    read_manifest_schema,
    regroup,
    rows_of,
)
from .score_files import prefetch
from .score_tables import hash_keys

BOUNDS: dict[
    str, tuple[float, float]
] = {  # both ends are within; the last bin and the last rank are the manifest's own
    "bin": (0.0, np.inf),
    "rank": (0.0, np.inf),
    "weight": (5e-324, float(np.finfo(np.float32).max)),
    "discrepancy": (-1.0, 1.0),
    "gap": (0.0, 1.0),
    "balance": (-1.0, 1.0),
    "p_balanced": (0.0, 1.0),
}
REQUIRED = ("sample_id", "label", "subset", "rank", "weight", "gap", "reason")  # those of them that a file has
_SLACK = 2e-6  # a confidence may lie 1e-6 outside [0, 1], and a discrepancy has two of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at. held: None where it was not, and `detail` says why."""

    name: str
    held: bool | None
    detail: str


class CheckedFile:
    """What one file says of its rows, and what they are."""

    def __init__(self, path: Path, columns: dict[str, pa.DataType], provenance: dict[str, Any]) -> None:
        self.path = path
        self.about, self.provenance = rows_of(path), provenance_of(path)
        self.schema = read_manifest_schema(path)
        _check_ids(self.schema, path)
        self.num_rows = num_rows_of(path)
        self.missing = [name for name in columns if name not in self.schema.names]
        self.columns = columns
        self.bounds: dict[str, tuple[float, float]] = {
            **BOUNDS,
            "bin": (0.0, _rule_num_bins(provenance) - 1.0),
            "rank": (0.0, max(self.num_rows - 1.0, 0.0)),
        }
        self.digest = RowDigest()
        self.metadata = metadata_digest(self.schema.metadata or {})
        self.nulls: Counter[str] = Counter()
        self.beyond: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.names: dict[Any, set[Any]] = {}
        self.subsets: set[Any] = set()

    @property
    def digests(self) -> Digests:
        """The digests of what the file holds, once all is read."""
        return Digests(rows=self.digest.hexdigest(), metadata=self.metadata)

    def read_all(self, ids: ExternalSort, number: int) -> None:
        """Look at every row once."""
        for table in prefetch(regroup(batches_of(self.path, as_stored=True))):
            self.digest.add(table)
            self._note_nulls(table)
            self._note_ranges(table)
            self.subsets |= set(pc.unique(table["subset"]).to_pylist())
            pairs = table.select(["label", "label_name"]).group_by(["label", "label_name"]).aggregate([])
            for pair in pairs.to_pylist():
                self.names.setdefault(pair["label"], set()).add(pair["label_name"])
            key = hash_keys(non_null_ids(table["sample_id"]), seed=0)
            ids.add(key, np.full(len(key), number, np.int32), np.zeros(len(key), np.uint32))

    def _note_nulls(self, table: pa.Table) -> None:
        for name in REQUIRED:
            if name in table.column_names and table[name].null_count:
                self.nulls[name] += table[name].null_count

    def _note_ranges(self, table: pa.Table) -> None:
        for name, (low, high) in self.bounds.items():
            if name not in table.column_names or not _is_number(table[name].type):
                continue
            there = table[name].is_valid().to_numpy()
            values = table[name].cast(pa.float64(), safe=False).fill_null(0).to_numpy()
            slack = _SLACK if low == -1 or high == 1 else 0.0
            wrong = there & ~((values >= low - slack) & (values <= high + slack))
            if wrong.any():
                place = int(np.argmax(wrong))
                self.beyond[name] += int(wrong.sum())
                self.first.setdefault(name, f"{values[place]:g} of sample {table['sample_id'][place]}")

    def checks(self, prefix: str) -> list[Check]:
        """Give the checks of this file alone; `prefix` tells the dropped rows'."""
        schema = self._schema()
        if self.missing:
            return [Check(name=f"{prefix}schema", held=False, detail=schema)]
        expected = f"{self.path.name} is mmaudit.manifest/{SCHEMA_VERSION}, {len(self.columns)} columns"
        nulls = ", ".join(f"{number:,} of {name}" for name, number in self.nulls.items())
        ranges = "; ".join(
            f"{number:,} of {name} outside {_format_range(*self.bounds[name])} (the first: {self.first[name]})"
            for name, number in self.beyond.items()
        )
        return [
            Check(name=f"{prefix}schema", held=not schema, detail=schema or expected),
            _compare_stated(f"{prefix}rows", self.about.get("rows"), self.num_rows),
            _compare_stated(f"{prefix}digest", self.about.get("digest"), self.digests.rows, what="rows"),
            _compare_stated(f"{prefix}metadata", self.about.get("metadata"), self.digests.metadata, what="metadata"),
            Check(name=f"{prefix}nulls", held=not nulls, detail=nulls or "none where a value must be"),
            Check(name=f"{prefix}ranges", held=not ranges, detail=ranges or "every value lies within its range"),
        ]

    def _schema(self) -> str:
        """Say what is wrong with the schema; nothing: ""."""
        if self.missing:
            return f"{self.path.name} lacks {', '.join(self.missing)}: run mmaudit split again"
        stated, right = self.provenance.get("schema"), f"mmaudit.manifest/{SCHEMA_VERSION}"
        if stated is None:
            return f"{self.path.name} has no metadata under the key mmaudit: another tool has written it since"
        if stated != right:
            return f"{self.path.name} is {stated}, and this mmaudit reads {right}: run mmaudit split again"
        types = {name: (self.schema.field(name).type, type_) for name, type_ in self.columns.items()}
        return ", ".join(f"{name} is {type_}, not {right}" for name, (type_, right) in types.items() if type_ != right)


def _compare_stated(name: str, stated: object, found: object, *, what: str = "") -> Check:
    """Compare what a file states of itself with what is there; `what` has changed where they differ."""
    if stated is None:
        detail = f"the metadata do not state it; found {found}: another tool has written the file since"
        return Check(name=name, held=False, detail=detail)
    same = stated == found
    changed = f"{what} changed: " if what else ""
    return Check(name=name, held=same, detail=str(found) if same else f"{changed}{stated} when written, {found} now")


def _rule_num_bins(provenance: dict[str, Any]) -> float:
    """Give how many bins the rule has, of a grid those of both axes; infinity where it does not tell."""
    rule = section(section(provenance, "rule"), "balanced")
    bins = rule.get("bins")
    if not isinstance(bins, int) or bins < 1:
        return np.inf
    return float(bins**2 if rule.get("grid") else bins)


def _check_ids(schema: pa.Schema, path: Path) -> None:
    """Raise ManifestError for columns that no manifest could have."""
    type_ = schema.field("sample_id").type if "sample_id" in schema.names else pa.string()
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
        raise ManifestError(f"{path} is not a manifest: its sample_id is {type_}, not string")
    nested = [name for name in schema.names if pa.types.is_nested(schema.field(name).type)]
    if nested:
        raise ManifestError(f"{path} is not a manifest: its {nested[0]} is {schema.field(nested[0]).type}")


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def non_null_ids(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Give the ids that are not null, as strings that a column of any size can hold."""
    return ids.drop_null().cast(pa.large_string())


def _format_range(low: float, high: float) -> str:
    if low > 0:
        return "(0, inf)"
    return f"[{low:g}, inf)" if np.isinf(high) else f"[{low:g}, {high:g}]"


def section(provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """Give a part of what a manifest was made from, {} where it has none of that name."""
    found = provenance.get(name)
    return found if isinstance(found, dict) else {}
