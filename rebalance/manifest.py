"""A manifest: which samples to train on, how they were chosen, and which were left out and why"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..audit.errors import ManifestError
from ..audit.hashing import digest
from ..audit.parquet import read_parquet, write_parquet
from ..audit.score import ScoreTable

SCHEMA_VERSION = 1

RANGES = {
    "bin": ("[0, bins)", "bin of the discrepancy over [-1, 1]; null where the subset was not made by bins"),
    "rank": ("[0, n)", "0 = most balanced of this manifest, by the balance score"),
    "weight": ("> 0", "weight in the loss; 1 unless the subset was made by weights"),
    "discrepancy": ("[-1, 1]", "that of provenance.between: +1 its first modality alone, -1 the other side"),
    "gap": ("[0, 1]", "largest minus least confidence; 0 = balanced"),
    "p_balanced": ("[0, 1]", "as in the score table; null where that has none"),
}

_COLUMNS: dict[str, pa.DataType] = {
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
    "p_balanced": pa.float32(),
    "group": pa.string(),
    "content": pa.string(),
}
_REQUIRED = tuple(_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A choice among the n rows of a score table. Arrays have shape (n,).

    `reason` says in one word why the others were dropped: their `score` was on the wrong side of `threshold`. A score
    of NaN is that of a sample without a modality that the choice is about; it is never kept.
    `rule` is what the choice can be repeated from.
    """

    name: str
    between: str
    keep: NDArray[np.bool_]
    reason: str
    score: NDArray[np.floating[Any]]
    threshold: NDArray[np.floating[Any]]
    bin: NDArray[np.int16] | None = None  # -1 where a modality is missing
    rule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The rows of a manifest as an Arrow table with the columns of _COLUMNS, plus the source's path columns."""

    table: pa.Table
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        missing = [name for name in _REQUIRED if name not in self.table.column_names]
        if missing:
            raise ManifestError(
                f"not a manifest: it lacks {', '.join(missing)}; make one with: mmaudit split --balanced"
            )
        nulls = [name for name in ("sample_id", "label", "rank") if self.table[name].null_count]
        if nulls:
            raise ManifestError(f"column {nulls[0]} of the manifest holds nulls: make it anew with mmaudit split")
        repeated = len(self) - len(set(self.table["sample_id"].to_pylist()))
        if repeated:
            raise ManifestError(f"{repeated} ids stand more than once in the manifest: make it anew with mmaudit split")

    def __len__(self) -> int:
        return len(self.table)

    def digest(self) -> str:
        """Fingerprint what training and its figures depend on: all columns but the names."""
        columns = [self.table[name].to_pylist() for name in _REQUIRED if name not in ("label_name", "subset")]
        return digest(repr(columns).encode())

    def strings(self, name: str) -> NDArray[np.object_]:
        """Give a column of strings, (n,), null as None."""
        return np.array(self.table[name].to_pylist(), dtype=object)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Give a column of numbers, (n,), null as NaN."""
        return np.array(self.table[name].to_pandas(), dtype=np.float64)


def make_manifest(scores: ScoreTable, selection: Selection) -> tuple[Manifest, pa.Table]:
    """Give the manifest of a selection, and the table of dropped rows with reason, score and threshold.

    Kept + dropped = scored. Raises ManifestError if nothing is kept.
    """
    if not selection.keep.any():
        raise ManifestError(f"{selection.name}: none of the {len(scores)} scored samples qualifies; widen the rule")
    everything = _all_rows(scores, selection)
    kept = everything.filter(pa.array(selection.keep)).set_column(6, "rank", pa.array(_ranks(scores, selection.keep)))
    dropped = everything.filter(pa.array(~selection.keep)).drop_columns(["rank", "weight"])
    out = ~selection.keep
    reason = np.where(np.isnan(selection.score[out]), "missing-modality", selection.reason)
    dropped = dropped.append_column("reason", pa.array(reason.tolist(), pa.string()))
    dropped = dropped.append_column("score", pa.array(selection.score[out], pa.float64(), from_pandas=True))
    dropped = dropped.append_column("threshold", pa.array(selection.threshold[out], pa.float64()))
    return Manifest(table=kept, provenance=_provenance(scores, selection)), dropped


def write_manifest(manifest: Manifest, dropped: pa.Table, path: Path) -> None:
    """Write NAME.dropped.parquet, which says whose rows they are, then NAME.parquet."""
    provenance = {**manifest.provenance, "dropped_from": manifest.digest()}
    write_parquet(dropped, dropped_path(path), provenance=provenance)
    write_parquet(manifest.table, path, provenance=manifest.provenance)


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest; ManifestError where it is not one."""
    table, provenance = read_parquet(Path(path), error=ManifestError)
    return Manifest(table=table, provenance=provenance)


def read_dropped(path: Path, manifest: Manifest) -> pa.Table | None:
    """Read the rows that the manifest in `path` left out; None where the file does not lie beside it.

    Raises ManifestError for the rows of another manifest, as a split that was killed half-way leaves them.
    """
    beside = dropped_path(path)
    if not beside.exists():
        return None
    table, provenance = read_parquet(beside, error=ManifestError)
    if provenance.get("dropped_from", manifest.digest()) != manifest.digest():
        raise ManifestError(f"{beside} holds the rows dropped from another manifest: run mmaudit split again")
    return table


def dropped_path(path: Path) -> Path:
    """Name the file of dropped rows that belongs to a manifest."""
    return path.with_name(f"{path.stem}.dropped.parquet")


def _all_rows(scores: ScoreTable, selection: Selection) -> pa.Table:
    n = len(scores)
    columns: dict[str, Any] = {
        "sample_id": scores.sample_id,
        "label": scores.label,
        "label_name": scores.label_name,
        "split": scores.split,
        "subset": np.full(n, selection.name, dtype=object),
        "bin": None if selection.bin is None else pa.array(selection.bin, mask=selection.bin < 0),
        "rank": np.zeros(n, dtype=np.int32),
        "weight": np.ones(n, dtype=np.float32),
        "discrepancy": scores.discrepancy(selection.between),
        "gap": scores.gap,
        "p_balanced": scores.p_balanced,
        "group": scores.group,
        "content": scores.content,
    }
    arrays = {
        name: pa.nulls(n, type_) if columns[name] is None else pa.array(columns[name], type_, from_pandas=True)
        for name, type_ in _COLUMNS.items()
    }
    if scores.paths is not None:
        arrays |= {
            name: scores.paths[name].combine_chunks() for name in scores.paths.column_names if name not in arrays
        }
    return pa.table(arrays)


def _ranks(scores: ScoreTable, keep: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Rank the kept rows, 0 = most balanced: by balance score, or by the gap where the table has none; ties by id."""
    badness = scores.gap if scores.balance is None else -scores.balance
    order = np.lexsort((scores.sample_id[keep].astype(str), badness[keep]))
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank


def _provenance(scores: ScoreTable, selection: Selection) -> dict[str, Any]:
    return {
        "schema": f"mmaudit.manifest/{SCHEMA_VERSION}",
        "subset": selection.name,
        "between": selection.between,
        "rule": dict(selection.rule),
        "ranges": {name: {"range": span, "meaning": meaning} for name, (span, meaning) in RANGES.items()},
        "scores": {key: value for key, value in scores.provenance.items() if key not in ("ranges", "schema")},
    }
